"""The latency benchmark: its arithmetic, and the whole command, alone and beside a stand-in for anomalib."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from toy_onnx import write_toy

from flawsmith.errors import FlawsmithError, UserError
from flawsmith_lab.bench import latency_peers, latency_worker
from flawsmith_lab.bench.latency import HEADLINE, PATCHCORE_VECTORS, main, quantise, random_model, ratios, summary
from flawsmith_lab.bench.measure import bench_settings, run_script

SIZE = 64
TESTS = Path(__file__).parents[2]
OVERRIDES = {
    "teacher.backbone": "resnet10t",  # exports in a third of the default teacher's time
    "distill.bottleneck": 8,
    "distill.decoder_channels": [8, 8],
    "distill.head_channels": 8,
}
# Plays both programs that anomalib's Python runs: toy models as peers; OpenVINO is onnxruntime by another name.
STAND_IN = """#!{python}
import json, os, pathlib, sys
sys.path.insert(0, {tests!r})
assert sys.argv[1] == "-P", sys.argv
if sys.argv[2].endswith("latency_worker.py"):
    assert sys.argv[3] == "openvino"
    if "patchcore" in sys.argv[4]:
        sys.exit("refused")
    os.execv({python!r}, [{python!r}, "-P", sys.argv[2], "onnxruntime", *sys.argv[4:]])
from toy_onnx import write_toy
folder = pathlib.Path(sys.argv[3])
files = [str(write_toy(folder / (name + ".onnx"), shape=(size, size)))
         for name, size, batch in json.loads((folder / "request.json").read_text())["files"]]
answer = {{"anomalib": "0", "torch": "0", "openvino": "0", "files": files}}
(folder / "answer.json").write_text(json.dumps(answer))
"""


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A model for images of SIZE."""
    return write_toy(tmp_path / "whole.onnx", shape=(SIZE, SIZE))


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def test_alone_every_setting_has_a_row_and_no_ratio(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(
        [
            "--model",
            str(toy),
            "--without-anomalib",
            "--batches",
            "1,2",
            "--threads",
            "1",
            "--rounds",
            "2",
            "--runs",
            "3",
        ]
    )
    found = last_line(capsys)
    assert found["ratio_vs_efficientad"] is None
    assert found["weights"] == "trained"
    assert {(one["batch"], one["precision"]) for one in found["rows"]} == {
        (batch, precision) for batch in (1, 2) for precision in ("fp32", "int8")
    }
    for one in found["rows"]:
        assert 0 < one["p50_ms"] <= one["p95_ms"] <= one["p99_ms"]
        assert one["images_per_second"] == pytest.approx(1000 * one["batch"] / one["p50_ms"], rel=0.05)
        assert (one["rounds"], one["runs"]) == (2, 6)
        assert one["peak_mb"] > 10 > one["model_mb"]


def test_beside_peers_the_ratio_is_that_of_the_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    python = executable(tmp_path / "python", STAND_IN.format(python=sys.executable, tests=str(TESTS)))
    model = write_toy(tmp_path / "model.onnx", shape=(256, 256))
    main(["--model", str(model), "--python", str(python), "--rounds", "2", "--batches", "1", "--threads", "2"])
    found = last_line(capsys)
    rows = {(one["model"], one["runtime"], one["precision"]): one for one in found["rows"]}
    assert set(rows) == {
        (name, runtime, precision)
        for name in ("flawsmith", "efficientad", "patchcore")
        for runtime in ("onnxruntime", "openvino")
        for precision in (("fp32", "int8") if runtime == "onnxruntime" else ("fp32",))
    }
    assert "status 1: refused" in rows["patchcore", "openvino", "fp32"]["skipped"]  # and costs no other row
    for peer in ("efficientad", "patchcore"):
        ours, theirs = (rows[name, "onnxruntime", "fp32"]["p50_ms"] for name in ("flawsmith", peer))
        assert found[f"ratio_vs_{peer}"] == pytest.approx(ours / theirs, abs=1e-3)
        assert found["ratios"][HEADLINE.name][peer] == found[f"ratio_vs_{peer}"]


def test_what_takes_too_long_is_said_and_not_timed(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--model", str(toy), "--without-anomalib", "--batches", "1", "--threads", "1", "--precisions", "fp32",
          "--limit", "1e-9"])  # fmt: skip
    (row,) = last_line(capsys)["rows"]
    assert "--limit is 1e-09 s" in row["skipped"]
    assert row["p50_ms"] is None


def test_a_round_that_was_disturbed_counts_once() -> None:
    found = summary([[0.01] * 10, [0.01] * 3, [9.0]], batch=2)
    assert (found["p50_ms"], found["images_per_second"], found["runs"], found["rounds"]) == (10.0, 200.0, 14, 3)
    assert found["p99_ms"] > 1000


def test_a_ratio_needs_both_rows() -> None:
    rows = [
        {"model": name, "runtime": "onnxruntime", "p50_ms": p50, **vars(HEADLINE)}
        for name, p50 in {"flawsmith": 50.0, "efficientad": 200.0, "patchcore": None}.items()
    ]
    assert ratios(rows) == {HEADLINE.name: {"efficientad": 0.25, "patchcore": None}}


def test_patchcore_remembers_a_tenth_of_the_patches_of_200_images() -> None:
    assert PATCHCORE_VECTORS == 20480


@pytest.mark.slow
def test_a_random_detector_is_exported_and_its_int8_answers_nearly_as_fp32(tmp_path: Path) -> None:
    whole, int8 = tmp_path / "whole.onnx", tmp_path / "int8.onnx"
    random_model(bench_settings(TESTS.parent / "params.yaml", None, None, OVERRIDES), SIZE, whole)
    quantise(whole, int8, SIZE)
    assert int8.stat().st_size < whole.stat().st_size
    images = np.random.default_rng(0).random((3, 3, SIZE, SIZE), np.float32)
    sessions = [onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]) for path in (whole, int8)]
    one, other = (session.run(["anomaly_map"], {"image": images})[0] for session in sessions)
    assert np.corrcoef(one.ravel(), other.ravel())[0, 1] > 0.5
    with pytest.raises(UserError, match="is quantised already; name the fp32"):
        main(["--without-anomalib", "--model", str(int8)])


def test_the_workers_need_nothing_of_flawsmith(tmp_path: Path) -> None:
    model = write_toy(tmp_path / "model.onnx")
    script = (
        "import sys; sys.modules['flawsmith'] = None; import runpy\n"
        f"sys.argv = ['worker', 'onnxruntime', {str(model)!r}, '32', '2', '1', '3', '60']\n"
        f"runpy.run_path({latency_worker.__file__!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    answer = json.loads(done.stdout)
    assert len(answer["seconds"]) == 3
    assert 10 < answer["peak_mb"] < 500
    assert "from flawsmith" not in Path(latency_peers.__file__).read_text()


def test_a_program_that_fails_is_told_with_its_last_words(tmp_path: Path) -> None:
    bad = executable(tmp_path / "bad", "#!/bin/sh\necho 'no such module' >&2; exit 3\n")
    with pytest.raises(FlawsmithError, match="the peer failed with status 3: no such module"):
        run_script(bad, None, [], "the peer")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--python", "nowhere/python"], r"nowhere/python does not exist; `make bench-latency` .*--without-anomalib"),
        (["--without-anomalib", "--sizes", "256,100"], "--sizes names 100; the detector takes multiples of 32 px"),
        (["--without-anomalib", "--precisions", "fp8"], "`fp8` is unknown; it may name fp32, int8"),
        (["--without-anomalib", "--rounds", "0"], "--rounds and --runs must be 1 or more"),
        (["--without-anomalib", "--model", "none.onnx"], "none.onnx does not exist"),
        (["--python", sys.executable, "--sizes", "64"], "EfficientAD takes no image smaller than 256 px"),
    ],
)
def test_options_that_make_no_sense_are_refused(params: Path, options: list[str], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        main(["--params", str(params), *options])


def test_a_model_of_another_size_is_refused(toy: Path) -> None:
    with pytest.raises(UserError, match=r"whole\.onnx takes images of 64 px; leave out --sizes, or --model"):
        main(["--without-anomalib", "--model", str(toy), "--sizes", "256"])
