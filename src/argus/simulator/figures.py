"""Writes a comparison to a folder: tables, and the published three-panel figure."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from argus.control.variants import Numbers
from argus.simulator.cluster import Simulation
from argus.simulator.report import Report
from argus.simulator.requests import ON_TIME, OUTCOMES
from argus.simulator.runs import Scenario

MEAN_MINUTES = 30  # the published curves are rolling means


def save(
    folder: Path, reports: dict[str, Report], runs: dict[str, Simulation], scenario: Scenario
) -> list[Path]:
    """Write `report.json`, `requests.parquet`, `minutes.parquet` and `figure.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / name for name in
             ("report.json", "requests.parquet", "minutes.parquet", "figure.png")]  # fmt: skip
    content = {
        "world": scenario.world.name,
        "slo": scenario.slo_multiple,
        "seed": scenario.seed,
        "parameters": scenario.world.sources,
        "policies": {name: asdict(report) for name, report in reports.items()},
    }
    files[0].write_text(json.dumps(content, indent=1) + "\n")
    pd.concat([_requests(name, run) for name, run in runs.items()]).to_parquet(files[1])
    minutes = {name: _minutes(run, len(scenario.scaled)) for name, run in runs.items()}
    pd.concat([table.assign(policy=name) for name, table in minutes.items()]).to_parquet(files[2])
    _figure(minutes, scenario.scaled).savefig(files[3], dpi=120, bbox_inches="tight")
    return files


def _requests(name: str, run: Simulation) -> pd.DataFrame:
    requests, variants = run.requests, list(run.world.table.variants)
    return pd.DataFrame(
        {
            "policy": name,
            "arrived_s": requests.arrived_s,
            "ended_s": requests.ended_s,
            "prompt": requests.prompt,
            "outcome": _named(requests.outcome, list(OUTCOMES)),
            "variant": _named(requests.variant, variants),
            "quality": requests.quality,
        }
    )


def _named(codes: Any, names: list[str]) -> pd.Categorical[str]:
    return pd.Categorical.from_codes(codes.tolist(), pd.Index(names))


def _minutes(run: Simulation, count: int) -> pd.DataFrame:
    """By minute of arrival: pictures on time, violations, mean quality of the pictures on time."""
    requests = run.requests
    minute = (requests.arrived_s // 60).astype(int)
    on_time = requests.outcome == ON_TIME
    count = max(count, int(minute.max(initial=-1)) + 1)
    offered = np.bincount(minute, minlength=count)
    good = np.bincount(minute, weights=on_time, minlength=count)
    quality = np.bincount(minute, weights=on_time * requests.quality, minlength=count)
    return pd.DataFrame(
        {
            "minute": np.arange(count),
            "on_time": good,
            "violations": offered - good,
            "quality": np.where(good > 0, quality / np.maximum(good, 1), np.nan),
        }
    )


def _figure(minutes: dict[str, pd.DataFrame], offered: Numbers) -> Figure:
    figure = Figure(figsize=(10, 8))
    panels = figure.subplots(3, 1, sharex=True)
    names = ("on_time", "quality", "violations")
    labels = ("pictures on time / min", "mean quality", "violations / min")
    window = min(MEAN_MINUTES, max(1, len(offered) // 20))
    for panel, column, label in zip(panels, names, labels, strict=True):
        if column == "on_time":
            panel.plot(offered, color="0.75", linewidth=4, label="offered")
        for name, table in minutes.items():
            mean = table[column].rolling(window, min_periods=1, center=True).mean()
            strong = name in ("price", "argus")
            panel.plot(table["minute"], mean, label=name, linewidth=2 if strong else 1)
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
    panels[-1].set_xlabel("minute")
    panels[0].legend(ncol=7, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure
