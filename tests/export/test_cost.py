"""Multiply-adds and parameters: against a sum done by hand, and against torch's own counter on the real modules."""

import dataclasses
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from toy_detector import SIZE, Exported

from flawsmith.detector.model import Detector
from flawsmith.errors import FlawsmithError
from flawsmith.export.cost import COUNTED, NodeCost, count
from flawsmith.export.onnx import export_onnx


def test_a_small_network_counted_by_hand(exported: Exported) -> None:
    cost = count(onnx.load(exported.path))
    cells = (SIZE // 4) ** 2
    encoder = cells * 8 * 3 * 3 * 3
    decoder = cells * (8 * 8 * 3 * 3 + 8 * 8)
    smoothing = SIZE * (SIZE + 8) * 9 + SIZE * SIZE * 9  # the first of two passes keeps the other axis' border
    content = cost.to_json()
    by_part = {part: figures["multiply_adds"] for part, figures in content["by_part"].items()}
    assert by_part == {"encoder": encoder, "decoder": decoder, "rest": smoothing}
    assert content["multiply_adds"] == content["by_type"]["Conv"] == encoder + decoder + smoothing
    assert content["by_part"]["encoder"]["parameters"] >= 8 * 3 * 9 + 8  # the batch norm is folded into it
    assert content["by_part"]["decoder"]["parameters"] >= 8 * 8 * 9 + 8 + 8 * 8 + 8


def model_of(nodes: list[onnx.NodeProto], shapes: dict[str, list[int]], output: list[int]) -> onnx.ModelProto:
    inputs = [onnx.helper.make_tensor_value_info(name, 1, shape) for name, shape in shapes.items()]
    graph = onnx.helper.make_graph(nodes, "g", inputs, [onnx.helper.make_tensor_value_info("y", 1, output)])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)])


@pytest.mark.parametrize(
    ("node", "shapes", "output", "multiply_adds"),
    [
        (("MatMul", {}), {"a": [5, 4, 3], "b": [5, 3, 7]}, [5, 4, 7], 5 * 4 * 3 * 7),
        (("Gemm", {"transA": 1}), {"a": [3, 4], "b": [3, 7]}, [4, 7], 4 * 3 * 7),
        (("Gemm", {"transB": 1}), {"a": [4, 3], "b": [7, 3]}, [4, 7], 4 * 3 * 7),
        (("Conv", {"group": 6}), {"a": [1, 6, 9, 9], "b": [6, 1, 3, 3]}, [1, 6, 7, 7], 7 * 7 * 6 * 9),
        (("Einsum", {"equation": "bchw, mc -> bmhw"}), {"a": [2, 3, 4, 5], "b": [7, 3]}, [2, 7, 4, 5], 2 * 3 * 20 * 7),
    ],
)
def test_every_counted_type(
    node: tuple[str, dict], shapes: dict[str, list[int]], output: list[int], multiply_adds: int
) -> None:
    made = onnx.helper.make_node(node[0], ["a", "b"], ["y"], "memory.keys/node_1", **node[1])
    cost = count(model_of([made], shapes, output))
    assert cost.nodes == (NodeCost("memory.keys/node_1", node[0], "memory", multiply_adds),)
    assert node[0] in COUNTED


def test_what_cannot_be_counted_is_said() -> None:
    dots = onnx.helper.make_node("Einsum", ["a", "b"], ["y"], "e", equation="...i,i->...")
    with pytest.raises(FlawsmithError, match=r"Einsum e \(.*\) cannot be counted"):
        count(model_of([dots], {"a": [2, 3], "b": [3]}, [2]))
    unknown = onnx.helper.make_node("NonZero", ["a"], ["n"]), onnx.helper.make_node("Cast", ["n"], ["f"], to=1)
    product = onnx.helper.make_node("MatMul", ["f", "b"], ["y"], "m")
    model = model_of([*unknown, product], {"a": [4, 4], "b": [3, 2]}, [2, 2])
    with pytest.raises(FlawsmithError, match="MatMul m cannot be counted"):
        count(model)


def test_the_real_detector_agrees_with_torchs_counter(
    small_detector: Detector, exported: Exported, tmp_path: Path
) -> None:
    path = tmp_path / "m.onnx"
    metadata = dataclasses.replace(exported.metadata, input_size=small_detector.config.image_size)
    export_onnx(small_detector, metadata, 18, path)
    cost = count(onnx.load(path))
    image = torch.zeros(1, 3, metadata.input_size, metadata.input_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        small_detector(image)
    assert 2 * cost.multiply_adds == counter.get_total_flops()
    ours = {part: figures["multiply_adds"] for part, figures in cost.to_json()["by_part"].items()}
    for part in ("teacher", "student", "head", "locator", "memory"):
        theirs = sum(counter.get_flop_counts()[f"{type(small_detector).__name__}.{part}"].values())
        assert 2 * ours[part] == theirs, part
    assert cost.parameters["memory"] >= small_detector.memory.keys.numel()  # type: ignore[union-attr]
    weights = sum(layer.weight.numel() for layer in small_detector.student.modules() if isinstance(layer, nn.Conv2d))
    assert cost.parameters["student"] >= weights
    assert cost.describe().startswith(f"{cost.multiply_adds / 1e9:.2f}G multiply-adds an image (")
