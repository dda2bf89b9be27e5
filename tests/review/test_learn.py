"""From predictions through verdicts to data: what lies where, what is left out, and who stays on which side."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_settings import write_params
from toy_onnx import write_toy
from typer.testing import CliRunner

from flawsmith.cli import app
from flawsmith.config import load_settings
from flawsmith.data.images import write_png
from flawsmith.data.masks import read_mask
from flawsmith.errors import UserError
from flawsmith.files import digest_file, digest_path
from flawsmith.inference.folder import predict_folder
from flawsmith.inference.options import PredictOptions
from flawsmith.inference.predictor import Predictor
from flawsmith.layout import Layout
from flawsmith.review.learn import learn
from flawsmith.review.verdicts import Opinion, Verdict, append, opinions, read_verdicts

CATEGORY = "plate"


def picture(seed: int, bright: bool = False) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(20, 100, (32, 40, 3), np.uint8)
    if bright:
        pixels[8:12, 20:26] = 240
    return pixels


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "data" / CATEGORY
    for seed in range(30):
        write_png(folder / f"train/good/{seed:03}.png", picture(seed))
    write_png(folder / "test/good/000.png", picture(100))
    write_png(folder / "test/hole/000.png", picture(101, bright=True))
    write_params(tmp_path / "params.yaml", {"tracking": {"mode": "off"}}, categories=[CATEGORY])
    return tmp_path


def layout_of(root: Path) -> Layout:
    return Layout(load_settings(root / "params.yaml"), CATEGORY, root)


def seen(root: Path, verdict: str, seeds: range, boxes: tuple[tuple[int, int, int, int], ...] = ()) -> list[Opinion]:
    found = []
    for seed in seeds:
        path = root / f"line/{verdict}/{seed}.png"
        write_png(path, picture(seed, bright=True))
        found.append(Opinion(digest_file(path), verdict, (str(path),), boxes))
    return found


def call(root: Path, verdicts: Path, *options: str) -> str:
    answer = CliRunner().invoke(app, ["learn", str(verdicts), "--params", str(root / "params.yaml"), *options])
    assert answer.exit_code == 0, answer.output
    return answer.stdout


def test_wrong_verdicts_of_a_model_become_data(root: Path) -> None:
    for seed in range(200, 206):
        write_png(root / f"line/{seed}.png", picture(seed, bright=True))
    predictor = Predictor(write_toy(root / "model.onnx"))
    report = predict_folder(predictor, [root / "line"], root / "out", PredictOptions())
    assert report.defective == 6
    verdicts, folder = root / "verdicts.jsonl", root / "data" / CATEGORY
    for seed in range(200, 206):
        path = root / f"line/{seed}.png"
        real = seed == 205
        boxes = ((20, 8, 6, 4),) if real else ()
        said = Verdict("ann", f"2026-01-01T00:00:{seed - 200:02}Z", predictor.digest, digest_file(path), str(path),
                       "defective" if real else "good", boxes)  # fmt: skip
        append(verdicts, said)
    before = layout_of(root).split()
    untouched = digest_path(folder)
    assert "would be copied" in call(root, verdicts, "--dry-run")
    assert digest_path(folder) == untouched

    call(root, verdicts, "--defect", "dent")
    learned = {digest_file(path) for path in (folder / "train/good/learned").iterdir()}
    assert learned == {digest_file(root / f"line/{seed}.png") for seed in range(200, 205)}
    (defective,) = [item for item in layout_of(root).surface().labelled_test() if item.defect == "dent"]
    assert digest_file(defective.path) == digest_file(root / "line/205.png")
    assert defective.mask_path is not None
    mask = read_mask(defective.mask_path)
    assert mask[8:12, 20:26].all()
    assert mask.sum() == 24
    after = layout_of(root).split()
    assert set(before.fit) <= set(after.fit)
    assert set(before.calibration) <= set(after.calibration)

    changed = digest_path(folder)
    assert "0 good image(s) were copied" in call(root, verdicts, "--defect", "dent")
    assert digest_path(folder) == changed


@pytest.mark.parametrize("count", [1, 2, 9, 25])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_image_changes_its_side(root: Path, count: int, seed: int) -> None:
    layout = Layout(load_settings(root / "params.yaml", {"data.split_seed": seed}), CATEGORY, root)
    before = layout.split()
    plan = learn(layout, seen(root, "good", range(300, 300 + count)), "dent")
    assert len(plan.copies) == count
    after = Layout(layout.settings, CATEGORY, root).split()
    folder = root / "data" / CATEGORY
    assert set(after.fit) == {*before.fit, *(folder / copy.target for copy in plan.fit)}
    assert set(after.calibration) == {*before.calibration, *(folder / copy.target for copy in plan.calibration)}


def test_what_cannot_be_learned_is_left_out_with_its_reason(root: Path) -> None:
    (fine,) = seen(root, "good", range(400, 401))
    gone, changed, copied, torn, flat = (root / f"line/{name}.png" for name in ("gone", "new", "copy", "torn", "flat"))
    shutil.copyfile(root / f"data/{CATEGORY}/train/good/000.png", copied)
    write_png(changed, picture(401))
    write_png(flat, np.full((32, 40, 3), 90, np.uint8))
    torn.write_bytes(b"no image")
    said = [
        fine,
        replace(fine, image="0" * 64, paths=(str(gone),)),
        replace(fine, image="1" * 64, paths=(str(changed),)),
        *(Opinion(digest_file(path), "good", (str(path),), ()) for path in (copied, torn, flat)),
        Opinion("2" * 64, "", ("/line/doubt.png",), ()),
    ]
    plan = learn(layout_of(root), said, "dent")
    assert [copy.source for copy in plan.copies] == [Path(fine.paths[0])]
    for name in ("gone", "new", "copy", "torn", "flat", "doubt"):
        assert any(name in sentence for sentence in plan.left_out), name


def test_the_same_picture_in_another_file_is_left_out(root: Path) -> None:
    (fine,) = seen(root, "good", range(410, 411))
    again = root / "line/again.bmp"
    Image.fromarray(picture(410, bright=True)).save(again)
    plan = learn(layout_of(root), [fine, Opinion(digest_file(again), "good", (str(again),), ())], "dent")
    assert len(plan.copies) == 1
    assert "same picture" in plan.left_out[0]


def test_defects_without_boxes_have_no_mask_and_wait_for_good_test_images(root: Path) -> None:
    said = seen(root, "defective", range(420, 422))
    shutil.rmtree(root / f"data/{CATEGORY}/test/good")
    assert not learn(layout_of(root), said, "dent").copies
    write_png(root / f"data/{CATEGORY}/test/good/000.png", picture(100))
    assert len(learn(layout_of(root), said, "dent").defects) == 2
    assert not (root / f"data/{CATEGORY}/ground_truth").exists()
    layout_of(root).surface().labelled_test()


def test_a_failure_half_way_leaves_the_data_as_they_were(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = [*seen(root, "good", range(430, 433)), *seen(root, "defective", range(440, 442), ((1, 1, 5, 5),))]
    folder = root / "data" / CATEGORY
    before = digest_path(folder)
    copies = iter(range(4))

    def copyfile(source: Path, target: Path) -> None:
        if next(copies) == 3:
            raise OSError(28, "No space left on device")
        target.write_bytes(source.read_bytes())

    monkeypatch.setattr("flawsmith.review.learn.shutil.copyfile", copyfile)
    with pytest.raises(OSError, match="No space"):
        learn(layout_of(root), said, "dent")
    assert digest_path(folder) == before
    assert {path.name for path in folder.parent.iterdir()} == {CATEGORY}


@pytest.mark.parametrize("defect", ["", "..", "a/b", ".hidden", "good", "OK"])
def test_a_type_must_have_a_plain_name(root: Path, defect: str) -> None:
    with pytest.raises(UserError, match="--defect"):
        learn(layout_of(root), [], defect)


def test_rendered_surfaces_take_nothing(root: Path) -> None:
    (root / "data" / CATEGORY).rename(root / "data/brushed_metal")
    settings = load_settings(root / "params.yaml", {"categories": ["brushed_metal"]})
    with pytest.raises(UserError, match="demo-data"):
        learn(Layout(settings, "brushed_metal", root), [], "dent")


def test_dvc_records_the_change_and_the_stages_are_named(root: Path) -> None:
    shutil.copyfile(Path(__file__).parents[2] / "dvc.yaml", root / "dvc.yaml")
    dvc = Path(sys.executable).with_name("dvc")
    subprocess.run([dvc, "init", "--no-scm", "-q"], cwd=root, check=True)
    (root / "dvc.yaml").rename(root / "later.yaml")  # its stages need a whole project
    subprocess.run([dvc, "add", "-q", f"data/{CATEGORY}"], cwd=root, check=True)
    before = (root / f"data/{CATEGORY}.dvc").read_text()
    (root / "later.yaml").rename(root / "dvc.yaml")
    said = seen(root, "good", range(450, 451))
    verdicts = root / "verdicts.jsonl"
    append(verdicts, Verdict("ann", "2026-01-01T00:00:00Z", "", said[0].image, said[0].paths[0], "good"))
    assert opinions(read_verdicts(verdicts)) == said
    told = call(root, verdicts)
    assert (root / f"data/{CATEGORY}.dvc").read_text() != before
    assert "ddpm-train" in told
    assert "evaluate" in told
