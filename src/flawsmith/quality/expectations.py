"""The one module that meets Great Expectations: rules become a suite, a checkpoint checks it and writes Data Docs.

The context lives in a temporary folder and nothing leaves the machine: analytics are off, and the pages are freed of
everything that they would load from the network. They are also freed of times and random ids: the same measures give
the same pages, byte for byte.
"""

import math
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from flawsmith.quality.verdict import Outcome, Rule, Severity, Verdict, decide

if TYPE_CHECKING:
    from great_expectations.core import ExpectationSuiteValidationResult
    from great_expectations.expectations.expectation import Expectation

SUITE = "triplets"
ID = "triplet_id"
STYLE = Path(__file__).with_name("data_docs.css")


def check(frame: pd.DataFrame, suite: Sequence[Rule], docs: Path, ddpm: str | None = None) -> Verdict:
    """Check every rule on the measures, one row a triplet, and write the Data Docs to the new folder `docs`.

    `ddpm` says in words whether the DDPM was ready. The verdict rests on the worst severity that failed. The
    checkpoint's own `success` is not used: it is False as well where only a warning failed.
    """
    with _quiet(), tempfile.TemporaryDirectory(prefix="flawsmith-gx-") as home:
        result = _run_checkpoint(frame, suite, home)
        shutil.copytree(Path(home, "gx", "uncommitted", "data_docs", "local_site"), docs)
        _tidy_pages(docs)
        worst = result.get_max_severity_failure()
        by_name = {item.expectation_config.meta["rule"]: item for item in result.results}
    reported: Severity | None = None
    if worst is not None:
        reported = "critical" if str(worst.value) == "critical" else "warning"
    verdict = decide([_outcome(rule, by_name[rule.name], frame) for rule in suite], len(frame), reported)
    verdict = replace(verdict, ddpm=ddpm)
    _write_index(docs, verdict)
    return verdict


def _run_checkpoint(frame: pd.DataFrame, suite: Sequence[Rule], home: str) -> "ExpectationSuiteValidationResult":
    import great_expectations as gx
    from great_expectations.checkpoint.actions import UpdateDataDocsAction
    from great_expectations.data_context.types.base import ProgressBarsConfig

    context = gx.get_context(mode="file", project_root_dir=home)  # Data Docs need a file context
    context.variables.progress_bars = ProgressBarsConfig(globally=False, metric_calculations=False)
    asset = context.data_sources.add_pandas("synthesize").add_dataframe_asset("measures")
    expectations = context.suites.add(gx.ExpectationSuite(name=SUITE))
    for rule in suite:
        expectations.add_expectation(_expectation(rule))
    definition = context.validation_definitions.add(
        gx.ValidationDefinition(
            name=SUITE, data=asset.add_batch_definition_whole_dataframe("every triplet"), suite=expectations
        )
    )
    checkpoint = context.checkpoints.add(
        gx.Checkpoint(
            name=SUITE,
            validation_definitions=[definition],
            actions=[UpdateDataDocsAction(name="data docs")],
            result_format={"result_format": "COMPLETE", "unexpected_index_column_names": [ID]},
        )
    )
    (result,) = checkpoint.run(batch_parameters={"dataframe": frame}).run_results.values()
    return result


def _expectation(rule: Rule) -> "Expectation":
    from great_expectations import expectations as gxe

    shared: dict[str, Any] = {"severity": rule.severity, "meta": {"rule": rule.name}}
    if rule.kind == "row count":
        return gxe.ExpectTableRowCountToBeBetween(min_value=rule.low, max_value=rule.high, **shared)
    if rule.kind == "of all":  # the same in every row
        return gxe.ExpectColumnMaxToBeBetween(column=rule.column, min_value=rule.low, max_value=rule.high, **shared)
    shared |= {"column": rule.column, "mostly": rule.mostly}
    if rule.kind == "unique":
        return gxe.ExpectColumnValuesToBeUnique(**shared)
    if rule.kind == "true":
        return gxe.ExpectColumnValuesToBeInSet(value_set=[True], **shared)
    if rule.kind == "not null":
        return gxe.ExpectColumnValuesToNotBeNull(**shared)
    return gxe.ExpectColumnValuesToBeBetween(min_value=rule.low, max_value=rule.high, **shared)


def _outcome(rule: Rule, result: Any, frame: pd.DataFrame) -> Outcome:
    failing = tuple(str(item[ID]) for item in result.result.get("unexpected_index_list") or ())
    observed: float | tuple[float, float] | None = None
    if rule.kind == "row count":
        observed = len(frame)
    elif rule.kind == "of all":
        observed = float(frame[rule.column].iloc[0]) if len(frame) else None
    elif rule.kind == "range":
        low, high = float(frame[rule.column].min()), float(frame[rule.column].max())
        observed = None if math.isnan(low) else (low, high)
    return Outcome(rule, bool(result.success), failing, observed)


@contextmanager
def _quiet() -> Iterator[None]:
    """No analytics, and no warnings about Great Expectations' own dependencies."""
    os.environ["GX_ANALYTICS_ENABLED"] = "false"  # read when great_expectations is imported, hence before it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


_STRIPPED = (
    re.compile(r"<script\b.*?</script>", re.IGNORECASE | re.DOTALL),  # all lean on remote libraries
    re.compile(r"<footer\b.*?</footer>", re.IGNORECASE | re.DOTALL),  # newsletter and tutorials
    re.compile(r"<link\b[^>]*>", re.IGNORECASE),
    re.compile(r"<img\b[^>]*>", re.IGNORECASE),  # logos, one of which counts views
    re.compile(r"background:\s*url\([^)]*\)[^;]*;", re.IGNORECASE),
)


_TIME = re.compile(r"(?: / )?\b\d{4}-?\d\d-?\d\dT\d\d:?\d\d:?\d\d(?:\.\d+)?(?:Z|\+00:00)?")
_UUID = re.compile(r"\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b")
VALIDATION = f"validations/{SUITE}.html"


def _tidy_pages(docs: Path) -> None:
    """Bring the pages to fixed places and free them of scripts, remote content, times and random ids."""
    shutil.rmtree(docs / "static", ignore_errors=True)  # megabytes of fonts and tutorial pictures
    (validation,) = (docs / "validations").rglob("*.html")  # below a folder named by the time
    up = "../" * len(validation.relative_to(docs).parent.parts)
    text = validation.read_text(encoding="utf-8").replace(up, "../")
    shutil.rmtree(docs / "validations")
    (docs / VALIDATION).parent.mkdir()
    (docs / VALIDATION).write_text(text, encoding="utf-8")
    for page in sorted(docs.rglob("*.html")):
        page.write_text(tidy_page(page.read_text(encoding="utf-8"), STYLE.read_text()), encoding="utf-8")


def tidy_page(text: str, style: str) -> str:
    """A page without scripts, remote content, times and random ids, with `style` (CSS) instead of what it linked."""
    for pattern in (*_STRIPPED, _TIME):
        text = pattern.sub("", text)
    names: dict[str, str] = {}
    text = _UUID.sub(lambda match: names.setdefault(match.group(), f"n{len(names)}"), text)
    return text.replace("</head>", f"<style>\n{style}</style>\n</head>", 1)


def _write_index(docs: Path, verdict: Verdict) -> None:
    """Replace the index, whose tables need scripts, by the verdict with links to the pages of Great Expectations."""
    rows = "".join(_index_row(outcome) for outcome in verdict.outcomes)
    state = {None: "passed", "warning": "passed with warnings", "critical": "failed"}[verdict.severity]
    (docs / "index.html").write_text(
        f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Triplet quality: {state}</title><style>
{STYLE.read_text()}</style></head><body>
<h1>Triplet quality: {state}</h1>
<p class="lead">{verdict.triplets} triplets. A critical failure stops the pipeline before anything is trained;
a warning does not. {escape(verdict.ddpm or "")} <a href="{VALIDATION}">Validation result</a>,
<a href="expectations/{SUITE}.html">expectation suite {SUITE}</a>.</p>
<table><tr><th></th><th>expectation</th><th>severity</th><th>demand</th><th>bounds</th><th>must hold for</th>
<th>observed</th><th>failing triplets</th></tr>
{rows}</table></body></html>
""",
        encoding="utf-8",
    )


def _index_row(outcome: Outcome) -> str:
    rule = outcome.rule
    mark = "success" if outcome.passed else "danger" if rule.severity == "critical" else "warning"
    style = {"success": "", "danger": ' class="failed"', "warning": ' class="warned"'}[mark]
    bounds = {
        (False, False): "",
        (True, False): f"at least {rule.low}",
        (False, True): f"at most {rule.high}",
        (True, True): f"{rule.low} to {rule.high}",
    }[rule.low is not None, rule.high is not None]
    if isinstance(outcome.observed, tuple):
        observed = " to ".join(f"{value:.4g}" for value in outcome.observed)
    else:
        observed = "" if outcome.observed is None else f"{outcome.observed:.4g}"
    ids = ", ".join(outcome.failing_ids[:5]) + (", ..." if len(outcome.failing_ids) > 5 else "")
    failing = f"{len(outcome.failing_ids)}: {ids}" if outcome.failing_ids else ""
    cells = [rule.name, rule.severity, rule.meaning, bounds, f"{100 * rule.mostly:g} %", observed, failing]
    return (
        f'<tr{style}><td><i class="fas text-{mark}"></i></td>{"".join(f"<td>{escape(x)}</td>" for x in cells)}</tr>\n'
    )
