"""A project whose stages have run, as far as the registry can see, with tiny models whose answers are known."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from onnx import TensorProto, helper, numpy_helper

from flawsmith.config import load_settings
from flawsmith.data.images import write_png
from flawsmith.data.triplets import TripletFolder
from flawsmith.dvc import content_digest
from flawsmith.files import digest_file, write_json
from flawsmith.inference.metadata import ModelMetadata
from flawsmith.layout import Layout
from flawsmith.registry.history import history
from flawsmith.registry.store import Registry
from flawsmith.tracking import stage_run

SIDE = 64
MADE = "artifacts/plate"
STAGES = {  # what each reads and leaves
    "synthesize": (["data/plate/train", "code.py"], [f"{MADE}/synthesize"]),
    "validate": ([f"{MADE}/synthesize"], [f"{MADE}/validate/docs", f"{MADE}/validate/verdict.json"]),
    "evaluate": (
        [f"{MADE}/synthesize", "data/plate"],
        [f"{MADE}/evaluate/metrics.json", f"{MADE}/evaluate/report.html"],
    ),
    "export": (
        [f"{MADE}/synthesize", f"{MADE}/validate/verdict.json", f"{MADE}/evaluate/metrics.json"],
        [f"{MADE}/export/model.onnx", f"{MADE}/export/parity.json"],
    ),
}
PARAMS = Path(__file__).parents[2] / "params.yaml"


def onnx_model(gain: float, noise: float, path: Path) -> None:
    """Map = gain * brightness + noise * an image-dependent wave; score = its largest value."""
    constants = {
        "channel": np.array([1]), "all": np.array([1, 2, 3]), "gain": np.array(gain, np.float32),
        "noise": np.array(noise, np.float32), "fast": np.array(5000, np.float32),
    }  # fmt: skip
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMean", ["image", "channel"], ["brightness"], keepdims=1),
            helper.make_node("Mul", ["brightness", "gain"], ["signal"]),
            helper.make_node("ReduceMean", ["image", "all"], ["level"], keepdims=1),
            helper.make_node("Mul", ["level", "fast"], ["phase"]),
            helper.make_node("Sin", ["phase"], ["wave"]),
            helper.make_node("Mul", ["wave", "noise"], ["disturbance"]),
            helper.make_node("Add", ["signal", "disturbance"], ["anomaly_map"]),
            helper.make_node("ReduceMax", ["anomaly_map", "all"], ["score"], keepdims=0),
        ],
        "known",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, SIDE, SIDE])],
        [
            helper.make_tensor_value_info("anomaly_map", TensorProto.FLOAT, ["batch", 1, SIDE, SIDE]),
            helper.make_tensor_value_info("score", TensorProto.FLOAT, ["batch"]),
        ],
        initializer=[numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    metadata = ModelMetadata("plate", 0.62 * gain + noise, 0.62, 0.05, 0.0, 1.0, "ab" * 32, "none", "0.1.0")
    helper.set_model_props(model, metadata.to_properties())
    path.write_bytes(model.SerializeToString())


def draw(generator: np.random.Generator, spots: int = 0) -> tuple[Any, Any]:
    """A gray plate with noise, and bright spots as defects: image (3, S, S) and mask (S, S)."""
    image = 0.4 + 0.02 * generator.standard_normal((SIDE, SIDE))
    mask = np.zeros((SIDE, SIDE), np.bool_)
    for _ in range(spots):
        row, column = generator.integers(4, SIDE - 8, 2)
        mask[row : row + 4, column : column + 4] = True
    image = np.where(mask, image + 0.35, image)
    return np.repeat(np.clip(image, 0, 1)[None], 3, axis=0).astype(np.float32), mask


class Plant:
    """A project whose stages have run, as far as the registry can see."""

    def __init__(self, root: Path, labelled: bool = True, **promote: Any) -> None:
        root.mkdir(parents=True, exist_ok=True)
        content = yaml.safe_load(PARAMS.read_text())
        content["data"]["image_size"] = SIDE
        content["ddpm-train"]["crop"], content["synthesize"]["windows"] = 64, [64]
        content["promote"].update({"bootstrap": 200, "latency_runs": 3, "max_latency_ratio": 100.0, **promote})
        (root / "params.yaml").write_text(yaml.safe_dump(content))
        (root / "code.py").write_text("code = 1\n")
        matrix = {"matrix": {"category": ["plate"]}, "cmd": "true"}
        stages = {name: matrix | {"deps": reads, "outs": leaves} for name, (reads, leaves) in STAGES.items()}
        (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
        (root / ".dvc").mkdir()
        (root / ".dvc" / "config").write_text("[core]\n    no_scm = True\n")
        self.layout = Layout(load_settings(root / "params.yaml"), "plate", root)
        generator, data = np.random.default_rng(0), root / "data" / "plate"
        for index in range(20):
            write_png(data / "train" / "good" / f"{index:03}.png", draw(generator)[0])
        if labelled:
            for index in range(12):
                write_png(data / "test" / "good" / f"{index:03}.png", draw(generator)[0])
                image, mask = draw(generator, spots=1 + index % 2)
                kind = "pit" if index % 2 else "scratch"
                write_png(data / "test" / kind / f"{index:03}.png", image)
                write_png(data / "ground_truth" / kind / f"{index:03}_mask.png", mask)
        triplets = TripletFolder(self.layout.stage("synthesize"))
        rows = []
        for index in range(6):
            normal, _ = draw(generator)
            image, mask = draw(generator, spots=1)
            as_bytes = [np.rint(part * 255).astype(np.uint8) for part in (normal, image)]
            triplets.write(f"val-{index:05}", *as_bytes, mask)
            rows.append({"triplet_id": f"val-{index:05}", "role": "val", "source": f"{index:03}.png"})
        pd.DataFrame(rows).to_parquet(triplets.folder / "manifest.parquet")

    def train(self, gain: float = 1.0, noise: float = 0.0, gate: bool = True, flips: int = 0) -> str:
        """Write and record the stages' outputs; the digest of the model."""
        layout, stage = self.layout, self.layout.stage
        with stage_run(layout, "synthesize", {}) as run:
            run.set_output(stage("synthesize"))
        with stage_run(layout, "validate", {}) as run:
            failed = {"name": "triplet_count", "failing": 3, "passed": gate, "severity": "critical"}
            severity = None if gate else "critical"
            verdict = {"passed": gate, "severity": severity, "triplets": 6, "expectations": [failed]}
            write_json(stage("validate") / "verdict.json", verdict)
            (stage("validate") / "docs").mkdir(exist_ok=True)
            (stage("validate") / "docs" / "index.html").write_text("<h1>Data Docs</h1>")
            run.set_output(stage("validate") / "verdict.json")
        metrics = {"image_auroc": 1.0, "pixel_auroc": 1.0, "aupro": 1.0, "labelled": True, "gain": gain, "noise": noise}
        write_json(stage("evaluate") / "metrics.json", metrics)
        (stage("evaluate") / "report.html").write_text("<h1>Report</h1>")
        with stage_run(layout, "export", {"gain": gain}) as run:
            model = stage("export") / "model.onnx"
            model.parent.mkdir(parents=True, exist_ok=True)
            onnx_model(gain, noise, model)
            figures = {"map_difference": 0.0, "score_difference": 0.0, "decision_flips": flips}
            proof = {"batches": {"1": figures}, "model_digest": digest_file(model), "tolerance": 0.001}
            write_json(stage("export") / "parity.json", proof)
            run.set_output(model)
        self.lock()
        return digest_file(model)

    def lock(self) -> None:
        """Write dvc.lock as DVC would: without its processes, which cost seconds."""

        def entries(paths: list[str]) -> list[dict[str, str]]:
            root = self.layout.root
            return [{"path": path, "hash": "md5", "md5": content_digest(root / path)} for path in paths]

        stages = {
            f"{name}@plate": {"cmd": "true", "deps": entries(reads), "outs": entries(leaves)}
            for name, (reads, leaves) in STAGES.items()
        }
        (self.layout.root / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}))

    def with_settings(self, **changes: Any) -> Layout:
        rules = replace(self.layout.settings.promote, **changes)
        return replace(self.layout, settings=replace(self.layout.settings, promote=rules))

    @property
    def registry(self) -> Registry:
        return Registry(self.layout.root, "plate")

    def trail(self) -> list[tuple[str, str, bool]]:
        return [(item["kind"], item["version"], item["lost"]) for item in history(self.layout)["trail"]]
