"""anomalib's models as ONNX files: `flawsmith_lab.bench.latency` runs this where anomalib is installed, not flawsmith.

    python -P latency_peers.py FOLDER

FOLDER holds request.json: seed, backbone and vectors of PatchCore, and the wanted `files` as [MODEL, SIZE, BATCH]. Left
there: the ONNX files, and answer.json with versions and the `files` in the same order.

Weights are random and nothing is downloaded: a network takes as long for its answer whether it has learned anything or
not. The export is anomalib's own, pre-processing and post-processing included.
"""

import json
import shutil
import sys
import tempfile
import warnings
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

Answer = dict[str, Any]
# PatchCore searches its memory in chunks, whose number the exporter takes for a constant: a file for each batch size.
FIXED_BATCH = {"patchcore"}


def main(folder: Path) -> None:
    """Export what request.json asks for."""
    request = json.loads((folder / "request.json").read_text())
    answer: Answer = {
        "anomalib": import_module("anomalib").__version__,
        "torch": torch.__version__,
        "openvino": import_module("openvino").__version__ if find_spec("openvino") else None,
        "files": [str(export(name, size, batch, request, folder)) for name, size, batch in request["files"]],
    }
    (folder / "answer.json").write_text(json.dumps(answer))


def export(name: str, size: int, batch: int, request: Answer, folder: Path) -> Path:
    """The ONNX file of a model for images (batch, 3, size, size), made if it is not there; weights lie beside it."""
    fixed = name in FIXED_BATCH
    path = folder / (f"{name}-{size}-b{batch}.onnx" if fixed else f"{name}-{size}.onnx")
    if path.exists():
        return path
    torch.manual_seed(request["seed"])  # layers draw their initial weights from the global generator
    model = patchcore(size, request) if name == "patchcore" else efficient_ad(size)
    options: Answer = {"opset_version": 18, "verbose": False}
    if fixed:
        options["dynamic_shapes"] = ({0: batch},)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        written = Path(model.to_onnx(scratch, path.stem, (size, size), **options))
        for part in sorted(written.parent.iterdir(), reverse=True):  # the weights, then what refers to them
            shutil.move(part, folder / part.name)
    return path


def efficient_ad(size: int) -> Any:
    """EfficientAD-S (Batzner et al., WACV 2024), anomalib's model size `small`."""
    kind = import_module("anomalib.models").EfficientAd
    model = kind(model_size="small", pre_processor=kind.configure_pre_processor((size, size)))
    inner = model.model
    with torch.no_grad():  # as after training: unset, the graph would leave the normalisation of features and maps out
        inner.mean_std["std"].fill_(1.0)
        for name, value in {"qa_st": 0.1, "qb_st": 0.2, "qa_ae": 0.1, "qb_ae": 0.2}.items():
            inner.quantiles[name].fill_(value)
    return model


def patchcore(size: int, request: Answer) -> Any:
    """PatchCore (Roth et al., CVPR 2022) with anomalib's default network and a memory of random vectors."""
    kind = import_module("anomalib.models").Patchcore
    model = kind(
        backbone=request["backbone"], pre_trained=False, pre_processor=kind.configure_pre_processor((size, size))
    )
    inner = model.model
    with torch.no_grad():
        embedding = inner.eval().feature_extractor(torch.zeros(1, 3, 64, 64))
        width = sum(embedding[layer].shape[1] for layer in inner.layers)
        inner.memory_bank = torch.rand(request["vectors"], width)
    return model


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
