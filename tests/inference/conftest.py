"""A model whose answers are known: the map is the image's brightness, the score its largest value."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from toy_onnx import METADATA, SIZE

from flawsmith.inference.metadata import ModelMetadata


def brightness_model(batch: str | int = "batch", image_name: str = "image") -> onnx.ModelProto:
    axes = [numpy_helper.from_array(np.array(value), name) for name, value in (("channel", [1]), ("all", [1, 2, 3]))]
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMean", [image_name, "channel"], ["anomaly_map"], keepdims=1),
            helper.make_node("ReduceMax", ["anomaly_map", "all"], ["score"], keepdims=0),
        ],
        "brightness",
        [helper.make_tensor_value_info(image_name, TensorProto.FLOAT, [batch, 3, SIZE, SIZE])],
        [
            helper.make_tensor_value_info("anomaly_map", TensorProto.FLOAT, [batch, 1, SIZE, SIZE]),
            helper.make_tensor_value_info("score", TensorProto.FLOAT, [batch]),
        ],
        initializer=axes,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@pytest.fixture(scope="session")
def metadata() -> ModelMetadata:
    return METADATA


@pytest.fixture
def write_model(tmp_path: Path) -> Callable[..., Path]:
    """Write a brightness model; keywords change its metadata, `properties` replaces all of it."""

    def write(
        properties: dict[str, str] | None = None, batch: str | int = "batch", image_name: str = "image", **changes: Any
    ) -> Path:
        model = brightness_model(batch, image_name)
        chosen = replace(METADATA, **changes).to_properties() if properties is None else properties
        helper.set_model_props(model, chosen)
        path = tmp_path / "model.onnx"
        path.write_bytes(model.SerializeToString())
        return path

    return write


@pytest.fixture
def model(write_model: Callable[..., Path]) -> Path:
    return write_model()
