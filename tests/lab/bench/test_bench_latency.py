"""The latency benchmark: its arithmetic, and the whole command, alone and beside a stand-in for anomalib."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_onnx import write_toy

from flawsmith.errors import FlawsmithError, UserError
from flawsmith_lab.bench import latency_peers, latency_worker
from flawsmith_lab.bench.latency import (
    HEADLINE,
    MOST_RUNS,
    Contender,
    Setting,
    Speaker,
    expected_seconds,
    main,
    patchcore_vectors,
    plan,
    quantise,
    random_model,
    ratios,
    settings_in_order,
    summary,
)
from flawsmith_lab.bench.measure import bench_settings

SIZE = 64
TESTS = Path(__file__).parents[2]
BACKBONE = "resnet10t"  # exports in a third of the default teacher's time
OVERRIDES = {
    "teacher.backbone": BACKBONE,
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
assert set(json.loads((folder / "request.json").read_text())) == {{"seed", "backbone", "vectors"}}
print(json.dumps({{"anomalib": "0", "torch": "0", "openvino": "0"}}), flush=True)
for line in sys.stdin:
    name, size, batch = line.split()
    path = write_toy(folder / (name + ".onnx"), input_size=int(size))
    print(json.dumps({{"file": str(path)}}), flush=True)
"""
FIGURES = ("p50_ms", "p95_ms", "p99_ms", "images_per_second", "peak_mb", "model_mb")


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


class Small(NamedTuple):
    """A small detector with random weights, and its int8."""

    whole: Path
    int8: Path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    folder = tmp_path_factory.mktemp("models")
    found = Small(folder / "whole.onnx", folder / "int8.onnx")
    random_model(bench_settings(TESTS.parent / "params.yaml", None, None, OVERRIDES), SIZE, found.whole)
    quantise(found.whole, found.int8, SIZE)
    return found


def row(model: str, p50: float | None, setting: Setting = HEADLINE, runtime: str = "onnxruntime") -> dict[str, Any]:
    return {"model": model, "runtime": runtime, "p50_ms": p50} | vars(setting)


def test_alone_every_setting_has_a_row_and_no_ratio(params: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = params.read_text()
    assert "backbone: tf_efficientnet_lite2" in content
    params.write_text(content.replace("backbone: tf_efficientnet_lite2", f"backbone: {BACKBONE}"))
    main(["--params", str(params), "--without-anomalib", "--sizes", "64", "--batches", "1,2", "--rounds", "2",
          "--seconds", "20"])  # fmt: skip
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["ratio_vs_efficientad"] is None
    assert found["weights"] == "random"
    assert {(one["batch"], one["threads"], one["precision"]) for one in found["rows"]} == {
        (batch, threads, precision) for batch in (1, 2) for threads in (1, 2) for precision in ("fp32", "int8")
    }
    assert len(found["rows"]) == 8
    timed = [one for one in found["rows"] if not one["skipped"]]
    assert timed
    for one in timed:
        assert 0 < one["p50_ms"] <= one["p95_ms"] <= one["p99_ms"]
        assert one["images_per_second"] == pytest.approx(1000 * one["batch"] / one["p50_ms"], rel=0.01)
        assert 1 <= one["rounds"] <= 2 <= one["runs"] + 1
        assert one["peak_mb"] > one["model_mb"] > 0


def test_beside_peers_the_ratio_is_that_of_the_rows(
    params: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    python = executable(tmp_path / "python", STAND_IN.format(python=sys.executable, tests=str(TESTS)))
    model = write_toy(tmp_path / "model.onnx", input_size=256)
    main(["--params", str(params), "--model", str(model), "--python", str(python), "--rounds", "3", "--batches", "1",
          "--threads", "2", "--seconds", "60"])  # fmt: skip
    out = capsys.readouterr().out.splitlines()
    found = json.loads(out[-1])
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
    assert found["weights"] == "trained"
    assert found["peer_weights"] == "random"
    assert any("all others random" in line for line in out)  # also to people
    assert {one["rounds"] for one in found["rows"][:5]} == {3}  # no ratio hangs on one round


def test_a_ratio_needs_both_and_onnxruntime() -> None:
    other = Setting(512, 8, 1, "int8")
    rows = [row("flawsmith", 30.0), row("efficientad", 60.0), row("patchcore", None), row("efficientad", 5.0, other),
            row("efficientad", 10.0, HEADLINE, "openvino")]  # fmt: skip
    found = ratios(rows)
    assert found[HEADLINE.name] == {"efficientad": 0.5, "patchcore": None}
    assert found[other.name] == {"efficientad": None, "patchcore": None}


def test_one_disturbed_round_does_not_move_the_median() -> None:
    calm = [[0.010, 0.012, 0.011]] * 4
    found = summary([*calm, [5.0, 6.0, 7.0]], batch=8)
    assert found["p50_ms"] == pytest.approx(11)
    assert found["images_per_second"] == pytest.approx(8 / 0.011, rel=1e-3)
    assert found["p99_ms"] > 5000  # the tail tells of it
    assert (found["runs"], found["rounds"]) == (15, 5)


@given(
    st.integers(1, 9).flatmap(
        lambda runs: st.lists(
            st.lists(st.floats(1e-3, 10), min_size=runs, max_size=runs), min_size=1, max_size=9
        )
    )
)  # fmt: skip
def test_percentiles_are_in_order(rounds: list[list[float]]) -> None:
    found = summary(rounds, 1)
    assert found["p50_ms"] <= found["p95_ms"] + 1e-6
    assert found["p95_ms"] <= found["p99_ms"] + 1e-6


@given(st.floats(0, 1000), st.floats(1e-3, 100), st.integers(1, 20))
def test_a_plan_fits_into_its_time_unless_a_single_run_does_not(seconds: float, run: float, rounds: int) -> None:
    turns, runs = plan(seconds, run, rounds)
    assert 1 <= turns <= rounds
    assert turns * runs <= MOST_RUNS
    assert turns * runs == 1 or turns * runs * run <= seconds * (1 + 1e-9)


def test_the_headline_comes_first_and_what_follows_grows_dearer() -> None:
    order = settings_in_order((256, 512), (1, 8), (1, 2), ("fp32", "int8"))
    assert len(set(order)) == len(order) == 16
    assert order[0] == HEADLINE
    assert [one.work for one in order[1:]] == sorted(one.work for one in order[1:])


def test_what_a_run_should_take_follows_from_the_most_similar_row() -> None:
    rows = [row("flawsmith", 60.0), row("efficientad", 1000.0), row("efficientad", None, Setting(256, 8, 2, "fp32"))]
    dear = Setting(512, 8, 1, "fp32")
    assert expected_seconds(rows, Contender("efficientad"), dear) == pytest.approx(1.0 * 4 * 8 * 2)
    assert expected_seconds(rows, Contender("patchcore"), dear) is None
    rows.append(row("efficientad", 9000.0, Setting(512, 8, 2, "fp32")))
    assert expected_seconds(rows, Contender("efficientad"), dear) == pytest.approx(18.0)


def test_what_takes_too_long_is_said_and_not_timed(
    params: Path, small: Small, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--params", str(params), "--without-anomalib", "--model", str(small.whole), "--batches", "1,65536",
          "--threads", "1", "--precisions", "fp32", "--seconds", "5", "--rounds", "1"])  # fmt: skip
    quick, large = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert quick["p50_ms"] > 0
    assert all(large[key] is None for key in FIGURES)
    assert "--seconds leaves" in large["skipped"]


def test_patchcore_remembers_a_tenth_of_the_patches_of_200_images() -> None:
    assert patchcore_vectors() == 20480


def test_int8_answers_nearly_as_fp32(small: Small) -> None:
    assert small.int8.stat().st_size < small.whole.stat().st_size
    assert any(node.op_type == "QuantizeLinear" for node in onnx.load(small.int8).graph.node)
    images = np.random.default_rng(0).random((3, 3, SIZE, SIZE), np.float32)
    sessions = [onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]) for path in small]
    one, other = (session.run(["anomaly_map"], {"image": images})[0] for session in sessions)
    assert np.corrcoef(one.ravel(), other.ravel())[0, 1] > 0.5


def test_the_workers_need_nothing_of_flawsmith(tmp_path: Path) -> None:
    model = write_toy(tmp_path / "model.onnx")
    script = (
        "import sys; sys.modules['flawsmith'] = None; import runpy\n"
        f"sys.argv = ['worker', 'onnxruntime', {str(model)!r}, '32', '2', '1']\n"
        f"runpy.run_path({latency_worker.__file__!r}, run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], input="3\n1\n", capture_output=True, text=True, check=True
    )  # fmt: skip
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [len(one["seconds"]) for one in answers] == [0, 3, 1]
    assert answers[0]["peak_mb"] <= answers[-1]["peak_mb"] < 500
    source = Path(latency_peers.__file__).read_text()
    assert "import flawsmith" not in source
    assert "from flawsmith" not in source


def test_a_program_that_ends_is_told_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(FlawsmithError, match="the peer ended with status 3: no such module"):
        Speaker([executable(tmp_path / "bad", "#!/bin/sh\necho 'no such module' >&2; exit 3\n")], "the peer")
    speaker = Speaker(
        [executable(tmp_path / "later", "#!/bin/sh\necho '{}'; read line; echo 'out of memory' >&2; exit 4\n")], "it"
    )
    for _ in range(2):  # asked again, it says so again
        with pytest.raises(FlawsmithError, match="it ended with status 4: out of memory"):
            speaker.ask("1")
    speaker.close()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (
            ["--python", "nowhere/python"],
            r"nowhere/python does not exist; `make bench-latency` sets .*--without-anomalib",
        ),
        (["--without-anomalib", "--sizes", "256,x"], "--sizes is `256,x`; give whole numbers above 0"),
        (["--without-anomalib", "--sizes", "100"], "--sizes names 100; the detector takes multiples of 32 px"),
        (["--without-anomalib", "--batches", "0"], "--batches is `0`"),
        (["--without-anomalib", "--precisions", "fp8"], "`fp8` is unknown; it may name fp32, int8"),
        (["--without-anomalib", "--rounds", "0"], "--rounds must be 1 or more"),
        (["--without-anomalib", "--model", "none.onnx"], "none.onnx does not exist"),
        (["--python", sys.executable, "--sizes", "64"], "EfficientAD takes no image smaller than 256 px"),
    ],
)
def test_options_that_make_no_sense_are_refused(params: Path, options: list[str], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        main(["--params", str(params), *options])


def test_a_model_of_another_size_or_quantised_already_is_refused(params: Path, small: Small) -> None:
    alone = ["--params", str(params), "--without-anomalib", "--model"]
    with pytest.raises(UserError, match=r"whole\.onnx takes images of 64 px; leave out --sizes, or --model"):
        main([*alone, str(small.whole), "--sizes", "256"])
    with pytest.raises(UserError, match="is quantised already; name the fp32"):
        main([*alone, str(small.int8)])
