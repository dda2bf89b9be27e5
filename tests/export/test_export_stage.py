import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toy_detector import SIZE, Exported

import flawsmith.stages.export as stage
from flawsmith.config import load_settings
from flawsmith.data.triplets import TripletFolder
from flawsmith.errors import FlawsmithError, UserError
from flawsmith.files import digest_path, write_json
from flawsmith.inference.predictor import Predictor
from flawsmith.layout import Layout


@pytest.fixture
def layout(exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    """A project whose earlier stages are done, but for the detector's own file format."""
    exported.detector.config = SimpleNamespace(shape=(SIZE, SIZE), backbone="toy")  # type: ignore[assignment]
    monkeypatch.setattr(stage, "load_detector", lambda folder: exported.detector)
    settings = load_settings(
        Path(__file__).parents[2] / "params.yaml", {"tracking.mode": "off", "export.latency_runs": 3}
    )
    layout = Layout(settings, "toy", tmp_path)
    weights = layout.stage("distill") / "detector.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"weights")
    kept = ("threshold", "pixel_threshold", "typical_score", "false_alarm_rate")
    write_json(layout.stage("evaluate") / "metrics.json", {key: getattr(exported.metadata, key) for key in kept})
    for folder in (layout.stage("evaluate") / "parity", tmp_path / "data" / "toy" / "train" / "good"):
        folder.mkdir(parents=True)
        for source in exported.sources:
            (folder / source.name).write_bytes(source.read_bytes())
    (layout.stage("evaluate") / "network.onnx").write_bytes(exported.network.read_bytes())
    return layout


def test_the_stage_leaves_a_proven_model(layout: Layout, exported: Exported, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="flawsmith"):
        stage.run(layout)
    out = layout.stage("export")
    assert sorted(path.name for path in out.iterdir()) == ["cost.json", "model.onnx", "parity.json", "variants"]
    assert {path.name: path.read_text().strip() for path in (out / "variants").iterdir()} == {"summary.json": "{}"}
    predictor = Predictor(out / "model.onnx")
    expected = replace(
        exported.metadata,
        detector_digest=digest_path(layout.stage("distill")),
        map_low=predictor.metadata.map_low,
        map_high=predictor.metadata.map_high,
    )
    assert predictor.metadata == expected
    proof = json.loads((out / "parity.json").read_text())
    assert (out / "model.onnx").read_bytes() != exported.network.read_bytes()
    assert proof["model_digest"] == digest_path(out / "model.onnx")
    assert [image["file"] for image in proof["images"]] == [path.name for path in exported.sources]
    # how fast this machine is, is said but is no part of the result
    said = [record.getMessage() for record in caplog.records if "images/s" in record.getMessage()]
    assert [line.split(":")[1].strip() for line in said] == ["batch 1", "batch 8"]


def test_variants_are_kept_or_refused_and_the_stage_succeeds(
    layout: Layout, exported: Exported, caplog: pytest.LogCaptureFixture
) -> None:
    limits = {"max_auroc_loss": 1.0, "max_flip_share": 1.0}
    asked = replace(
        layout.settings,
        data=replace(layout.settings.data, image_size=SIZE),
        export=replace(layout.settings.export, variants=("fp16", "int8"), **limits),
    )
    layout = replace(layout, settings=asked)
    generator, triplets = np.random.default_rng(0), TripletFolder(layout.stage("synthesize"))
    names = ("fit-00000", "fit-00001", "val-00002", "val-00003")
    rows = [
        {"triplet_id": name, "role": name[:3], "shade_change": 0.1 if name == "val-00003" else None} for name in names
    ]
    for name in names:
        normal, defect = generator.integers(0, 256, (2, 3, 2 * SIZE, 2 * SIZE), np.uint8)
        triplets.write(name, normal, defect, np.ones((2 * SIZE, 2 * SIZE), np.bool_))
    pq.write_table(pa.Table.from_pylist(rows), triplets.folder / "manifest.parquet")
    with caplog.at_level("INFO", logger="flawsmith"):
        stage.run(layout)
    out = layout.stage("export") / "variants"
    assert sorted(path.name for path in out.iterdir()) == [
        "model-fp16.onnx", "parity-fp16.json", "parity-int8.json", "summary.json",
    ]  # fmt: skip
    summary = json.loads((out / "summary.json").read_text())
    assert summary["fp16"] == {"exported": True, "reasons": []}
    # the toy's only dense convolution has a group norm behind it
    assert summary["int8"] == {
        "exported": False,
        "reasons": ["it has no dense convolution with an activation behind it"],
    }
    assert any("no int8 variant" in record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert any("fp16, batch 8: p50" in record.getMessage() for record in caplog.records)
    report = json.loads((out / "parity-fp16.json").read_text())
    assert report["reference_digest"] == digest_path(layout.stage("export") / "model.onnx")
    assert report["held_out_defects"]["images"] == 1  # the shade is none
    assert report["parity_images"]["images"] == len(exported.sources)
    assert report["made_from_images"] == report["calibration_normals"]["images"] + 2
    assert Predictor(out / "model-fp16.onnx").metadata.precision == "fp16"


def test_a_model_that_disagrees_leaves_the_earlier_export(layout: Layout) -> None:
    out = layout.stage("export")
    out.mkdir()
    (out / "model.onnx").write_bytes(b"the proven one")
    network = layout.stage("evaluate") / "network.onnx"
    model = onnx.load(network)
    (weight,) = (item for item in model.graph.initializer if item.name.endswith("decoder.3.weight"))
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * 1.5, weight.name))
    onnx.save(model, network)
    with pytest.raises(FlawsmithError, match="does not agree with the trained detector"):
        stage.run(layout)
    assert [path.name for path in layout.stage("export").parent.iterdir() if "export" in path.name] == ["export"]
    assert [path.read_bytes() for path in out.iterdir()] == [b"the proven one"]


@pytest.mark.parametrize(
    "missing",
    ["distill/detector.safetensors", "evaluate/metrics.json", "evaluate/network.onnx", "evaluate/parity/*.png"],
)
def test_what_is_missing_is_named(layout: Layout, missing: str) -> None:
    folder = layout.root / "artifacts" / "toy"
    for path in folder.glob(missing):
        path.unlink()
    with pytest.raises(UserError, match=missing.split("/")[0]):
        stage.run(layout)
    assert not layout.stage("export").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("metrics.json", b"{}", r"metrics\.json has no `threshold`"),
        ("network.onnx", b"no network", r"network\.onnx is damaged; run `flawsmith evaluate"),
    ],
)
def test_what_is_damaged_is_refused(layout: Layout, name: str, content: bytes, words: str) -> None:
    (layout.stage("evaluate") / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        stage.run(layout)
    assert not layout.stage("export").exists()
