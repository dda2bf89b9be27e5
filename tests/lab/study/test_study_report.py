"""From rows to what people read: summaries, tables, curves, files. Rows are made by hand."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from study_samples import make_row

from flawsmith.evaluation.assess import KEYS
from flawsmith_lab.study.curves import as_number, curves, numeric_key
from flawsmith_lab.study.report import About, build_sections, write_report
from flawsmith_lab.study.results import write_results
from flawsmith_lab.study.summary import ALL, reference_of, summarise

METRICS = st.lists(st.floats(0, 1).map(lambda value: round(value, 6)), min_size=2, max_size=5)


def about(grid=None):
    return About("flawsmith study --out <here> | tee", "0123456789abcdef", True, "patchcore", (0, 1), grid or {})


def pairs(differences, category="tiles", draws=False):
    """Rows of flawsmith and patchcore that differ by `differences`, a seed each; draws differ by the same."""
    found = []
    for seed, difference in enumerate(differences):
        noise = np.random.default_rng(seed).normal(0, 0.01, 200)
        for method, value in (("flawsmith", 0.5 + difference), ("patchcore", 0.5)):
            shown = value + noise if draws else None
            found.append(make_row(value, category=category, method=method, seed=seed, draws=shown))
    return found


def one(rows, label="flawsmith", category="tiles", reference="patchcore"):
    return next(item for item in summarise(rows, reference) if (item.label, item.category) == (label, category))


def test_the_difference_is_the_mean_of_the_pairs_and_the_reference_has_none():
    rows = pairs([0.1, 0.2, 0.3], draws=True)
    found = one(rows).differences["image_auroc"]
    assert (found.value, found.test.n) == (pytest.approx(0.2), 3)
    assert one(rows, "patchcore").differences == {}
    # the noise is the same for both rows, so pairing leaves nothing but the difference
    assert found.interval is not None
    assert (found.interval.low, found.interval.high) == pytest.approx((0.2, 0.2))
    rows[0] = make_row(0.6, seed=0)  # without shared images there is no interval
    assert one(rows).differences["image_auroc"].interval is None


def test_a_row_that_is_the_reference_s_equal_has_p_1_in_every_metric():
    for key, found in one(pairs([0.0, 0.0, 0.0], draws=True)).differences.items():
        assert key in KEYS
        assert (found.value, found.test.t, found.test.wilcoxon) == (0.0, 1.0, 1.0)
        assert found.interval == (0.0, 0.0, 0.0)


@given(METRICS, METRICS)
def test_over_categories_each_weighs_the_same_and_each_seed_is_one_value(first, second):
    rows = [make_row(value, seed=seed) for seed, value in enumerate(first)]
    mine = one(rows, reference="flawsmith").metrics["aupro"]
    assert (mine.mean, mine.deviation) == pytest.approx((np.mean(first), np.std(first, ddof=1)))
    assert {item.category for item in summarise(rows, "patchcore")} == {"tiles"}
    rows += [make_row(value, seed=seed, category="bolts") for seed, value in enumerate(second)]
    found = one(rows, category=ALL, reference="flawsmith").metrics["pixel_ap"]
    expected = [(a + b) / 2 for a, b in zip(first, second, strict=False)]
    assert found.n == len(expected)  # a seed that a category lacks would compare unlike with unlike
    assert found.mean == pytest.approx(np.mean(expected))


def test_over_categories_pairs_are_of_category_and_seed():
    rows = pairs([0.1, 0.2], "tiles", draws=True) + pairs([0.3, 0.4], "bolts", draws=True)
    found = one(rows, category=ALL).differences["pixel_ap"]
    assert (found.test.n, found.value) == (4, pytest.approx(0.25))
    assert found.interval is not None


def test_a_failed_cell_is_missing_and_pairs_with_nothing():
    rows = pairs([0.1, 0.2])
    rows[0] = make_row(seed=0, failure="the gate said no")
    found = one(rows)
    assert (found.missing, found.differences["image_auroc"].test.n) == (1, 1)
    rows[3] = make_row(seed=1, method="patchcore", failure="too")
    assert one(rows).differences == {}


def test_the_reference_shares_part_category_seed_and_the_grid_it_depends_on():
    row = make_row(grid={"teacher.backbone": "a", "distill.batch": 2}, seed=1)
    right = {"method": "patchcore", "grid": {"teacher.backbone": "a"}, "seed": 1}
    wrong = ({"grid": {"teacher.backbone": "b"}}, {"seed": 0}, {"part": "report"}, {"category": "bolts"})
    others = [make_row(**right | change) for change in wrong]
    assert reference_of(row, others, "patchcore") is None
    found = make_row(**right)
    assert reference_of(row, [*others, found], "patchcore") is found
    named = make_row(grid={"teacher.backbone": "b", "distill.batch": 3}, seed=1)
    assert reference_of(row, [named], named.cell.label) is named


def test_results_are_json_and_a_flat_table_and_a_failed_cell_has_its_reason(tmp_path):
    rows = [*pairs([0.1]), make_row(seed=1, grid={"distill.batch": 2, "synthesize.area": [0.1, 0.2]}, failure="no")]
    write_results(tmp_path, rows, "abc", False)
    content = json.loads((tmp_path / "results.json").read_text())
    asked = {"category", "method", "seed", "part", *KEYS, "false_alarm_rate", "seconds", "peak_mb", "commit",
             "detector"}  # fmt: skip
    assert all(asked <= set(row) for row in content)
    assert content[0]["image_auroc_by_defect"] == {"dent": 0.9}
    assert (content[0]["seconds"], content[0]["peak_mb"]) == (5.0, 300.0)  # a sum and a peak over stages
    assert [content[2][key] for key in ("image_auroc", "failed_stage", "failure")] == [None, "validate", "no"]
    frame = pd.read_parquet(tmp_path / "results.parquet")
    assert frame["image_auroc"][0] == pytest.approx(0.6)
    assert math.isnan(frame["image_auroc"][2])
    assert frame["grid_distill.batch"][2] == 2
    assert json.loads(frame["grid_synthesize.area"][2]) == [0.1, 0.2]
    assert list(frame["seconds_distill"]) == [3.0, 3.0, 3.0]


@pytest.mark.parametrize(
    ("differences", "words"),
    [
        ([0.1], "there is no test; run more seeds"),
        ([0.1, 0.2, 0.3], "With 3 pairs Wilcoxon's p cannot fall below 0.25"),
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], ""),
    ],
)
def test_the_report_says_that_too_few_pairs_cannot_be_significant(tmp_path, differences, words):
    write_report(tmp_path, pairs(differences), about())
    text = (tmp_path / "report.md").read_text()
    assert words in text
    assert ("With" in text.partition("Methods")[2]) == bool(words)


def test_the_report_shows_values_differences_costs_and_failures(tmp_path):
    rows = [*pairs([0.1, 0.2], draws=True), make_row(seed=2, failure="too few | triplets")]
    write_report(tmp_path, rows, about())
    text = (tmp_path / "report.md").read_text()
    assert "| flawsmith (1 cells missing) | 0.650 ± 0.071 |" in text
    assert "| flawsmith | Image AUROC | +0.150 | +0.150 to +0.150 |" in text
    assert "| tiles: flawsmith | 2.0 s, 100 MB | 3.0 s, 300 MB | 5.0 s, 300 MB |" in text
    assert "| tiles: flawsmith, seed 2, all | validate | too few \\| triplets |" in text
    page = (tmp_path / "report.html").read_text()
    assert "&lt;here&gt;" in page
    assert "0.650 ± 0.071" in page
    for section in build_sections(rows, about()):
        for table in section.tables:
            assert {len(row) for row in table.rows} == {len(table.header)}


@pytest.mark.parametrize(
    ("value", "number"),
    [(2, 2), ("1e-3", 0.001), ([0.1, 0.3], 0.2), (True, None), ("own", None), ([], None), ([[1]], None)],
)
def test_where_a_value_lies_on_the_axis(value, number):
    assert as_number(value) == (None if number is None else pytest.approx(number))


def test_the_axis_is_the_only_numeric_key_with_several_values():
    assert numeric_key({"a.b": (1, 2), "c.d": ("x", "y"), "e.f": (3,)}) == "a.b"
    assert numeric_key({"a.b": (1, 2), "c.d": (3, 4)}) is None
    assert numeric_key({}) is None


def test_curves_are_drawn_for_each_category_and_part(tmp_path):
    grid = {"distill.batch": (2, 4)}
    rows = [
        make_row(0.5 + place / 10, seed=seed, grid={"distill.batch": place}, category=category)
        for place in grid["distill.batch"]
        for seed in (0, 1)
        for category in ("tiles", "bolts")
    ]
    rows += [make_row(0.4, method="patchcore", seed=seed) for seed in (0, 1)]
    lines = curves([row for row in rows if row.cell.category == "tiles"], "distill.batch")
    assert {label: set(places) for label, places in lines.items()} == {"flawsmith": {2, 4}, "patchcore": {None}}
    assert [row.metrics["aupro"] for row in lines["flawsmith"][2]] == [0.7, 0.7]
    write_report(tmp_path, rows, about(grid=grid))
    pictures = sorted(path.name for path in (tmp_path / "curves").iterdir())
    assert pictures == ["all-bolts-distill.batch.png", "all-tiles-distill.batch.png"]
    for name in pictures:
        with Image.open(tmp_path / "curves" / name) as picture:
            assert picture.width > 1000
        assert f"](curves/{name})" in (tmp_path / "report.md").read_text()
