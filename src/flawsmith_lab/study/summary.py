"""Rows put together: a label's spread over seeds and its difference to the reference row, a category and over all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from flawsmith.evaluation.intervals import Estimate
from flawsmith.evaluation.metrics import KEYS
from flawsmith.randomness import numpy_generator
from flawsmith_lab.study.results import MEASURED, Row
from flawsmith_lab.study.statistics import PairedTest, Spread, bootstrap_difference, paired_test, spread

ALL = ""  # in a category's place: over all of them


@dataclass(frozen=True)
class Difference:
    """A label minus the reference in one metric.

    Attributes:
        value: mean over categories of the mean over seeds.
        interval: 95 % over images; None where the images are not shared.
        test: over (category, seed) pairs.
    """

    value: float
    interval: Estimate | None
    test: PairedTest


@dataclass(frozen=True)
class Summary:
    """One label in one part of one category (or over ALL).

    Attributes:
        metrics: each of MEASURED → its spread over seeds; over ALL, of the seeds' means over categories.
        by_defect: defect type → image AUROC over seeds; empty over ALL.
        differences: each of KEYS → difference to the reference; empty for the reference itself and where none pairs.
        missing: cells that failed.
    """

    part: str
    category: str
    label: str
    metrics: Mapping[str, Spread]
    by_defect: Mapping[str, Spread]
    differences: Mapping[str, Difference]
    missing: int


def summarise(rows: Sequence[Row], reference: str) -> tuple[Summary, ...]:
    """Summaries by part, then category, ALL last (if there are several), then label, in the rows' order."""
    found = []
    for part in dict.fromkeys(row.cell.part for row in rows):
        of_part = [row for row in rows if row.cell.part == part]
        categories = list(dict.fromkeys(row.cell.category for row in of_part))
        for category in [*categories, *([ALL] if len(categories) > 1 else [])]:
            here = [row for row in of_part if category in (ALL, row.cell.category)]
            labels = dict.fromkeys(row.cell.label for row in here)
            found += [_summary(here, label, reference, part, category) for label in labels]
    return tuple(found)


def reference_of(row: Row, rows: Sequence[Row], reference: str) -> Row | None:
    """The row that `row` is compared with: of the named label or method, the same part, category and seed, and at the
    same point of the grid as far as the reference depends on it."""
    mine = row.cell
    for other in rows:
        cell = other.cell
        if (cell.part, cell.category, cell.seed) == (mine.part, mine.category, mine.seed) and (
            cell.label == reference
            or (cell.method == reference and all(mine.grid.get(key) == value for key, value in cell.grid.items()))
        ):
            return other
    return None


def _summary(rows: Sequence[Row], label: str, reference: str, part: str, category: str) -> Summary:
    mine = [row for row in rows if row.cell.label == label]
    done = [row for row in mine if row.is_done]
    found = [(row, reference_of(row, rows, reference)) for row in done]
    pairs = [(row, other) for row, other in found if other is not None and other.is_done and other is not row]
    defects = dict.fromkeys(name for row in done for name in row.by_defect) if category != ALL else {}
    return Summary(
        part=part,
        category=category,
        label=label,
        metrics={key: spread(_by_seed(mine, key)) for key in MEASURED},
        by_defect={name: spread([row.by_defect[name] for row in done if name in row.by_defect]) for name in defects},
        differences={key: _difference(pairs, key, part, category) for key in KEYS} if pairs else {},
        missing=len(mine) - len(done),
    )


def _by_seed(rows: Sequence[Row], key: str) -> list[float]:
    """A value a seed: the mean over categories, of the seeds for which every category is done."""
    categories = {row.cell.category for row in rows}
    values: dict[int, list[float]] = {}
    for row in rows:
        if row.is_done:
            values.setdefault(row.cell.seed, []).append(row.metrics[key])
    return [float(np.mean(found)) for found in values.values() if len(found) == len(categories)]


def _difference(pairs: Sequence[tuple[Row, Row]], key: str, part: str, category: str) -> Difference:
    values: dict[str, list[float]] = {}
    draws: dict[str, list[np.ndarray]] = {}
    for row, other in pairs:
        name = row.cell.category
        # metrics carry 6 decimals: rounding here makes equal differences equal, which ranks ask for
        values.setdefault(name, []).append(round(row.metrics[key] - other.metrics[key], 6))
        if key in row.draws and key in other.draws and len(row.draws[key]) == len(other.draws[key]):
            draws.setdefault(name, []).append(row.draws[key] - other.draws[key])
    value = float(np.mean([np.mean(found) for found in values.values()]))
    complete = {name: len(found) for name, found in draws.items()} == {n: len(found) for n, found in values.items()}
    generator = numpy_generator(0, "study", part, category, key)
    return Difference(
        value=value,
        interval=bootstrap_difference(value, list(draws.values()), generator) if complete else None,
        test=paired_test([one for found in values.values() for one in found]),
    )
