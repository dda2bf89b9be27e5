"""`flawsmith monitor`: folders of new images in, a verdict, an exit status and three files out."""

import csv
import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from monitoring_samples import part

from flawsmith import cli, pages
from flawsmith.data.images import write_png
from flawsmith.detector.teacher import Teacher
from flawsmith.errors import UserError
from flawsmith.inference.predictor import Predictor
from flawsmith.layout import Layout
from flawsmith.monitoring.config import MonitorSettings
from flawsmith.monitoring.folder import MonitorOutcome, Watcher, monitor_folder
from flawsmith.monitoring.reference import Measurement, save_reference
from flawsmith.monitoring.report import plane

Watch = Callable[..., MonitorOutcome]
Shoot = Callable[..., Path]


@pytest.fixture
def drawn() -> None:
    """Asked for by a test that needs the figures themselves."""


@pytest.fixture(autouse=True)
def _undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures take seconds and decide nothing, so that most tests do without."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(pages, "figure_png", lambda _figure: b"")


@pytest.fixture
def watch(
    predictor: Predictor, teacher: Teacher, reference: Measurement, settings: MonitorSettings, tmp_path: Path
) -> Watch:
    """Watch a folder with cheaper settings; keywords change them."""

    def run(folder: Path, out: str = "out", **changes: int) -> MonitorOutcome:
        chosen = replace(settings, **{"gallery": 3, "permutations": 399, **changes})
        return monitor_folder(Watcher(predictor, teacher, reference, "plate version 1"), folder, tmp_path / out, chosen)

    return run


@pytest.mark.parametrize(("light", "defects", "status"), [(1.0, 0, 0), (0.85, 0, 3), (1.0, 8, 0)])
def test_less_light_is_drift_and_bad_parts_are_none(
    watch: Watch, shoot: Shoot, light: float, defects: int, status: int
) -> None:
    outcome = watch(shoot("new", 40, light=light, defects=defects))
    assert outcome.exit_code == status
    assert outcome.report.verdict == ("drift" if status else "no drift")
    assert ("brightness" in outcome.report.reason) == (light < 1)
    assert outcome.report.flagged_images == defects


def test_the_outputs_tell_the_same(watch: Watch, shoot: Shoot, tmp_path: Path) -> None:
    folder = shoot("new", 30, defects=2)
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "notes.txt").write_text("not looked at")
    found = watch(folder).report
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["drift.json", "report.html", "scores.csv"]

    content = json.loads((out / "drift.json").read_text())
    assert content["verdict"] == found.verdict
    assert content["model"] == "plate version 1"
    assert [item["name"] for item in content["statistics"]] == [item.name for item in found.statistics]
    assert content["files"]["found"] == content["files"]["looked_at"] == 33
    assert [item["file"] for item in content["files"]["unreadable"]] == ["broken.png"]
    assert content["flagged"]["images"] == 2

    rows = list(csv.DictReader((out / "scores.csv").read_text().splitlines()))
    assert [row["file"] for row in rows] == sorted(row["file"] for row in rows)
    verdicts = [row["verdict"] for row in rows]
    assert [verdicts.count(kind) for kind in ("good", "defective", "unreadable")] == [30, 2, 1]
    assert "cannot be read" in rows[-1]["error"]

    page = (out / "report.html").read_text()
    assert page.count('<article class="card">') == 3
    assert page.index("030-bad.png") < page.index("judged good</span>")  # the highest score comes first
    assert "1 file(s) could not be read" in page


def test_no_place_and_no_time_is_told(drawn: None, watch: Watch, shoot: Shoot, tmp_path: Path) -> None:
    folder = shoot("new", 25)
    (folder / "broken.png").write_bytes(b"no image")
    watch(folder, "first")
    watch(folder, "second")
    for name in ("drift.json", "report.html", "scores.csv"):
        content = (tmp_path / "first" / name).read_bytes()
        assert len(content) > (100_000 if name.endswith(".html") else 500)
        assert content == (tmp_path / "second" / name).read_bytes()
        assert str(tmp_path).encode() not in content


def test_of_a_large_folder_a_sample_is_looked_at(watch: Watch, shoot: Shoot, tmp_path: Path) -> None:
    folder = shoot("new", 60)
    outcome = watch(folder, max_images=25)
    assert outcome.report.images == 25
    assert outcome.watched.files_found == 60
    assert "drawn at random from 60 files" in (tmp_path / "out" / "report.html").read_text()
    names = outcome.watched.current.names.tolist()
    assert names == sorted(names) != sorted(path.name for path in folder.iterdir())[:25]
    assert watch(folder, max_images=25).watched.current.names.tolist() == names


def test_names_that_are_no_text_are_written_all_the_same(watch: Watch, shoot: Shoot, tmp_path: Path) -> None:
    folder = shoot("new", 22)
    odd = folder.as_posix().encode() + b"/b\xe4d.png"
    Path(odd.decode("utf-8", "surrogateescape")).write_bytes((folder / "000.png").read_bytes())
    assert watch(folder).report.images == 23
    assert "b\N{REPLACEMENT CHARACTER}d.png" in (tmp_path / "out" / "scores.csv").read_text(encoding="utf-8")


def test_hostile_names_stay_text(watch: Watch, shoot: Shoot, tmp_path: Path) -> None:
    folder = shoot("new", 22)
    write_png(folder / "<script>alert(1)<.png", part(5, defect=True))
    watch(folder)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


@pytest.mark.parametrize("broken", [0, 5])
def test_too_few_readable_images_leave_nothing(watch: Watch, shoot: Shoot, tmp_path: Path, broken: int) -> None:
    folder = shoot("new", 19)
    for index in range(broken):
        (folder / f"broken{index}.png").write_bytes(b"")
    with pytest.raises(UserError, match="Only 19 new images can be read"):
        watch(folder)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_broken_images_is_refused(watch: Watch, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "a.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="None of the 1 images"):
        watch(tmp_path / "new")


def test_a_folder_of_other_things_is_not_replaced(watch: Watch, shoot: Shoot, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match=r"such as thesis\.tex"):
        watch(shoot("new", 22))
    assert (tmp_path / "out" / "thesis.tex").read_text() == "precious"


def test_earlier_results_are_replaced(watch: Watch, shoot: Shoot, tmp_path: Path) -> None:
    watch(shoot("dark", 25, light=0.7))
    watch(shoot("new", 25))
    assert json.loads((tmp_path / "out" / "drift.json").read_text())["drifted"] is False


def test_the_plane_keeps_two_clouds_apart() -> None:
    generator = np.random.default_rng(0)
    before, after = plane(generator.normal(0, 1, (20, 9)), generator.normal(8, 1, (30, 9)))
    assert before.shape == (20, 2)
    assert after.shape == (30, 2)
    assert before[:, 0].max() < after[:, 0].min() or before[:, 0].min() > after[:, 0].max()
    one, other = plane(np.zeros((4, 1)), np.ones((4, 1)))
    assert one.shape == other.shape == (4, 2)


@pytest.fixture
def params(params_path: Path) -> Path:
    content = yaml.safe_load(params_path.read_text())
    content["categories"] = ["plate"]
    params_path.write_text(yaml.safe_dump(content))
    return params_path


@pytest.fixture
def command(
    params: Path,
    model: Path,
    reference: Measurement,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., tuple[int, str, str]]:
    """`flawsmith monitor` with the model and reference of these tests; returns exit status, stdout and stderr."""
    save_reference(params.parent / "reference.npz", reference)

    # a handler of an earlier call would write to that call's stderr, which is closed
    monkeypatch.setattr(logging.getLogger("flawsmith"), "handlers", [])

    def call(*arguments: str | Path, own: bool = True) -> tuple[int, str, str]:
        given = ["--model", model, "--reference", params.parent / "reference.npz"] if own else []
        words = ["flawsmith", "monitor", *arguments, *given, "--params", params]
        monkeypatch.setattr(sys, "argv", list(map(str, words)))
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return call


Command = Callable[..., tuple[int, str, str]]


def test_the_command_answers_with_its_exit_status(command: Command, shoot: Shoot, tmp_path: Path) -> None:
    folder = shoot("new", 25)
    (folder / "broken.png").write_bytes(b"no image")
    status, out, err = command(folder, "--out", tmp_path / "out")
    assert status == 0
    assert out.startswith("No drift: ")
    assert f"Results: {tmp_path / 'out'}" in out
    assert "skipped: broken.png cannot be read" in err
    status, out, _ = command(shoot("dark", 25, light=0.7), "--json")
    assert status == 3
    answer = json.loads(out)
    assert answer["drifted"] is True
    assert json.loads((tmp_path / "artifacts" / "plate" / "monitor" / "drift.json").read_text()) == answer


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere"], "nowhere does not exist"),
        (["new", "--set", "monitor.permutations=99"], "must be 200 or more"),
        (["new", "--set", "monitor.min_images=2000"], "above `monitor.max_images`"),
        (["new", "--set", "monitor.min_images=60"], "Only 22 new images"),
        (["new", "--category", "bottle"], "made for the category 'plate', not 'bottle'"),
    ],
)
def test_bad_input_ends_in_a_sentence(
    command: Command, shoot: Shoot, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    shoot("new", 22)
    monkeypatch.chdir(tmp_path)
    status, out, err = command(*arguments)
    assert (status, out) == (2, "")
    assert sentence in err
    assert "Traceback" not in err


def test_model_and_reference_belong_together(command: Command, shoot: Shoot, model: Path) -> None:
    status, _, err = command(shoot("new", 22), "--model", model, own=False)
    assert status == 2
    assert "belong together" in err


def test_without_a_model_the_champion_is_asked(
    command: Command, shoot: Shoot, model: Path, reference: Measurement, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from flawsmith.registry import promotion

    version = tmp_path / "version"
    save_reference(version / "reference.npz", reference)
    shutil.copy(model, version / "model.onnx")

    @contextmanager
    def fetch_champion(layout: Layout) -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(model=f"flawsmith-{layout.category}", version="3", folder=version)
        shutil.rmtree(version)

    monkeypatch.setattr(promotion, "fetch_champion", fetch_champion)
    status, out, _ = command(shoot("new", 25), "--json", own=False)
    assert status == 0
    assert json.loads(out)["model"] == "flawsmith-plate version 3"
    assert not version.exists()  # the champion's files were given back
