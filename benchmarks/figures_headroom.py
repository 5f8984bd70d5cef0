"""The figures of `headroom.py`."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from numpy.typing import NDArray

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from argus.quality import table as qualities

Curves = dict[str, list[tuple[float, float, float]]]
SIMILARITIES = (0.0, 0.6, 0.7, 0.8, 0.85, 0.9, 0.94, 0.96, 0.98, 1.0)
COLOURS = {
    "blind": "#8a8f98", "rule": "#e08a1e", "oracle": "#2864dc", "predictor": "#28a06a",
}  # fmt: skip


def draw(
    folder: Path,
    rows: pd.DataFrame,
    costs: dict[str, float],
    things: NDArray[np.int64],
    prompts: list[str],
    loads: tuple[float, ...],
    curves: Curves,
) -> None:
    """Write `headroom.png`, `skips.png` and `things.png` into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    rows = rows.assign(quality=qualities.steady(rows))
    _headroom(folder / "headroom.png", loads, curves)
    _skips(folder / "skips.png", rows)
    _things(folder / "things.png", rows, costs, dict(zip(prompts, things.tolist(), strict=True)))


def _headroom(file: Path, loads: tuple[float, ...], curves: Curves) -> None:
    figure, axes = plt.subplots(figsize=(6, 3.6))
    for name, points in curves.items():
        value, low, high = np.array(points).T
        axes.plot(loads, value, color=COLOURS[name], label=name, marker="o", markersize=3)
        axes.fill_between(loads, low, high, color=COLOURS[name], alpha=0.18, linewidth=0)
    axes.set(xlabel="load (1: what the exact variant carries)", ylabel="mean quality, judged")
    axes.legend(frameon=False)
    _save(figure, file)


def _skips(file: Path, rows: pd.DataFrame) -> None:
    """Quality against similarity, a line a skip."""
    figure, axes = plt.subplots(figsize=(6, 3.6))
    skips = rows[rows["similarity"].notna()].copy()
    skips["bin"] = pd.cut(skips["similarity"], SIMILARITIES)
    names = sorted(skips["variant"].unique(), key=lambda name: int(name.split("-")[-1]))
    for i, name in enumerate(names):
        some = skips[skips["variant"] == name].groupby("bin", observed=True)
        colour = plt.get_cmap("viridis")(i / max(1, len(names) - 1))
        axes.plot(
            some["similarity"].mean(), some["quality"].mean(),
            color=colour, label=name, marker="o", markersize=3,
        )  # fmt: skip
    axes.axhline(1, color="#c8ccd2", linewidth=0.8)
    axes.set(xlabel="similarity of prompt and neighbour", ylabel="mean quality")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, file)


def _things(
    file: Path, rows: pd.DataFrame, costs: dict[str, float], things: dict[str, int]
) -> None:
    """Quality of every variant against the number of things asked for."""
    figure, axes = plt.subplots(figsize=(6, 3.6))
    counted = rows.assign(things=rows["prompt"].map(things)).dropna(subset=["things"])
    names = [name for name in costs if name != "exact"]
    for i, name in enumerate(names):
        means = counted[counted["variant"] == name].groupby("things")["quality"].mean()
        colour = plt.get_cmap("tab20")(i / max(1, len(names) - 1))
        axes.plot(means.index, means, color=colour, label=name, marker="o", markersize=3)
    axes.axhline(1, color="#c8ccd2", linewidth=0.8)
    axes.set(xlabel="things asked for", ylabel="mean quality")
    axes.set_xticks(sorted(counted["things"].unique()))
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, file)


def _save(figure: Figure, file: Path) -> None:
    figure.tight_layout()
    figure.savefig(file, dpi=140)
    plt.close(figure)
