"""The gate as a whole: sets of triplets through the stage and Great Expectations to the report on disk."""

import re
from dataclasses import replace
from html import escape
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image
from triplet_sets import COUNT, Report, judge, make_set, settings, write_manifest

from flawsmith.errors import UserError
from flawsmith.files import digest_path
from flawsmith.layout import Layout
from flawsmith.quality.expectations import check, tidy_page
from flawsmith.quality.gate import read_manifest_ids, to_frame
from flawsmith.quality.measures import Measures
from flawsmith.quality.verdict import ddpm_rules, rules
from flawsmith.stages.validate import run

SETS = ("good", "broken", "odd", "empty")


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Report:
    return request.getfixturevalue(request.param)


def measures(report: Report) -> pd.DataFrame:
    return pd.read_parquet(report.folder / "measures.parquet").set_index("triplet_id")


def test_good_set_passes(good: Report) -> None:
    assert good.error is None
    assert good.verdict["passed"]
    assert good.verdict["severity"] is None
    assert good.verdict["triplets"] == COUNT
    assert good.failing() == {}


def test_measures_of_good_set_are_complete(good: Report) -> None:
    table = measures(good)
    assert len(table) == COUNT
    assert not table.isna().any().any()
    assert table.decodable.all()
    assert (table.change_outside == 0).all()
    assert (table.visible_share > 0.9).all()
    assert (table.duplicates == 0).all()
    assert table.ssim.between(0.5, 0.9999).all()
    assert (table.components == 1).all()


def test_each_corruption_is_named_with_its_triplets(broken: Report) -> None:
    failing = broken.failing("critical")
    unreadable = ["fit-00000", "fit-00001"]
    assert failing["on_disk"] == ["fit-00000"]
    assert failing["decodable"] == unreadable
    assert failing["size_agrees"] == ["fit-00002"]
    assert "finite" not in failing  # 8-bit files hold no NaN; what cannot be read is not said to hold any
    assert failing["mask_area"] == ["fit-00003"]
    assert failing["change_outside"] == ["fit-00003", "fit-00004"]  # an empty mask leaves the whole defect outside
    assert failing["change_inside"] == ["val-00005"]
    assert failing["duplicates"] == ["fit-00006", "fit-00008", "fit-00099", "fit-00008"]
    assert failing["in_manifest"] == ["fit-00007"]
    assert failing["triplet_id_unique"] == ["fit-00008", "fit-00008"]
    assert failing["mask_area_measured"] == [*unreadable, "fit-00002"]
    assert failing["change_inside_measured"] == [*unreadable, "fit-00002", "fit-00003"]


def test_broken_set_stops_the_pipeline(broken: Report) -> None:
    assert broken.error is not None
    assert broken.error.exit_code == 1
    assert broken.verdict["severity"] == "critical"
    assert not broken.verdict["passed"]
    message = str(broken.error)
    assert "'tile'" in message
    assert "decodable (2 of 14 triplets, e.g. fit-00000)" in message
    assert str(broken.folder / "docs" / "index.html") in message
    assert (broken.folder / "docs" / "index.html").is_file()


def test_unreadable_triplet_has_a_row_of_nan(broken: Report) -> None:
    row = measures(broken).loc["fit-00001"]
    assert not row.decodable
    assert row.on_disk
    assert row[["mask_area", "ssim", "change_inside", "duplicates"]].isna().all()


def test_warnings_alone_are_reported_but_let_through(odd: Report) -> None:
    assert odd.error is None
    assert odd.verdict["passed"]
    assert odd.verdict["severity"] == "warning"
    assert odd.failing("critical") == {}
    assert odd.failing("warning") == {
        "components": ["fit-00001", "fit-00002", "fit-00003", "fit-00004", "fit-00006", "fit-00007"]
    }


def test_empty_manifest_fails(empty: Report) -> None:
    assert empty.error is not None
    assert list(empty.failing()) == ["triplet_count"]
    assert "triplet_count (0 triplets, at least 10 are needed)" in str(empty.error)
    assert len(measures(empty)) == 0
    assert list(measures(empty).columns) == list(to_frame([]).columns[1:])


@pytest.mark.parametrize("report", SETS, indirect=True)
def test_report_is_whole_whatever_the_verdict(report: Report) -> None:
    assert sorted(path.name for path in report.folder.iterdir()) == [
        "docs", "measures.parquet", "verdict.json", "worst.png",
    ]  # fmt: skip
    with Image.open(report.folder / "worst.png") as sheet:
        sheet.verify()
    leftovers = [
        path for path in report.folder.parent.iterdir() if path.name not in ("ddpm-train", "synthesize", "validate")
    ]
    assert leftovers == []


@pytest.mark.parametrize("report", SETS, indirect=True)
def test_the_page_lists_every_rule_and_needs_no_network(report: Report) -> None:
    (page,) = (path for path in (report.folder / "docs").rglob("*") if path.is_file())
    assert page.name == "index.html"
    text = page.read_text()
    of_ddpm = ddpm_rules(report.layout.settings.validate) if report.verdict["triplets"] else ()
    for rule in (*of_ddpm, *rules(report.layout.settings.validate)):
        assert f"{rule.name} ({rule.severity}): {escape(rule.meaning, quote=False)}" in text
    assert "<style>" in text
    assert not re.search(r'https?://|<script|<img|<link|href="[^#]', text)
    assert report.verdict["ddpm"] in text


def test_the_page_names_failing_triplets(broken: Report) -> None:
    page = (broken.folder / "docs" / "index.html").read_text()
    assert "Triplet quality: failed" in page
    assert "fit-00003" in page


def test_same_measures_give_the_same_pages_quietly(
    good: Report, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    frame = pd.read_parquet(good.folder / "measures.parquet").assign(relative_distance=0.2, neighbour_ratio=1.5)
    bounds = good.layout.settings.validate
    verdict = check(
        frame, (*ddpm_rules(bounds), *rules(bounds)), tmp_path / "docs" / "index.html", good.verdict["ddpm"]
    )
    assert verdict.to_json() == good.verdict
    assert digest_path(tmp_path / "docs") == digest_path(good.folder / "docs")
    assert [path.name for path in tmp_path.iterdir()] == ["docs"]  # no home of Great Expectations
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("ddpm", "failing", "severity"),
    [
        ((1.55, 0.4), ["ddpm_not_noise", "ddpm_ready", "ddpm_novel"], "critical"),  # pure noise
        ((0.5, 0.1), ["ddpm_no_copies", "ddpm_ready", "ddpm_novel"], "critical"),  # training images repeated
        ((0.5, 1.5), ["ddpm_ready"], "warning"),
    ],
)
def test_good_triplets_of_a_ddpm_that_is_not_ready(
    tmp_path: Path, ddpm: tuple[float, float], failing: list[str], severity: str
) -> None:
    report = judge(tmp_path, ddpm=ddpm)
    assert report.verdict["severity"] == severity
    assert list(report.failing()) == failing
    assert report.verdict["ddpm"] in (report.folder / "docs" / "index.html").read_text()
    observed = {item["name"]: item["observed"] for item in report.verdict["expectations"]}
    assert (observed["ddpm_ready"], observed["ddpm_novel"]) == ddpm
    assert (report.error is not None) == (severity == "critical")
    if report.error:
        assert failing[0] in str(report.error)
        assert report.verdict["ddpm"] in str(report.error)


def test_triplets_of_no_ddpm_ask_for_no_readiness(tmp_path: Path) -> None:
    changed = replace(settings().synthesize, mixture={"own": 1.0})
    layout = Layout(replace(settings(), synthesize=changed), "tile", tmp_path)
    make_set(layout.stage("synthesize"))
    run(layout)
    assert not [item for item in Report(layout, None).verdict["expectations"] if item["name"].startswith("ddpm")]


def test_missing_inputs_are_named_with_the_stage_that_writes_them(tmp_path: Path) -> None:
    layout = Layout(settings(), "tile", tmp_path)
    with pytest.raises(UserError, match=r"manifest\.parquet does not exist; run `flawsmith synthesize"):
        run(layout)
    make_set(layout.stage("synthesize"))
    with pytest.raises(UserError, match=r"readiness\.json does not exist; run `flawsmith ddpm-train"):
        run(layout)


@pytest.mark.parametrize("content", [b"", b"PAR1 but nothing else", b"triplet_id,role\nfit-00000,fit\n"])
def test_unreadable_manifest_is_a_user_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "manifest.parquet"
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot be read as parquet"):
        read_manifest_ids(path)
    pd.DataFrame({"seed": [1, 2]}).to_parquet(path)
    with pytest.raises(UserError, match="no column `triplet_id`"):
        read_manifest_ids(path)


def test_manifest_order_is_kept(tmp_path: Path) -> None:
    ids = ["val-00002", "fit-00009", "fit-00001"]
    write_manifest(tmp_path, ids)
    assert read_manifest_ids(tmp_path / "manifest.parquet") == ids


def test_empty_and_full_frames_have_the_same_types() -> None:
    row = Measures("fit-00000", True, True, True)
    assert to_frame([]).dtypes.equals(to_frame([row, replace(row, ssim=0.5)]).dtypes)


def test_page_is_freed_of_what_differs_between_runs() -> None:
    first = (
        '<html><head><link href="https://x/y.css"></head><body><script src="https://x"></script>triplets / '
        "2026-01-02T03:04:05Z 20260102T030405.123456Z "
        '<p id=a-0fbfaf42-a557-475a-8416-93f24425b3de href="#a-0fbfaf42-a557-475a-8416-93f24425b3de">0.0314</p></body>'
    )
    second = first.replace("2026", "2027").replace("0fbfaf42", "11111111")
    assert tidy_page(first, "p{}") == tidy_page(second, "p{}")
    assert tidy_page(first, "p{}") == (
        '<html><head><style>\np{}</style>\n</head><body>triplets  <p id=a-n0 href="#a-n0">0.0314</p></body>'
    )
