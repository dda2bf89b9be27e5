"""`flawsmith predict` as scripts call it: exit status, standard output, what is written where, what is imported."""

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
from line_samples import clip, command, environment, json_lines, plate, start
from PIL import Image

GOOD, UNREADABLE, DEFECT = 0, 2, 3

Predict = Callable[..., "CompletedProcess[str]"]


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One good and one defective image, below the working directory."""
    monkeypatch.chdir(tmp_path)
    plate(tmp_path / "parts" / "a.png")
    plate(tmp_path / "parts" / "b.png", bright=True, size=(101, 77))
    return tmp_path / "parts"


def one_line(err: str) -> str:
    assert err.count("\n") == 1
    assert err.startswith("flawsmith: ")
    return err


def test_the_exit_status_tells_what_happened(predict: Predict, model: Path, parts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert predict(model, parts, "--out", out).returncode == GOOD
    assert predict(model, parts, "--out", out, "--fail-on-defect").returncode == DEFECT
    assert predict(model, parts / "a.png", "--out", out, "--fail-on-defect").returncode == GOOD
    (parts / "c.png").write_bytes(b"")
    done = predict(model, parts, "--out", out, "--provider", "cpu")
    assert done.returncode == UNREADABLE
    assert "skipped: c.png cannot be read as an image" in done.stderr
    assert done.stdout == f"2 images used, 1 unreadable: 1 good, 1 defective. Computed on cpu. Results: {out}\n"
    assert json.loads((out / "results.json").read_text())["model"]["provider"] == "cpu"
    assert predict(model, parts, "--out", out, "--fail-on-defect").returncode == DEFECT


def test_every_format_tells_the_same(predict: Predict, model: Path, parts: Path, tmp_path: Path) -> None:
    (parts / "c.png").write_bytes(b"")
    out = tmp_path / "out"
    done = predict(model, parts, "--out", out, "--format", "csv,json", "--format", "jsonl", "--masks", "--jsonl", "-")
    lines = json_lines(out / "results.jsonl")
    assert json.loads((out / "results.json").read_text())["images"] == lines
    assert [json.loads(line) for line in done.stdout.splitlines()] == lines
    with (out / "results.csv").open(newline="") as stream:
        table = list(csv.DictReader(stream))
    assert [(row["file"], row["verdict"]) for row in table] == [(row["file"], row["verdict"]) for row in lines]
    assert "2 images used, 1 unreadable" in done.stderr
    assert [row.get("mask") for row in lines] == ["masks/a.png", "masks/b.png", None]
    good, defective = (np.asarray(Image.open(out / "masks" / name)) for name in ("a.png", "b.png"))
    assert not good.any()
    assert defective.shape == (77, 101)
    assert set(np.unique(defective)) == {0, 255}
    (region,) = lines[1]["regions"]
    assert (defective > 0).sum() == pytest.approx(region["area"], rel=0.1)
    assert region["polygon"][0] == region["polygon"][-1]
    assert {path.name for path in (out / "overlays").iterdir()} == {"a.png", "b.png"}
    predict(model, parts, "--out", out, "--format", "jsonl", "--no-overlays")
    assert [path.name for path in out.iterdir()] == ["results.jsonl"]


def test_lines_alone_leave_no_file(predict: Predict, model: Path, parts: Path, tmp_path: Path) -> None:
    for option in ("--out", "--jsonl"):
        done = predict(model, parts, option, "-")
        assert done.returncode == GOOD
        assert [json.loads(line)["verdict"] for line in done.stdout.splitlines()] == ["good", "defective"]
    predict(model, parts, "--jsonl", tmp_path / "lines.jsonl")
    assert [row["file"] for row in json_lines(tmp_path / "lines.jsonl")] == ["a.png", "b.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lines.jsonl", "model.onnx", "parts"]


def test_a_reader_that_leaves_ends_the_work_in_one_sentence(model: Path, parts: Path) -> None:
    process = start(model, "-", "--out", "-", stdin=-1)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdin.write(f"{parts / 'a.png'}\n")
    process.stdin.flush()
    process.stdout.readline()
    process.stdout.close()
    process.stdin.write(f"{parts / 'b.png'}\n")
    process.stdin.close()
    assert "Nobody reads the JSON lines any more" in one_line(process.stderr.read())
    assert process.wait(60) == 2
    process.stderr.close()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["parts", "--out", "out", "--format", "csv,xml"], "`xml` is no format of results; use csv, json, jsonl."),
        (["parts", "--out", "-", "--masks"], "write into a folder"),
        (["parts", "--out", "-", "--format", "csv"], "write into a folder"),
        (["parts", "--out", "-", "--jsonl", "x"], "needs no --jsonl"),
        (["--watch", "parts", "--out", "-"], "--out - leaves no folder"),
        (["--watch", "parts", "--out", "out", "--format", "csv"], "--watch writes results.jsonl"),
        (["--watch", "parts/a.png", "--out", "out"], "is no folder"),
        (["parts", "-", "--out", "out"], "stands alone"),
        (["nothing*", "--out", "out"], "matches no image"),
        (["parts", "--out", "out", "--jsonl", "nowhere/x"], "cannot be written"),
        (["parts", "--out", "parts"], "name a new folder"),
        (["parts", "--out", "out", "--provider", "gpu"], "must be one of auto"),
    ],
)
@pytest.mark.usefixtures("parts")
def test_a_wrong_call_is_refused_in_one_sentence(
    predict: Predict, model: Path, arguments: list[str], words: str
) -> None:
    done = predict(model, *arguments)
    assert done.returncode == 2
    assert words in one_line(done.stderr)
    assert done.stdout == ""
    assert not Path("out").exists()


@pytest.mark.parametrize("arguments", [[], ["parts"], ["--out", "out"], ["parts", "--watch", "x", "--out", "out"]])
def test_a_call_without_input_or_output_shows_how(predict: Predict, model: Path, arguments: list[str]) -> None:
    done = predict(model, *arguments)
    assert done.returncode == 2
    assert "Usage: flawsmith predict" in done.stderr


def test_a_pattern_and_a_video_on_the_command_line(predict: Predict, model: Path, parts: Path) -> None:
    clip(parts / "film.avi", 6, bright=lambda index: index == 5)
    assert predict(model, "parts/[a-z]*.*", "--out", "out", "--every", 5).returncode == GOOD
    rows = json.loads(Path("out/results.json").read_text())["images"]
    assert [(row["file"], row["verdict"]) for row in rows] == [
        ("a.png", "good"), ("b.png", "defective"), ("film.avi#000000", "good"), ("film.avi#000005", "defective"),
    ]  # fmt: skip


def test_one_image_needs_little_of_what_is_installed(model: Path, parts: Path, tmp_path: Path) -> None:
    heavy = {
        "torch", "torchvision", "pandas", "sklearn", "matplotlib", "timm", "diffusers", "mlflow", "dvc", "onnx", "av",
        "pyarrow", "prefect", "fastapi", "yaml",
    }  # fmt: skip
    arguments = command(model, parts / "a.png", "--out", tmp_path / "out")
    code = f"{arguments[2].replace('cli.main()', '')}\ntry: cli.main()\nexcept SystemExit as end: assert not end.code\n"
    code += f"print(sorted({heavy!r} & set(sys.modules)), file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments[3:]], capture_output=True, text=True, check=True, env=environment()
    )
    assert done.stderr.splitlines()[-1] == "[]"
    assert (tmp_path / "out" / "overlays" / "a.png").is_file()


def test_help_tells_the_exit_status(predict: Predict) -> None:
    told = " ".join(predict("--help").stdout.split())
    for words in ("Exit status: 0", "--watch", "--masks", "--jsonl", "--every", "--workers"):
        assert words in told


@pytest.mark.usefixtures("parts")
def test_a_threshold_of_ones_own_counts_in_every_row(predict: Predict, model: Path) -> None:
    rows = [json.loads(line) for line in predict(model, "parts", "--out", "-", "--threshold", 0.9).stdout.splitlines()]
    assert [(row["threshold"], row["verdict"]) for row in rows] == [(0.9, "good"), (0.9, "good")]
