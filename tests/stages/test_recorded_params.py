"""What a stage's MLflow run says it was decided by, against what dvc.yaml says."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from toy_onnx import write_toy

from flawsmith.config import load_settings
from flawsmith.data.images import write_png
from flawsmith.data.triplets import TripletFolder
from flawsmith.files import write_json
from flawsmith.layout import Layout
from flawsmith.stages import ddpm_train, distill, evaluate, export, synthesize, validate

ROOT = Path(__file__).parents[2]
STAGES = {"ddpm-train": ddpm_train, "synthesize": synthesize, "validate": validate, "distill": distill,
          "evaluate": evaluate, "export": export}  # fmt: skip


class RecordedError(Exception):
    """The stage has said what decides it."""


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_records_what_dvc_reruns_it_for(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout(load_settings(ROOT / "params.yaml", {"categories": ["plate"]}), "plate", tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), np.uint8)
    image = images[0]
    for index in range(20):
        write_png(tmp_path / f"data/plate/train/good/{index:03}.png", images[index])
        write_png(tmp_path / f"data/plate/test/good/{index:03}.png", image)
        write_png(tmp_path / f"data/plate/test/dent/{index:03}.png", image)
        write_png(tmp_path / f"data/plate/ground_truth/dent/{index:03}_mask.png", np.ones((32, 32), np.bool_))
    pixels = image.transpose(2, 0, 1)
    TripletFolder(layout.stage("synthesize")).write("val-00000", pixels, pixels, np.ones((32, 32), np.bool_))
    write_json(layout.stage("validate") / "verdict.json", {"passed": True})
    write_png(layout.stage("evaluate") / "parity" / "a.png", image)
    for stage, file in (("ddpm-train", "unet.safetensors"), ("ddpm-train", "readiness.json"),
                        ("distill", "detector.safetensors"),
                        ("synthesize", "manifest.parquet"), ("evaluate", "metrics.json")):  # fmt: skip
        layout.stage(stage).mkdir(parents=True, exist_ok=True)
        (layout.stage(stage) / file).touch()
    write_toy(layout.stage("evaluate") / "network.onnx")
    recorded: dict[str, Any] = {}

    def record(_layout: Layout, _stage: str, params: Mapping[str, Any]) -> None:
        recorded.update(params)
        raise RecordedError

    monkeypatch.setattr(STAGES[name], "stage_run", record)
    with pytest.raises(RecordedError):
        STAGES[name].run(layout)
    content = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"][name]
    (keys,) = content["params"][0].values()
    assert {name, "data"} <= {key.partition(".")[0] for key in keys}
    assert {name, "data"} <= set(recorded)
    assert recorded["data"]["image_size"] == layout.settings.data.image_size
