"""A detector as one self-contained ONNX file whose bytes depend on its weights and metadata alone."""

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn

from flawsmith.errors import FlawsmithError
from flawsmith.files import atomic_file
from flawsmith.inference.metadata import INPUT_NAME, OUTPUT_NAMES, ModelMetadata

_EXAMPLE_BATCH = 2  # with 1 the exporter would take the batch for a constant
_SCOPES = "pkg.torch.onnx.name_scopes"  # the exporter's note: the modules around a node, outermost first


def export_network(detector: nn.Module, shape: tuple[int, int], opset: int, path: Path) -> None:
    """Write `detector` (eval mode, on the CPU) to `path`, without metadata.

    The graph takes `image` (B, 3, H, W) float32 in [0, 1] with any B and H, W = `shape`, and gives `anomaly_map`
    (B, 1, H, W) and `score` (B,); whatever normalisation the detector does is inside.

    Raises:
        FlawsmithError: the detector does not export, or the result does not pass the ONNX checker.
    """
    if detector.training:
        raise FlawsmithError("The detector is in training mode, so its normalisation would be exported wrongly.")
    example = torch.zeros(_EXAMPLE_BATCH, 3, *shape)
    try:
        program = torch.onnx.export(
            detector,
            (example,),
            dynamo=True,
            input_names=[INPUT_NAME],
            output_names=list(OUTPUT_NAMES),
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=opset,
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        raise FlawsmithError(f"The detector cannot be exported to ONNX opset {opset}: {_root_cause(error)}") from error
    if program is None:
        raise FlawsmithError("torch.onnx.export gave no program; check the versions with `flawsmith doctor`.")
    model = program.model_proto
    name_nodes(model)
    versions = {item.domain: item.version for item in model.opset_import}
    if versions.get("") != opset:
        raise FlawsmithError(f"The exporter wrote opset {versions.get('')} instead of {opset}; set export.opset to it.")
    _finish(model, {}, path)


def write_model(model: onnx.ModelProto, metadata: ModelMetadata, path: Path) -> None:
    """Write a graph with `metadata` inside and nothing of this machine; changes `model` in place.

    Raises:
        FlawsmithError: the graph does not pass the ONNX checker, or is not of the shape that `export_network` promises.
    """
    _finish(model, metadata.to_properties(), path)


def _finish(model: onnx.ModelProto, properties: Mapping[str, str], path: Path) -> None:
    strip_provenance(model)
    onnx.helper.set_model_props(model, dict(sorted(properties.items())))
    _check(model)
    with atomic_file(path) as temporary:
        temporary.write_bytes(model.SerializeToString(deterministic=True))


def name_nodes(model: onnx.ModelProto) -> None:
    """Put before each node's name, in place, the module it comes from: `head.context.0/node_relu`.

    The exporter knows the module only in notes that `strip_provenance` removes. Profiles read it.
    """
    for node in model.graph.node:
        scopes = next((entry.value for entry in node.metadata_props if entry.key == _SCOPES), "[]")
        modules = [name for name in ast.literal_eval(scopes)[:-1] if not name.startswith("_")]
        if modules and modules[-1]:
            node.name = f"{modules[-1]}/{node.name}"


def strip_provenance(message: Any) -> None:
    """Remove what the exporter notes about its own machine: stack traces with absolute paths, doc strings.

    Changes an ONNX message and all that it holds, in place. Intermediate shapes go too: onnxruntime infers them, and
    they carry the same notes.
    """
    for field, value in message.ListFields():
        if field.name in ("doc_string", "metadata_props", "value_info"):
            message.ClearField(field.name)
        elif field.message_type:
            for part in [value] if hasattr(value, "ListFields") else value:
                strip_provenance(part)


def map_range(maps: NDArray[np.float32], pixel_threshold: float) -> tuple[float, float]:
    """The range of map values that heat maps are drawn over: from the usual value of normal surface to as far above
    the pixel threshold, which therefore has the middle colour on every image of every category.

    `maps` (N, 1, H, W) are of any images; only the drawing depends on them, no verdict.
    """
    for low in (float(np.median(maps)), float(maps.min())):
        if low < pixel_threshold:
            break
    else:
        low = pixel_threshold - 1.0  # every pixel lies above the threshold: there is no normal surface to start from
    low = float(f"{low:.6g}")
    return low, 2 * pixel_threshold - low


def _check(model: onnx.ModelProto) -> None:
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise FlawsmithError(f"The exported model is not valid ONNX: {error}") from error
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in model.graph.initializer):
        raise FlawsmithError("The exporter left weights outside the file; the model must be self-contained.")
    dimensions = {
        item.name: [dimension.dim_param or dimension.dim_value for dimension in item.type.tensor_type.shape.dim]
        for item in (*model.graph.input, *model.graph.output)
    }
    height, width = (dimensions.get(INPUT_NAME, [])[2:] + [0, 0])[:2]
    wanted = {
        INPUT_NAME: ["batch", 3, height, width],
        OUTPUT_NAMES[0]: ["batch", 1, height, width],
        OUTPUT_NAMES[1]: ["batch"],
    }
    if dimensions != wanted or not all(isinstance(side, int) and side > 0 for side in (height, width)):
        raise FlawsmithError(f"The exported model has the shapes {dimensions} instead of {wanted}.")


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
