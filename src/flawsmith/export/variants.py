"""Variants of model.onnx in lower precision: float16 for GPUs, 8-bit integers for CPUs.

Both lower the precision of the convolutions that do the work and leave in float32 what carries the calibration: the
L2 normalisation and the search in the memory, the normalisation of the maps, smoothing, pooled score and threshold. A
variant keeps model.onnx's inputs, outputs and metadata, so whatever reads the one reads the other.
"""

import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
from numpy.typing import NDArray

from flawsmith.errors import FlawsmithError
from flawsmith.inference.metadata import INPUT_NAME, OUTPUT_NAMES

FP16, INT8 = "fp16", "int8"

_ACTIVATIONS = ("Relu", "Clip")
# what stays in float16 between convolutions, if all it reads is float16; none of them sums over many values
_BETWEEN = (*_ACTIVATIONS, "Add", "Concat", "Resize", "HardSwish", "HardSigmoid", "Sigmoid", "Mul", "LeakyRelu")
_NARROW = 8  # fewer channels on either side are no work worth rounding: the image, a distance, a logit
_HALF_LIMIT = 65504.0 / 4  # a GPU's float16 overflows at 65504: no value seen here may come near


def to_fp16(model: onnx.ModelProto, images: Iterable[NDArray[np.float32]]) -> onnx.ModelProto:
    """Rewrite the convolutions, and what lies between them, to float16; inputs and outputs stay float32.

    Args:
        model: what `write_model` wrote; it is changed in place.
        images: (3, H, W) each, to look for values that float16 cannot hold. onnxruntime computes float16 in float32 on
            a CPU, so such a model would be right here and answer infinity on a GPU.

    Raises:
        FlawsmithError: such a value was found.
    """
    half = _half_nodes(model)
    answers = [name for node in model.graph.node if node.name in half for name in node.output]
    peak = _largest(model, answers, images)
    if not peak <= _HALF_LIMIT:
        raise FlawsmithError(f"a value inside reaches {peak:.3g}, too near to the largest that float16 holds")
    _lower(model.graph, half)
    return model


def to_int8(model: onnx.ModelProto, images: Iterable[NDArray[np.float32]]) -> onnx.ModelProto:
    """Bring the large convolutions to 8-bit integers (QDQ), with one scale a channel of weights, one an activation.

    Weights use 7 bits: a CPU without VNNI adds two 8-bit products in 16 bits, which saturates, so that the same file
    would answer differently on another machine.

    Args:
        model: what `write_model` wrote; it stays as it is.
        images: (3, H, W) each, normal and defective, which choose the ranges of the activations.

    Raises:
        FlawsmithError: there is no such convolution.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    quantised = _quantised_nodes(model)
    if not quantised:  # onnxruntime would take an empty list for "all"
        raise FlawsmithError("it has no dense convolution with an activation behind it")
    feeds = ({INPUT_NAME: image[None]} for image in images)
    with tempfile.TemporaryDirectory() as folder, _quiet():
        before, after = Path(folder, "before.onnx"), Path(folder, "after.onnx")
        before.write_bytes(model.SerializeToString(deterministic=True))
        quantize_static(
            before,
            after,
            SimpleNamespace(get_next=lambda: next(feeds, None)),  # all that calibration asks of a reader
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv", *_ACTIVATIONS],
            nodes_to_quantize=quantised,
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
        )
        made = onnx.load(after)
    _bypass(made.graph, set(quantised))
    return made


MAKERS: Mapping[str, Callable[[onnx.ModelProto, Iterable[NDArray[np.float32]]], onnx.ModelProto]] = {
    FP16: to_fp16,
    INT8: to_int8,
}


def _half_nodes(model: onnx.ModelProto) -> set[str]:
    """Convolutions of several channels, and what lies between them and reads nothing but their answers."""
    weights = _weight_shapes(model)
    half: set[str] = set()
    answered: set[str] = set()
    for node in model.graph.node:  # in order of computation
        read = [name for name in node.input if name and name not in weights]
        if node.op_type == "Resize":
            read = read[:1]  # sizes are whole numbers
        if node.op_type == "Conv":
            groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
            outputs, inputs, *_ = weights.get(node.input[1], (0, 0))  # a computed weight stays as it is
            chosen = min(outputs, inputs * groups) > 1
        else:
            chosen = node.op_type in _BETWEEN and bool(read) and answered.issuperset(read)
        if chosen and not set(node.output) & set(OUTPUT_NAMES):
            half.add(node.name)
            answered.update(node.output)
    return half


def _lower(graph: onnx.GraphProto, half: set[str]) -> None:
    """Rewrite the nodes in `half` to float16, in place, with a cast wherever a value goes from one type to the other.

    onnxruntime's own converter casts the graph's input and outputs to float16 and back even where only float32 nodes
    touch them, which would round every score.
    """
    floats = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT}
    half_values = {name for node in graph.node if node.name in half for name in node.output}
    made: set[str] = set()
    nodes: list[onnx.NodeProto] = []

    def cast(name: str, kind: int, suffix: str) -> str:
        if name + suffix not in made:
            made.add(name + suffix)
            nodes.append(onnx.helper.make_node("Cast", [name], [name + suffix], f"{name}{suffix}", to=kind))
        return name + suffix

    def rounded(name: str) -> str:
        tensor = floats[name]
        if f"{name}_half" not in made:
            made.add(f"{name}_half")
            values = onnx.numpy_helper.to_array(tensor).astype(np.float16)
            graph.initializer.append(onnx.numpy_helper.from_array(values, f"{name}_half"))
        return f"{name}_half"

    for node in list(graph.node):
        lowered = node.name in half
        for place, name in enumerate(node.input):
            if not name or (node.op_type == "Resize" and place > 0):
                continue  # the scales of a Resize are float32 whatever it resizes
            if lowered and name in floats:
                node.input[place] = rounded(name)
            elif lowered and name not in half_values:
                node.input[place] = cast(name, onnx.TensorProto.FLOAT16, "_half")
            elif not lowered and name in half_values:
                node.input[place] = cast(name, onnx.TensorProto.FLOAT, "_single")
        nodes.append(node)
    graph.ClearField("node")
    graph.node.extend(nodes)
    read = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    graph.ClearField("initializer")
    graph.initializer.extend(kept)


def _quantised_nodes(model: onnx.ModelProto) -> list[str]:
    """Dense convolutions with an activation behind them, and that activation, which the quantised range then replaces.

    Others cost more accuracy than they save work. Depthwise ones are few multiply-adds; those without an activation
    answer features that are compared, or summed for many blocks.
    """
    weights = _weight_shapes(model)
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    chosen: list[str] = []
    for node in model.graph.node:
        after = readers.get(node.output[0], [])
        # a depthwise one has a single input a group
        dense = node.op_type == "Conv" and min(weights.get(node.input[1], (0,))[:2]) >= _NARROW
        if dense and len(after) == 1 and after[0].op_type in _ACTIVATIONS:
            chosen += [node.name, after[0].name]
    return chosen


def _bypass(graph: onnx.GraphProto, quantised: set[str]) -> None:
    """Let every node in float read a value itself, in place, not the rounded copy made for a convolution beside it.

    What a quantised convolution answers has no such original: its range stands for the activation behind it.
    """
    source = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "QuantizeLinear"}
    answers = {name for node in graph.node if node.name in quantised for name in node.output}
    original = {
        node.output[0]: source[node.input[0]]
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in source and source[node.input[0]] not in answers
    }
    for node in graph.node:
        if node.name not in quantised:
            for place, name in enumerate(node.input):
                if name in original:
                    node.input[place] = original[name]


def _weight_shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}


def _largest(model: onnx.ModelProto, names: list[str], images: Iterable[NDArray[np.float32]]) -> float:
    """The largest absolute value of the named tensors over all images; infinite if one is NaN."""
    import onnxruntime

    from flawsmith.inference.providers import CPU, open_session

    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    probe.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names)
    # on the CPU: whether a variant is made must not depend on the machine
    session, _ = open_session(probe.SerializeToString(), onnxruntime.SessionOptions(), CPU)
    return max(
        (
            float(np.nan_to_num(np.abs(values), nan=np.inf).max())
            for image in images
            for values in (session.run(names, {INPUT_NAME: image[None]}) if names else ())
        ),
        default=0.0,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """The tools log advice about steps that the exporter has done already, to the root logger."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
