"""The exchange with anomalib's environment, played by a stand-in that needs no anomalib."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from flawsmith.errors import UserError
from flawsmith.layout import Layout
from flawsmith.stages import demo_data
from flawsmith_lab.bench import anomalib_runner
from flawsmith_lab.bench.anomalib_side import compare, main, replay
from flawsmith_lab.bench.measure import bench_settings

# Answers in the exchange's format: brightness as an anomaly map.
STAND_IN = """#!{python}
import json, pathlib, sys
import numpy as np
assert sys.argv[1] == "-P", sys.argv
folder = pathlib.Path(sys.argv[3])
request = json.loads((folder / "request.json").read_text())
scores = {{}}
for part in ("calibration", "test"):
    maps = np.load(folder / (part + ".npy")).mean(axis=1, dtype=np.float32)
    np.save(folder / ("patchcore." + part + ".npy"), maps)
    scores[part] = maps.max(axis=(1, 2))
np.savez(folder / "patchcore.scores.npz", **scores)
answer = {{name: {{"fit_seconds": 1.5, "seconds_an_image": 0.25}} for name in request["models"]}}
(folder / "answer.json").write_text(json.dumps(answer | {{"anomalib": "0", "torch": "0"}}))
"""


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_maps_come_back_to_the_evaluations_own_metrics(params: Path, tmp_path: Path) -> None:
    python = executable(tmp_path / "python", STAND_IN.format(python=sys.executable))
    settings = bench_settings(params, "brushed_metal", tmp_path / "data")
    demo_data.run(settings, tmp_path, "brushed_metal")
    rows = compare(Layout(settings, "brushed_metal", tmp_path), python, {"models": ["patchcore"], "limit": 3})
    assert [row["method"] for row in rows] == ["patchcore", "anomalib-patchcore"]
    assert rows[0]["image_auroc_minus_patchcore"] == [0, 0, 0]
    assert rows[1]["image_auroc_minus_patchcore"][0] == pytest.approx(rows[1]["image_auroc"] - rows[0]["image_auroc"])
    assert rows[1]["fit_seconds"] == 1.5
    assert all(row["fit_images"] == 3 for row in rows)


def test_answers_are_replayed_in_the_order_of_calibration_and_test(tmp_path: Path) -> None:
    for part, values in (("calibration", [0, 1, 2]), ("test", [3, 4])):
        np.save(
            tmp_path / f"m.{part}.npy", np.asarray(values, np.float32)[:, None, None] * np.ones((1, 2, 2), np.float32)
        )
    np.savez(tmp_path / "m.scores.npz", calibration=np.asarray([0, 1, 2]), test=np.asarray([3, 4]))
    score = replay(tmp_path, "m")
    seen = [score(np.zeros((count, 3, 2, 2), np.float32)) for count in (2, 1, 2)]
    assert np.concatenate([maps[:, 0, 0] for maps, _ in seen]).tolist() == [0, 1, 2, 3, 4]
    assert np.concatenate([scores for _, scores in seen]).tolist() == [0, 1, 2, 3, 4]


def test_options_that_make_no_sense_are_refused(params: Path) -> None:
    with pytest.raises(UserError, match="--models `padim` is unknown"):
        main(["--params", str(params), "--models", "padim"])
    with pytest.raises(UserError, match="belong together"):
        main(["--params", str(params), "--backbone", "resnet18"])
    with pytest.raises(UserError, match="make bench-anomalib"):
        main(["--params", str(params), "--python", "nowhere/python"])


def test_the_runner_needs_nothing_of_flawsmith(tmp_path: Path) -> None:
    """Its environment has none; only what lies in the folder may decide."""
    (tmp_path / "request.json").write_text(json.dumps({"models": []}))
    script = (
        "import sys; sys.modules['flawsmith'] = None\n"
        "import types; anomalib = sys.modules['anomalib'] = types.ModuleType('anomalib'); anomalib.__version__ = '1'\n"
        f"import runpy; sys.argv = ['runner', {str(tmp_path)!r}]\n"
        f"runpy.run_path({anomalib_runner.__file__!r}, run_name='__main__')\n"
    )
    for name in ("fit", "calibration", "test"):
        np.save(tmp_path / f"{name}.npy", np.zeros((1, 3, 8, 8), np.uint8))
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(1)}, tmp_path / "teacher.safetensors")
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    assert json.loads((tmp_path / "answer.json").read_text())["anomalib"] == "1"


def test_weights_that_do_not_fit_anomalibs_backbone_are_not_left_random() -> None:
    body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1))
    state = {key: torch.full_like(value, 2.0) for key, value in body.state_dict().items()}
    anomalib_runner.load_teacher(body, state)
    assert all((value == 2).all() for value in body.state_dict().values())
    del state["1.weight"]
    with pytest.raises(SystemExit, match=r"lack 1\.weight"):
        anomalib_runner.load_teacher(body, state)
    cut = nn.Module()
    cut.blocks = nn.Sequential(*(nn.Conv2d(2, 2, 1) for _ in range(3)))
    state = {key: value.clone() for key, value in cut.state_dict().items() if not key.startswith("blocks.2")}
    anomalib_runner.load_teacher(cut, state)  # what lies beyond the teacher's deepest block may stay random
    del state["blocks.0.bias"]
    with pytest.raises(SystemExit, match=r"lack blocks\.0\.bias"):
        anomalib_runner.load_teacher(cut, state)


def test_pixels_are_normalised_as_the_teacher_was_trained() -> None:
    request = {"mean": [0.5, 0.0, 1.0], "std": [0.5, 1.0, 2.0]}
    images = np.full((1, 3, 2, 2), 255, np.uint8)
    assert anomalib_runner.normalised(images, request)[0, :, 0, 0].tolist() == [1.0, 1.0, 0.0]
