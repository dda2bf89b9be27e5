"""What a network costs, counted from its ONNX graph: multiply-adds and parameters, by type of node and by part.

Counted are the operations that make nearly all the work (Conv, Gemm, MatMul, Einsum), one multiply-add for each product
that enters a sum; a bias or an activation counts nothing, as in torch.utils.flop_counter, whose FLOPs are twice this.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx

from flawsmith.errors import FlawsmithError

REST = "rest"  # the part of nodes and weights that belong to no module
COUNTED = ("Conv", "Gemm", "MatMul", "Einsum")
_FLOATING = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE, onnx.TensorProto.BFLOAT16}
_Shape = tuple[int, ...]


@dataclass(frozen=True)
class NodeCost:
    """Multiply-adds of one node for one image."""

    name: str
    op_type: str
    part: str
    multiply_adds: int


@dataclass(frozen=True)
class Cost:
    """Of one image: every counted node in the graph's order; floating-point parameters by part of the network."""

    nodes: tuple[NodeCost, ...]
    parameters: Mapping[str, int]

    @property
    def multiply_adds(self) -> int:
        return sum(node.multiply_adds for node in self.nodes)

    def to_json(self) -> dict[str, Any]:
        """Totals, then by part and by type of node."""
        by_part, by_type = Counter[str](), Counter[str]()
        for node in self.nodes:
            by_part[node.part] += node.multiply_adds
            by_type[node.op_type] += node.multiply_adds
        return {
            "multiply_adds": self.multiply_adds,
            "parameters": sum(self.parameters.values()),
            "by_part": {
                part: {"multiply_adds": by_part[part], "parameters": self.parameters.get(part, 0)}
                for part in sorted({*by_part, *self.parameters})
            },
            "by_type": dict(sorted(by_type.items())),
        }

    def describe(self) -> str:
        """One line for the log, the costliest part first."""
        content = self.to_json()
        parts = sorted(content["by_part"].items(), key=lambda item: -item[1]["multiply_adds"])
        named = [f"{part} {figures['multiply_adds'] / 1e6:.0f}M" for part, figures in parts if figures["multiply_adds"]]
        return (
            f"{self.multiply_adds / 1e9:.2f}G multiply-adds an image ({', '.join(named)}), "
            f"{content['parameters'] / 1e6:.2f}M parameters"
        )


def count(model: onnx.ModelProto) -> Cost:
    """Count a graph that `export_onnx` wrote, or a float16 variant of it; the model stays as it is.

    A node's part is the outermost module in its name (`name_nodes`), a weight's that of the nodes it serves.

    Raises:
        FlawsmithError: the shape of a counted node cannot be inferred.
    """
    shapes = _shapes(model)
    nodes = tuple(
        NodeCost(node.name, node.op_type, _part(node.name), _multiply_adds(node, shapes))
        for node in model.graph.node
        if node.op_type in COUNTED
    )
    serves = {name: _part(node.name) for node in reversed(model.graph.node) for name in node.input}
    parameters = Counter[str]()
    for tensor in model.graph.initializer:
        if tensor.data_type in _FLOATING:
            parameters[serves.get(tensor.name, REST)] += math.prod(tensor.dims)
    return Cost(nodes, dict(sorted(parameters.items())))


def _part(name: str) -> str:
    module, slash, _ = name.partition("/")
    return module.partition(".")[0] if slash else REST


def _shapes(model: onnx.ModelProto) -> dict[str, _Shape]:
    """The shape of every tensor whose dimensions are known for one image."""
    single = onnx.ModelProto()
    single.CopyFrom(model)
    single.graph.ClearField("value_info")
    for item in (*single.graph.input, *single.graph.output):
        for dimension in item.type.tensor_type.shape.dim:
            if dimension.dim_param:
                dimension.dim_value = 1  # replaces the name: the two are one field
    graph = onnx.shape_inference.infer_shapes(single, data_prop=True).graph
    found: dict[str, _Shape] = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for item in (*graph.input, *graph.output, *graph.value_info):
        dimensions = item.type.tensor_type.shape.dim
        if all(dimension.HasField("dim_value") for dimension in dimensions):
            found[item.name] = tuple(dimension.dim_value for dimension in dimensions)
    return found


def _multiply_adds(node: onnx.NodeProto, shapes: Mapping[str, _Shape]) -> int:
    try:
        inputs, output = [shapes[name] for name in node.input[:2]], shapes[node.output[0]]
    except KeyError as error:
        raise FlawsmithError(
            f"The shape of {error} in the exported graph is unknown, so {node.op_type} {node.name} cannot be counted."
        ) from error
    if node.op_type == "Einsum":
        return _einsum(node, inputs)
    if node.op_type == "Conv":  # the weight is (outputs, inputs of a group, *kernel)
        return math.prod(output) * math.prod(inputs[1][1:])
    transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
    return math.prod(output) * inputs[0][0 if transposed else -1]


def _einsum(node: onnx.NodeProto, inputs: Sequence[_Shape]) -> int:
    """One product for each combination of all indices, as a loop over them would do it."""
    equation = next(attribute.s.decode() for attribute in node.attribute if attribute.name == "equation")
    terms = equation.replace(" ", "").partition("->")[0].split(",")
    if "." in equation or len(node.input) != 2:
        raise FlawsmithError(f"Einsum {node.name} ({equation}) cannot be counted: only two operands without `...` can.")
    return math.prod(
        {
            index: size
            for term, shape in zip(terms, inputs, strict=True)
            for index, size in zip(term, shape, strict=True)
        }.values()
    )
