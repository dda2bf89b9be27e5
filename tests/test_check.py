"""`flawsmith check`: everything that would fail later is told at once, before anything is computed."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from small_settings import write_params

from flawsmith.check import Report, check, refuse
from flawsmith.data.images import write_png
from flawsmith.errors import UserError

SIDE = 64


def part(seed: int, height: int = SIDE, width: int = SIDE) -> np.ndarray:
    return np.random.default_rng(seed).integers(60, 200, (height, width, 3), np.uint8)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project with a category that nothing is wrong with."""
    write_params(tmp_path / "params.yaml", categories=["plate"])
    folder = tmp_path / "data" / "plate"
    for seed in range(100):
        write_png(folder / "train" / "good" / f"{seed:03d}.png", part(seed))
    for seed in range(3):
        write_png(folder / "test" / "good" / f"{seed:03d}.png", part(200 + seed))
        write_png(folder / "test" / "dent" / f"{seed:03d}.png", part(300 + seed))
        write_png(folder / "ground_truth" / "dent" / f"{seed:03d}_mask.png", np.eye(SIDE, dtype=np.bool_))
    return tmp_path


def sentences(report: Report, level: str) -> list[str]:
    return [item.sentence for item in report.findings if item.level == level]


def test_a_sound_category_is_described_and_its_promise_told(root: Path) -> None:
    report = check(root / "params.yaml")
    assert report.findings == ()
    facts = report.categories["plate"]
    assert (facts["fit"], facts["calibration"]) == (80, 20)
    assert facts["sizes"] == {"64 x 64": 100}
    assert facts["shape"] == (256, 256)
    assert "models see them at 256 x 256 pixels, 4 of their size." in facts["told"]
    assert facts["test"] == {"dent": 3, "good": 3}


def test_what_models_see_of_larger_images_is_told(root: Path) -> None:
    for path in (root / "data/plate").rglob("*.png"):
        write_png(path, part(int(path.name[:3]), 320, 480) if "_mask" not in path.name else np.eye(320, 480) > 0)
    facts = check(root / "params.yaml").categories["plate"]
    assert facts["shape"] == (256, 384)
    assert "models see them at 384 x 256 pixels, 0.8 of their size." in facts["told"]
    write_params(root / "params.yaml", {"data": {"image_size": 224}}, categories=["plate"])
    assert "a larger data.image_size shows smaller defects" in str(check(root / "params.yaml"))


def test_a_linked_folder_that_dvc_does_not_see_is_told(root: Path) -> None:
    good = root / "data" / "plate" / "train" / "good"
    good.rename(root / "share")
    good.symlink_to(root / "share")
    assert check(root / "params.yaml").findings == ()  # no DVC here
    (root / "dvc.yaml").touch()
    [finding] = check(root / "params.yaml").findings
    assert finding.level == "error"
    assert f"{good} is a linked folder, and DVC does not see" in finding.sentence


def broken(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


@pytest.mark.parametrize(
    ("spoil", "level", "said"),
    [
        (lambda data: [broken(data / f"train/good/{name}.png") for name in ("003", "007")], "error", "003.png"),
        (lambda data: [broken(data / f"train/good/{name}.png") for name in ("003", "007")], "error", "007.png"),
        (lambda data: broken(data / "test/dent/001.png"), "error", "test/dent/001.png"),
        (lambda data: broken(data / "ground_truth/dent/001_mask.png"), "error", "dent/001_mask.png"),
        (
            lambda data: write_png(data / "ground_truth/dent/001_mask.png", np.zeros((SIDE, SIDE), np.bool_)),
            "error",
            "marks no pixel",
        ),
        (lambda data: write_png(data / "test/loose.png", part(9)), "error", "loose.png lies in no folder"),
        (
            lambda data: write_png(data / "train/good/003.png", np.full((SIDE, SIDE, 3), 255, np.uint8)),
            "error",
            "one value all over (003.png)",
        ),
        (lambda data: write_png(data / "train/good/copy.png", part(3)), "warning", "003.png = copy.png"),
        (lambda data: (data / "train/bad").mkdir(), "warning", "folders that no stage reads (train/bad)"),
        (lambda data: (data / "test/new").mkdir(), "warning", "test/new holds no image"),
        (lambda data: write_png(data / "train/good/wide.png", part(9, 32, 96)), "warning", "differ in shape"),
        (
            lambda data: [path.unlink() for path in sorted((data / "train/good").iterdir())[5:]],
            "error",
            "5 image(s), too few",
        ),
    ],
)
def test_what_would_fail_or_mislead_is_told(root: Path, spoil: Callable[[Path], object], level: str, said: str) -> None:
    spoil(root / "data" / "plate")
    report = check(root / "params.yaml")
    assert [sentence for sentence in sentences(report, level) if said in sentence], str(report)


def test_few_calibration_images_are_told_with_the_number_that_would_do(root: Path) -> None:
    report = check(root / "params.yaml", overrides={"evaluate.false_alarm_rate": 0.01})
    assert any("takes 99: 495 normal images" in sentence for sentence in sentences(report, "warning"))


def test_images_in_the_wrong_folder_are_told_where_to_go(root: Path) -> None:
    (root / "data" / "plate" / "train" / "good").rename(root / "data" / "flat")
    write_params(root / "params.yaml", categories=["flat"])
    (sentence,) = check(root / "params.yaml").errors
    assert f"100 images lie in {root / 'data/flat'}" in sentence
    assert f"move the images to {root / 'data/flat/train/good'}" in sentence


@pytest.mark.parametrize(
    ("categories", "named", "said"),
    [
        (["plate"], ["plaet"], "No category plaet in {params}; did you mean plate?"),
        (["plaet"], [], "plaet does not exist; did you mean plate?"),
        (["rubber"], [], "put the normal images into"),
    ],
)
def test_a_category_that_is_not_there(root: Path, categories: list[str], named: list[str], said: str) -> None:
    write_params(root / "params.yaml", categories=categories)
    (sentence,) = check(root / "params.yaml", named).errors
    assert said.format(params=root / "params.yaml") in sentence


def test_a_demo_surface_need_not_be_there_yet(root: Path) -> None:
    write_params(root / "params.yaml", categories=["brushed_metal"])
    assert check(root / "params.yaml").errors == []


def test_all_faults_of_params_are_told_at_once(root: Path) -> None:
    values = {"distill": {"bacth": 4, "seed": -1}, "data": {"image_size": "big"}}
    write_params(root / "params.yaml", values, categories="plate")
    text = " ".join(check(root / "params.yaml").errors)
    for said in ("`categories` must be a list", "did you mean `batch`", "`distill.seed` is -1", "`data.image_size`"):
        assert said in text
    write_params(root / "params.yaml", {"data": {"image_size": 100}}, categories=["plate"])
    assert "multiple of 32" in check(root / "params.yaml").errors[0]


def test_nothing_is_opened_twice(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = check(root / "params.yaml")
    for module, name in (("flawsmith.data.statistics", "read_image"), ("flawsmith.check", "load_labelled")):
        monkeypatch.setattr(f"{module}.{name}", lambda *_, **__: pytest.fail("opened again"))
    assert check(root / "params.yaml") == first


def test_the_flow_refuses_by_all_sentences(root: Path) -> None:
    for name in ("003", "007"):
        broken(root / f"data/plate/train/good/{name}.png")
    with pytest.raises(UserError, match=r"003\.png.*007\.png"):
        refuse(root / "params.yaml", "plate")


def test_the_command_answers_in_json_without_torch(root: Path) -> None:
    broken(root / "data/plate/train/good/003.png")
    program = (
        "import sys; sys.modules['torch'] = None; from flawsmith.cli import main; "
        "sys.argv[1:] = ['check', '--json']; main()"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    answer = json.loads(done.stdout)
    assert answer["ok"] is False
    assert [item["level"] for item in answer["findings"] if "003.png" in item["sentence"]] == ["error"]
    assert answer["categories"]["plate"]["normals"] == 100
