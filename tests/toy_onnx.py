"""Exported models whose answers are known by hand, for the tests that need no trained network."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from flawsmith.inference.metadata import ModelMetadata

SIZE = 32
METADATA = ModelMetadata(
    category="plate",
    threshold=0.5,
    pixel_threshold=0.4,
    false_alarm_rate=0.05,
    map_low=0.1,
    map_high=0.7,
    detector_digest="ab" * 32,
    teacher="none",
    flawsmith_version="0.1.0",
)


def write_toy(
    path: Path,
    gain: float = 1.0,
    weights: Sequence[float] = (1 / 3, 1 / 3, 1 / 3),
    batch: str | int = "batch",
    image_name: str = "image",
    properties: dict[str, str] | None = None,
    shape: tuple[int, int] = (SIZE, SIZE),
    **metadata: Any,
) -> Path:
    """A model whose map is `gain` times the weighted sum of the channels, its score `gain` times the sum's largest.

    With a gain of -1 every answer is that of a gain of 1, negated. Keywords change the metadata, `properties` replace
    it.
    """
    chosen = replace(METADATA, **metadata)
    constants = {
        "weights": np.asarray(weights, np.float32).reshape(1, 3, 1, 1),
        "gain": np.asarray(gain, np.float32),
        "channel": np.asarray([1]),
        "all": np.asarray([1, 2, 3]),
    }
    graph = helper.make_graph(
        [
            helper.make_node("Mul", [image_name, "weights"], ["weighted"]),
            helper.make_node("ReduceSum", ["weighted", "channel"], ["level"], keepdims=1),
            helper.make_node("Mul", ["level", "gain"], ["anomaly_map"]),
            helper.make_node("ReduceMax", ["level", "all"], ["top"], keepdims=0),
            helper.make_node("Mul", ["top", "gain"], ["score"]),
        ],
        "toy",
        [helper.make_tensor_value_info(image_name, TensorProto.FLOAT, [batch, 3, *shape])],
        [
            helper.make_tensor_value_info("anomaly_map", TensorProto.FLOAT, [batch, 1, *shape]),
            helper.make_tensor_value_info("score", TensorProto.FLOAT, [batch]),
        ],
        initializer=[numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    helper.set_model_props(model, chosen.to_properties() if properties is None else properties)
    onnx.save(model, path)
    return path
