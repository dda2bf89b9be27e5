"""Ablation curves: metrics against the one numeric key of a grid, a picture a category and part."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from flawsmith.evaluation.metrics import METRICS
from flawsmith.pages import DARK, LIGHT, dress, figure_png
from flawsmith_lab.study.results import Row
from flawsmith_lab.study.statistics import spread

DRAWN = ("image_auroc", "pixel_ap", "aupro")
Lines = Mapping[str, Mapping[float | None, Sequence[Row]]]


def numeric_key(grid: Mapping[str, Sequence[Any]]) -> str | None:
    """The grid's only key with numbers (or lists of them) for values, if there are two or more."""
    keys = [key for key, values in grid.items() if len(values) > 1 and None not in map(as_number, values)]
    return keys[0] if len(keys) == 1 else None


def as_number(value: Any) -> float | None:
    """Where a value lies on the axis: a list of numbers, such as a range, at its mean; None for anything else."""
    items = value if isinstance(value, list | tuple) else [value]
    if not items or any(isinstance(item, bool) or not isinstance(item, int | float | str) for item in items):
        return None
    try:  # YAML 1.1 reads 1e-3 as text
        return sum(float(item) for item in items) / len(items)
    except ValueError:
        return None


def curves(rows: Sequence[Row], key: str) -> Lines:
    """The rows of one category and part that are done: label of the line → place on the axis → rows of all seeds.

    A line is a method at a point of the grid's other keys. One that does not read the key has the one place None.
    """
    lines: dict[str, dict[float | None, list[Row]]] = {}
    for row in rows:
        if row.is_done:
            grid = row.cell.grid
            label = " ".join([row.cell.method, *(f"{name}={value}" for name, value in grid.items() if name != key)])
            lines.setdefault(label, {}).setdefault(as_number(grid[key]) if key in grid else None, []).append(row)
    return lines


def curves_png(lines: Lines, key: str, title: str, dark: bool = False) -> bytes:
    """Three panels as PNG; bars are one standard deviation over seeds; a line without places is drawn level."""
    theme = DARK if dark else LIGHT
    figure = Figure(figsize=(12.6, 4.2), dpi=110, layout="constrained", facecolor=theme.paper)
    figure.suptitle(title, color=theme.ink, fontsize=11, x=0.01, ha="left")
    colours = [theme.detector, theme.bad, theme.good, theme.soft, theme.ink]
    for axes, name in zip(figure.subplots(1, len(DRAWN)), DRAWN, strict=True):
        for index, (label, rows_at) in enumerate(lines.items()):
            colour, marker = colours[index % len(colours)], "osD^v"[index % 5]
            spreads = {place: spread([row.metrics[name] for row in rows]) for place, rows in rows_at.items()}
            bars = {place: one.deviation if one.n > 1 else 0.0 for place, one in spreads.items()}
            if None in spreads:
                mean, bar = spreads[None].mean, bars[None]
                axes.axhspan(mean - bar, mean + bar, color=colour, alpha=0.15, lw=0)
                axes.axhline(mean, color=colour, lw=1.4, ls="--", label=label)
            else:
                places = sorted(place for place in spreads if place is not None)
                means = [spreads[place].mean for place in places]
                axes.errorbar(
                    places, means, yerr=[bars[place] for place in places], color=colour, marker=marker, ms=5, lw=1.8,
                    capsize=3, label=label,
                )  # fmt: skip
        dress(axes, theme, METRICS[name].title, key, grid=True)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(  # outside: where data lie is not looked for
        handles, labels, loc="outside lower left", ncols=4, fontsize=8, frameon=False, labelcolor=theme.ink
    )
    return figure_png(figure)


def file_name(part: str, category: str, key: str) -> str:
    """Name a picture; a category is a folder's name, a key has plain letters."""
    return f"{part}-{re.sub(r'[^A-Za-z0-9._-]', '_', category)}-{key}.png"
