"""Ablation curves: metrics against the one numeric key of a grid, a picture a category and part."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from flawsmith.evaluation.report import NAMES
from flawsmith.pages import DARK, LIGHT, dress, figure_png
from flawsmith_lab.study.results import Row
from flawsmith_lab.study.statistics import Spread, spread

DRAWN = ("image_auroc", "pixel_ap", "aupro")


@dataclass(frozen=True)
class Curve:
    """One line: `places[i]` → spread of each of DRAWN over seeds; a method that does not depend on the key has one
    place, None, and is drawn level."""

    label: str
    places: tuple[float | None, ...]
    values: tuple[Mapping[str, Spread], ...]


def numeric_key(grid: Mapping[str, Sequence[Any]]) -> str | None:
    """The grid's only key with numbers (or lists of them) for values, if there are two or more."""
    keys = [
        key for key, values in grid.items() if len(values) > 1 and all(as_number(one) is not None for one in values)
    ]
    return keys[0] if len(keys) == 1 else None


def as_number(value: Any) -> float | None:
    """Where a value lies on the axis: a list of numbers, such as a range, at its mean; None for anything else."""
    items = value if isinstance(value, list | tuple) else [value]
    if isinstance(items, str) or not items:
        return None
    if any(isinstance(item, bool) or not isinstance(item, int | float | str) for item in items):
        return None
    try:  # YAML 1.1 reads 1e-3 as text
        return sum(float(item) for item in items) / len(items)
    except ValueError:
        return None


def curves(rows: Sequence[Row], key: str) -> tuple[Curve, ...]:
    """Lines of one category and part; a line for each method and point of the grid's other keys."""
    lines: dict[str, dict[float | None, list[Row]]] = {}
    for row in rows:
        cell = row.cell
        others = [f"{name}={value}" for name, value in cell.grid.items() if name != key]
        place = as_number(cell.grid[key]) if key in cell.grid else None
        if row.is_done:
            lines.setdefault(" ".join([cell.method, *others]), {}).setdefault(place, []).append(row)
    return tuple(
        Curve(
            label,
            tuple(sorted(places, key=lambda place: (place is not None, place or 0.0))),
            tuple(
                {name: spread([row.metrics[name] for row in found]) for name in DRAWN}
                for _, found in sorted(places.items(), key=lambda item: (item[0] is not None, item[0] or 0.0))
            ),
        )
        for label, places in lines.items()
    )


def curves_png(lines: Sequence[Curve], key: str, title: str, dark: bool = False) -> bytes:
    """Three panels; bars are one standard deviation over seeds."""
    theme = DARK if dark else LIGHT
    figure = Figure(figsize=(12.6, 4.2), dpi=110, layout="constrained", facecolor=theme.paper)
    figure.suptitle(title, color=theme.ink, fontsize=11, x=0.01, ha="left")
    colours = [theme.detector, theme.bad, theme.good, theme.soft, theme.ink]
    for axes, name in zip(figure.subplots(1, len(DRAWN)), DRAWN, strict=True):
        for index, line in enumerate(lines):
            colour, marker = colours[index % len(colours)], "osD^v"[index % 5]
            means = [values[name].mean for values in line.values]
            bars = [values[name].deviation if values[name].n > 1 else 0.0 for values in line.values]
            if line.places == (None,):
                axes.axhspan(means[0] - bars[0], means[0] + bars[0], color=colour, alpha=0.15, lw=0)
                axes.axhline(means[0], color=colour, lw=1.4, ls="--", label=line.label)
            else:
                places = [place for place in line.places if place is not None]
                axes.errorbar(
                    places, means[-len(places) :], yerr=bars[-len(places) :], color=colour, marker=marker, ms=5,
                    lw=1.8, capsize=3, label=line.label,
                )  # fmt: skip
        dress(axes, theme, NAMES[name][0], key, grid=True)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(  # outside: where data lie is not looked for
        handles, labels, loc="outside lower left", ncols=4, fontsize=8, frameon=False, labelcolor=theme.ink
    )
    return figure_png(figure)


def file_name(part: str, category: str, key: str) -> str:
    """Of a picture; a category is a folder's name, a key has plain letters."""
    return f"{part}-{re.sub(r'[^A-Za-z0-9._-]', '_', category)}-{key}.png"
