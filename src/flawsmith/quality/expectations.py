"""The one module that meets Great Expectations: it checks the rules and draws the page of its Data Docs.

Nothing is stored and nothing leaves the machine: the context lives in memory and analytics are off. The page is freed
of everything that it would load from the network, of times and of random ids: the same measures give the same bytes.
"""

import json
import math
import os
import re
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

ID = "triplet_id"
STYLE = Path(__file__).with_name("data_docs.css")


def check(frame: pd.DataFrame, suite: Sequence[Rule], page: Path, ddpm: str | None = None) -> Verdict:
    """Check every rule on the measures, one row a triplet, and write the result as an HTML page.

    `ddpm` says in words whether the DDPM was ready. The verdict rests on the worst severity that failed. The
    checkpoint's own `success` is not used: it is False as well where only a warning failed.
    """
    with _quiet():
        result = _validate(frame, suite)
        text = _draw_page(result)
    worst = result.get_max_severity_failure()
    reported: Severity | None = None
    if worst is not None:
        reported = "critical" if str(worst.value) == "critical" else "warning"
    by_name = {_rule_name(item): item for item in result.results}
    verdict = decide([_outcome(rule, by_name[rule.name], frame) for rule in suite], len(frame), reported)
    verdict = replace(verdict, ddpm=ddpm)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(tidy_page(text, STYLE.read_text(), _headline(verdict)), encoding="utf-8")
    return verdict


def _validate(frame: pd.DataFrame, suite: Sequence[Rule]) -> "ExpectationSuiteValidationResult":
    import great_expectations as gx
    from great_expectations.data_context.types.base import ProgressBarsConfig

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False, metric_calculations=False)
    asset = context.data_sources.add_pandas("synthesize").add_dataframe_asset("measures")
    batch = asset.add_batch_definition_whole_dataframe("every triplet").get_batch({"dataframe": frame})
    return batch.validate(
        gx.ExpectationSuite(name="triplets", expectations=[_expectation(rule) for rule in suite]),
        result_format={"result_format": "COMPLETE", "unexpected_index_column_names": [ID]},
    )


def _expectation(rule: Rule) -> "Expectation":
    from great_expectations import expectations as gxe

    bounds = [
        f"{word} {bound:g}" for word, bound in (("at least", rule.low), ("at most", rule.high)) if bound is not None
    ]
    share = f" for {100 * rule.mostly:g} % of the triplets" if rule.mostly < 1 else ""
    shared: dict[str, Any] = {
        "severity": rule.severity,
        "meta": {"rule": rule.name},
        "description": "; ".join([f"{rule.name} ({rule.severity}): {rule.meaning}", *bounds]) + share,
    }
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


def _rule_name(result: Any) -> str:
    return str(result.expectation_config.meta["rule"])


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


def _draw_page(result: "ExpectationSuiteValidationResult") -> str:
    from great_expectations.core.expectation_validation_result import expectationSuiteValidationResultSchema
    from great_expectations.render.renderer import ValidationResultsPageRenderer
    from great_expectations.render.view import DefaultJinjaPageView

    plain = json.loads(json.dumps(result.to_json_dict()))  # no numpy numbers, which cannot be drawn
    document = ValidationResultsPageRenderer().render(expectationSuiteValidationResultSchema.load(plain))
    return str(DefaultJinjaPageView().render(document))


def _headline(verdict: Verdict) -> str:
    state = {None: "passed", "warning": "passed with warnings", "critical": "failed"}[verdict.severity]
    return (
        f'<h1>Triplet quality: {state}</h1>\n<p class="lead">{verdict.triplets} triplets. A critical failure stops the '
        f"pipeline before anything is trained; a warning does not. {escape(verdict.ddpm or '')}</p>"
    )


_STRIPPED = (
    re.compile(r"<script\b.*?</script>", re.IGNORECASE | re.DOTALL),  # all lean on remote libraries
    re.compile(r"<footer\b.*?</footer>", re.IGNORECASE | re.DOTALL),  # newsletter and tutorials
    # ways to other pages, of which there are none
    re.compile(r'<nav class="navbar navbar-expand.*?</nav>.*?</nav>', re.IGNORECASE | re.DOTALL),
    re.compile(r'<a href="\.\./[^>]*>(?=\w*</a>)'),
    re.compile(r"<link\b[^>]*>", re.IGNORECASE),
    re.compile(r"<img\b[^>]*>", re.IGNORECASE),  # logos, one of which counts views
    re.compile(r"background:\s*url\([^)]*\)[^;]*;", re.IGNORECASE),
    re.compile(r"(?: / )?\b\d{4}-?\d\d-?\d\dT\d\d:?\d\d:?\d\d(?:\.\d+)?(?:Z|\+00:00)?"),  # times
)
_UUID = re.compile(r"\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b")


def tidy_page(text: str, style: str, headline: str = "") -> str:
    """Free a page of scripts, remote content, times and random ids; give it `style` (CSS) and a `headline` (HTML)."""
    for pattern in _STRIPPED:
        text = pattern.sub("", text)
    names: dict[str, str] = {}
    text = _UUID.sub(lambda match: names.setdefault(match.group(), f"n{len(names)}"), text)
    text = text.replace("</head>", f"<style>\n{style}</style>\n</head>", 1)
    return text.replace("<body>", f"<body>\n{headline}", 1) if headline else text
