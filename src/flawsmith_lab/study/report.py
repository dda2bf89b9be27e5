"""What a person reads of a study: the same tables as report.md and report.html, and the ablation curves."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flawsmith.evaluation.metrics import METRICS
from flawsmith.files import atomic_file
from flawsmith.pages import data_uri, render
from flawsmith_lab.markdown import markdown
from flawsmith_lab.study.curves import curves, curves_png, file_name, numeric_key
from flawsmith_lab.study.plan import METHODS, STAGES
from flawsmith_lab.study.results import DETECTIONS, FALSE_ALARMS, Row
from flawsmith_lab.study.statistics import ALPHA, PairedTest, Spread, spread
from flawsmith_lab.study.summary import Summary, summarise

SHOWN = {
    **{
        key: METRICS[key].title
        for key in ("image_auroc", "image_ap", "image_f1_max", "pixel_auroc", "pixel_ap", "aupro")
    },
    FALSE_ALARMS: "False alarms",
    DETECTIONS: "Found",
}
COMPARED = ("image_auroc", "pixel_auroc", "pixel_ap", "aupro")


@dataclass(frozen=True)
class About:
    """What the report says of the study itself."""

    command: str
    commit: str
    changed: bool
    reference: str
    seeds: tuple[int, ...]
    grid: Mapping[str, Sequence[object]]


@dataclass(frozen=True)
class Table:
    """Texts; the first column names the row."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Section:
    """A titled part of the report; `picture` is PNG bytes for light and for dark, and the light one's path."""

    title: str
    tables: tuple[Table, ...] = ()
    picture: tuple[bytes, bytes, str] | None = None


def write_report(out: Path, rows: Sequence[Row], about: About) -> None:
    """Write report.md, report.html and curves/*.png."""
    sections, lines = build_sections(rows, about), introduction(rows, about)
    text = ["# Study", f"```\n{about.command}\n```", *lines]
    for section in sections:
        text.append(f"## {section.title}")
        if section.picture is not None:
            with atomic_file(out / section.picture[2]) as path:
                path.write_bytes(section.picture[0])
            text.append(f"![{section.title}]({section.picture[2]})")
        for table in section.tables:
            text += [markdown(table.header, table.rows), *filter(None, [table.note])]
    page = render(
        Path(__file__).with_name("report.html"), {"uri": data_uri}, sections=sections, lines=lines, about=about
    )
    for name, content in (("report.md", "\n\n".join(text) + "\n"), ("report.html", page)):
        with atomic_file(out / name) as path:
            path.write_text(content, encoding="utf-8")


def introduction(rows: Sequence[Row], about: About) -> tuple[str, ...]:
    """Say how the figures came about and how to read them."""
    failed = sum(not row.is_done for row in rows)
    methods = dict.fromkeys(row.cell.method for row in rows)
    return (
        f"{len(rows)} cells, {failed} of them without a result; seeds {', '.join(map(str, about.seeds))}; "
        f"commit {about.commit[:12]}{' with changed files' if about.changed else ''}.",
        "Methods: " + "; ".join(f"{name}: {METHODS[name].meaning}" for name in methods) + ".",
        "Values are means over seeds ± the sample standard deviation; over all categories, of each seed's mean over "
        f"them. Differences are to {about.reference} with the same category and seed. The interval (95 %) comes from a "
        "bootstrap over test images paired between the two rows; the seeds' intervals are averaged, since all seeds "
        "share the images. t and Wilcoxon test the pairs of category and seed: whether a difference outlives the "
        "randomness of training on these very images and categories, not whether it would hold on others. Nothing is "
        "corrected for the number of comparisons.",
    )


def build_sections(rows: Sequence[Row], about: About) -> tuple[Section, ...]:
    """Results a part and category, ablation curves, costs, failures."""
    summaries = summarise(rows, about.reference)
    sections = []
    for part, category in dict.fromkeys((one.part, one.category) for one in summaries):
        here = [one for one in summaries if (one.part, one.category) == (part, category)]
        sections.append(Section(_title(part, category), tuple(_result_tables(here, about))))
    key = numeric_key(about.grid)
    for part, category in dict.fromkeys((row.cell.part, row.cell.category) for row in rows) if key else ():
        lines = curves([row for row in rows if (row.cell.part, row.cell.category) == (part, category)], key or "")
        if lines:
            title = f"{key}: {_title(part, category)}"
            light, dark = (curves_png(lines, key or "", title, shade) for shade in (False, True))
            sections.append(Section(title, (), (light, dark, f"curves/{file_name(part, category, key or '')}")))
    sections.append(Section("Time and memory", (_cost_table(rows),)))
    failures = tuple(
        (f"{row.cell.category}: {row.cell.label}, seed {row.cell.seed}, {row.cell.part}", row.failed_stage, row.failure)
        for row in rows
        if not row.is_done
    )
    if failures:
        sections.append(Section("Cells without a result", (Table(("Cell", "Stage", "Reason"), failures),)))
    return tuple(sections)


def _title(part: str, category: str) -> str:
    images = "all test images" if part == "all" else f"{part} half of the test images"
    return f"{category or 'Over all categories'}, {images}"


def _result_tables(summaries: Sequence[Summary], about: About) -> list[Table]:
    values = tuple(
        (
            one.label + (f" ({one.missing} cells missing)" if one.missing else ""),
            *(_spread(one.metrics[key]) for key in SHOWN),
        )
        for one in summaries
    )
    note = "False alarms and Found: shares of good and defective images flagged."
    tables = [Table(("Row", *SHOWN.values()), values, note)]
    differences = tuple(
        (
            one.label,
            SHOWN[key],
            _signed(found.value),
            "n/a" if found.interval is None else f"{_signed(found.interval.low)} to {_signed(found.interval.high)}",
            _probability(found.test.t),
            _probability(found.test.wilcoxon),
            str(found.test.n),
        )
        for one in summaries
        for key in COMPARED
        if (found := one.differences.get(key)) is not None
    )
    if differences:
        tests = [found.test for one in summaries for found in one.differences.values()]
        header = ("Row", "Metric", f"Minus {about.reference}", "95 % over images", "p (t)", "p (Wilcoxon)", "Pairs")
        tables.append(Table(header, differences, power_note(tests)))
    defects = list(dict.fromkeys(name for one in summaries for name in one.by_defect))
    if defects:
        shares = tuple(
            (one.label, *(_spread(one.by_defect[name]) if name in one.by_defect else "" for name in defects))
            for one in summaries
        )
        tables.append(Table(("Image AUROC by defect", *defects), shares))
    return tables


def power_note(tests: Sequence[PairedTest]) -> str:
    """Say so where there are too few pairs for any result to be significant."""
    fewest = min(tests, key=lambda test: test.n)
    if fewest.can_be_significant:
        return ""
    if fewest.n < 2:
        return "With fewer than 2 pairs of (category, seed) there is no test; run more seeds or categories."
    return (
        f"With {fewest.n} pairs Wilcoxon's p cannot fall below {fewest.smallest:.3g}, so "
        f"it cannot show p < {ALPHA:g} whatever the difference; that takes 6 pairs. The t test can, but rests on "
        "normal differences, which so few cannot show."
    )


def _cost_table(rows: Sequence[Row]) -> Table:
    stages = [stage for stage in STAGES if any(stage in row.costs for row in rows)]
    found = []
    for category, label in dict.fromkeys((row.cell.category, row.cell.label) for row in rows if row.is_done):
        mine = [row for row in rows if (row.cell.category, row.cell.label) == (category, label) and row.is_done]
        costs = {stage: [row.costs[stage] for row in mine if stage in row.costs] for stage in stages}
        cells = [_cost([cost["seconds"] for cost in of], [cost["peak_mb"] for cost in of]) for of in costs.values()]
        total = _cost([row.seconds for row in mine], [row.peak_mb for row in mine])
        found.append((f"{category}: {label}", *cells, total))
    all_costs = [cost for row in rows for cost in row.costs.values()]
    devices, threads = (
        ", ".join(dict.fromkeys(str(cost[key]) for cost in all_costs if cost[key])) for key in ("device", "threads")
    )
    resumed = any(cost["resumed"] for cost in all_costs)
    note = (
        "Mean seconds of a stage over seeds (process start included) and its highest resident memory in MiB; a stage "
        "that rows share counts in full in each, so a row's sum is what it would cost alone. "
        f"Device: {devices or 'none'}; threads: {threads or 'none'}."
        + (" A stage went on from a checkpoint; its seconds lack what was done before." if resumed else "")
    )
    return Table(("Row", *stages, "sum"), tuple(found), note)


def _cost(seconds: Sequence[float], megabytes: Sequence[float]) -> str:
    return f"{spread(seconds).mean:.1f} s, {max(megabytes):.0f} MB" if seconds else ""


def _spread(value: Spread) -> str:
    if value.n == 0:
        return "n/a"
    return f"{value.mean:.3f}" + ("" if math.isnan(value.deviation) else f" ± {value.deviation:.3f}")


def _signed(value: float) -> str:
    text = f"{value:+.3f}"
    return "0.000" if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}")


def _probability(value: float) -> str:
    if math.isnan(value):
        return "n/a"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
