"""Latency of the exported detector beside anomalib's EfficientAD-S and PatchCore, all as ONNX files, in one run.

    python -m flawsmith_lab.bench.latency [--model model.onnx] [--without-anomalib]        (make bench-latency)

Every run is a process of its own, with the same code and the same random images for all models. Rounds take turns
(ours, theirs, ours, ...), so that a noisy machine slows all of them alike.
"""

import argparse
import itertools
import json
import logging
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import timm
import torch
from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
from torch.nn import functional as F

from flawsmith import __version__
from flawsmith.config import Settings
from flawsmith.detector.model import Detector, DetectorConfig
from flawsmith.detector.normals import memory_sizes
from flawsmith.detector.teacher import Teacher
from flawsmith.devices import CPU
from flawsmith.errors import FlawsmithError, UserError
from flawsmith.export.onnx import export_network, write_model
from flawsmith.inference.metadata import ModelMetadata
from flawsmith.inference.predictor import Predictor
from flawsmith.progress import bar
from flawsmith_lab.bench import latency_peers, latency_worker
from flawsmith_lab.bench.measure import bench_settings, describe, finish, guarded, machine, run_script
from flawsmith_lab.markdown import markdown

OURS, PEERS = "flawsmith", ("efficientad", "patchcore")
PRECISIONS = ("fp32", "int8")
NORMALS = 200  # images that the memories of our detector and of PatchCore would be filled from
PATCHCORE_NETWORK, PATCHCORE_STRIDE, PATCHCORE_CORESET = "wide_resnet50_2", 8, 0.1  # anomalib's defaults
PATCHCORE_SIDE = 256  # its memory is what 256 px images leave, at every size
PATCHCORE_VECTORS = round(PATCHCORE_CORESET * NORMALS * (PATCHCORE_SIDE // PATCHCORE_STRIDE) ** 2)
EFFICIENT_AD_SIDE = 256  # pixels; its autoencoder takes no smaller image
SIZE_MULTIPLE = 32  # pixels; as for data.image_size of params.yaml
CALIBRATION = 4  # random images that int8 is calibrated on: its ranges cost no time
FIGURES = ("p50_ms", "p95_ms", "p99_ms", "images_per_second")


@dataclass(frozen=True)
class Setting:
    """What all models are timed at side by side."""

    size: int
    batch: int
    threads: int
    precision: str

    @property
    def name(self) -> str:
        """E.g. `256px-b1-t2-fp32`."""
        return f"{self.size}px-b{self.batch}-t{self.threads}-{self.precision}"


HEADLINE = Setting(256, 1, 2, "fp32")


def quantise(model: Path, target: Path, size: int) -> None:
    """Write static int8 of every convolution and matrix product, weights a channel each; the same for all models.

    Ranges come from random images: they decide accuracy, which is not measured here, and no speed. `flawsmith.export`
    has no such thing for models that are not its own.
    """
    taken = onnx.load(model, load_external_data=False).graph.input[0]
    batch = taken.type.tensor_type.shape.dim[0].dim_value or 1  # 0 where any will do
    generator = np.random.default_rng(0)
    images = (generator.random((batch, 3, size, size), np.float32) for _ in range(max(1, CALIBRATION // batch)))
    feeds = ({taken.name: image} for image in images)
    before = logging.root.level
    logging.root.setLevel(logging.ERROR)  # onnxruntime advises a preparation that changes nothing here
    try:
        quantize_static(
            model,
            target,
            SimpleNamespace(get_next=lambda: next(feeds, None)),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Gemm", "MatMul"],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    finally:
        logging.root.setLevel(before)


def random_model(settings: Settings, size: int, path: Path) -> None:
    """Export the detector that params.yaml describes for images of `size`, its weights and memory random.

    Raises:
        UserError: the backbone is unknown.
        FlawsmithError: it does not export.
    """
    teacher = settings.teacher
    if not timm.is_model(teacher.backbone):
        raise UserError(f"teacher.backbone `{teacher.backbone}` is no timm model; see `timm.list_models()`.")
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)  # layers draw their initial weights from the global generator
        frozen = Teacher(teacher.backbone, teacher.out_indices)
        shape = (size, size)
        places = memory_sizes(settings.distill, frozen, NORMALS, shape)
        detector = Detector(DetectorConfig.of(teacher, settings.distill, shape, places), frozen).eval()
        for bank in detector.banks.values():
            bank.patches.copy_(F.normalize(torch.randn(bank.patches.shape), dim=1))
        raw = detector.raw_maps(torch.rand(2, 3, *shape))
        detector.fit_standard(raw)
        detector.calibrate(detector.standardise(raw))
    metadata = ModelMetadata(
        category="random-weights",
        threshold=1.0,
        pixel_threshold=1.0,
        false_alarm_rate=settings.evaluate.false_alarm_rate,
        map_low=0.0,
        map_high=2.0,
        detector_digest="0" * 64,
        teacher=teacher.backbone,
        flawsmith_version=__version__,
    )
    export_network(detector, shape, settings.export.opset, path)
    write_model(onnx.load(path), metadata, path)


def own_models(chosen: argparse.Namespace, folder: Path) -> dict[int, Path]:
    """Provide our model for each image size: the given one, or one a size with random weights.

    Raises:
        UserError: a size is none the detector takes; the model is missing, no fp32 model of ours, or for another size.
    """
    if chosen.model is None:
        settings = bench_settings(chosen.params, None, None)
        own = {size: folder / f"{OURS}-{size}.onnx" for size in chosen.sizes or (256, 512)}
        for size in own:
            if size % SIZE_MULTIPLE:
                raise UserError(f"--sizes names {size}; the detector takes multiples of {SIZE_MULTIPLE} px.")
        for size, path in own.items():
            print(f"exporting our detector for {size} px ...", flush=True)
            random_model(settings, size, path)
        return own
    size, width = Predictor(chosen.model).input_shape
    if size != width:
        raise UserError(f"{chosen.model} takes images of {width} x {size} px; the others are timed on square ones.")
    if chosen.sizes not in (None, (size,)):
        raise UserError(f"{chosen.model} takes images of {size} px; leave out --sizes, or --model.")
    nodes = onnx.load(chosen.model, load_external_data=False).graph.node
    if any(node.op_type == "QuantizeLinear" for node in nodes):
        raise UserError(f"{chosen.model} is quantised already; name the fp32 model.onnx of the export stage.")
    return {size: chosen.model}


def peer_models(python: Path, sizes: Sequence[int], batches: Sequence[int], folder: Path) -> dict[str, Any]:
    """Export anomalib's models in its own environment; return its versions, and `files` by (model, size, batch).

    Raises:
        FlawsmithError: anomalib's side failed.
    """
    wanted = list(itertools.product(PEERS, sizes, batches))
    request = {"seed": 0, "backbone": PATCHCORE_NETWORK, "vectors": PATCHCORE_VECTORS, "files": wanted}
    (folder / "request.json").write_text(json.dumps(request))
    print("exporting anomalib's models ...", flush=True)
    run_script(python, latency_peers.__file__, [folder], "anomalib's side")
    answer: dict[str, Any] = json.loads((folder / "answer.json").read_text())
    return answer | {"files": dict(zip(wanted, map(Path, answer["files"]), strict=True))}


def time_setting(
    setting: Setting, models: dict[tuple[str, str], Path], pythons: dict[str, Path], chosen: argparse.Namespace
) -> list[dict[str, Any]]:
    """Time all models at a setting in turns; one row each, which says why where it could not be timed.

    Args:
        models: (name, runtime) → file.
        pythons: runtime → the Python that has it.
        chosen: `rounds`, `runs` of a round, and `limit` seconds of a round.
    """
    seen: dict[tuple[str, str], list[list[float]]] = {who: [] for who in models}
    rows: dict[tuple[str, str], dict[str, Any]] = {
        who: {"model": who[0], "runtime": who[1], **vars(setting), **dict.fromkeys(FIGURES), "peak_mb": None,
              "model_mb": round(model_bytes(path) / 2**20, 1), "skipped": None, "runs": 0, "rounds": 0}
        for who, path in models.items()
    }  # fmt: skip
    for _ in range(chosen.rounds):
        for who in list(seen):
            numbers = (setting.size, setting.batch, setting.threads, chosen.runs, chosen.limit)
            what = f"{who[0]} in {who[1]} at {setting.name}"
            try:
                said = run_script(pythons[who[1]], latency_worker.__file__, [who[1], models[who], *numbers], what)
            except FlawsmithError as error:
                if who == (OURS, "onnxruntime"):
                    raise
                rows[who]["skipped"] = str(error)  # what a peer cannot do costs no other row
                del seen[who]
                continue
            answer = json.loads(said)
            if answer["seconds"]:
                seen[who].append(answer["seconds"])
                rows[who]["peak_mb"] = max(answer["peak_mb"], rows[who]["peak_mb"] or 0)
            elif not seen[who]:
                rows[who]["skipped"] = f"a run takes {answer['warm_up']:.1f} s; --limit is {chosen.limit:g} s"
                del seen[who]
    for who, rounds in seen.items():
        rows[who] |= summary(rounds, setting.batch)
    return list(rows.values())


def summary(rounds: Sequence[Sequence[float]], batch: int) -> dict[str, Any]:
    """Seconds of the runs of each round → milliseconds. p50 is the median over rounds of the rounds' medians, so that a
    round that was disturbed counts once; p95 and p99 are of all runs together."""
    p50 = median(median(one) for one in rounds) * 1000
    p95, p99 = (float(value) * 1000 for value in np.percentile(np.concatenate(rounds), (95, 99)))
    figures = (p50, p95, p99, 1000 * batch / p50)
    return {name: round(value, 3) for name, value in zip(FIGURES, figures, strict=True)} | {
        "runs": sum(len(one) for one in rounds),
        "rounds": len(rounds),
    }


def model_bytes(path: Path) -> int:
    """Size of an ONNX file and of the weights that may lie beside it."""
    beside = path.with_name(f"{path.name}.data")
    return path.stat().st_size + (beside.stat().st_size if beside.exists() else 0)


def ratios(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Our p50 over each peer's in onnxruntime, by setting: below 1 we are faster. None where one of them is missing."""
    p50: dict[str, dict[str, float | None]] = {}
    for row in rows:
        if row["runtime"] == "onnxruntime":
            setting = Setting(row["size"], row["batch"], row["threads"], row["precision"])
            p50.setdefault(setting.name, {})[row["model"]] = row["p50_ms"]
    return {
        name: {
            peer: round(ours / theirs, 4) if (ours := found.get(OURS)) and (theirs := found.get(peer)) else None
            for peer in PEERS
        }
        for name, found in p50.items()
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Write the rows as Markdown."""
    head = ("px", "batch", "threads", "precision", "model", "runtime", "p50, ms", "p95, ms", "p99, ms", "images/s",
            "runs", "peak, MiB")  # fmt: skip
    lines = []
    for row in rows:
        cells = [str(row[key]) for key in ("size", "batch", "threads", "precision", "model", "runtime")]
        if row["skipped"]:
            lines.append([*cells, f"not timed: {row['skipped']}", *[""] * 5])
        else:
            lines.append([*cells, *(f"{row[key]:.1f}" for key in FIGURES), str(row["runs"]), f"{row['peak_mb']:.0f}"])
    return markdown(head, lines)


def numbers(text: str) -> tuple[int, ...]:
    """Read whole numbers above 0 with commas between them."""
    found = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text}: give whole numbers above 0 with commas between them, e.g. 1,2")
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the options.

    Raises:
        UserError: one makes no sense.
    """
    parser = argparse.ArgumentParser(prog="flawsmith_lab.bench.latency", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, help="a model.onnx of the export stage; default: random weights")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--python", type=Path, default=Path(".venv-anomalib/bin/python"), help="that has anomalib")
    parser.add_argument("--without-anomalib", action="store_true", help="our side alone; the ratios are null")
    parser.add_argument("--sizes", type=numbers, help="pixels a side; default: 256,512")
    parser.add_argument("--batches", type=numbers, default=(1, 8), help="default: 1,8")
    parser.add_argument("--threads", type=numbers, default=(1, 2), help="default: 1,2")
    parser.add_argument("--precisions", default=",".join(PRECISIONS), help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="turns that a row's runs are spread over (%(default)s)")
    parser.add_argument("--runs", type=int, default=20, help="most runs of a row in a round (%(default)s)")
    parser.add_argument("--limit", type=float, default=5.0, help="most seconds of a row in a round (%(default)s)")
    chosen = parser.parse_args(arguments)
    chosen.precisions = tuple(dict.fromkeys(chosen.precisions.split(",")))
    for name in chosen.precisions:
        if name not in PRECISIONS:
            raise UserError(f"--precisions `{name}` is unknown; it may name {', '.join(PRECISIONS)}.")
    if min(chosen.rounds, chosen.runs) < 1 or not chosen.limit > 0:
        raise UserError("--rounds and --runs must be 1 or more, and --limit above 0.")
    if not chosen.without_anomalib and not chosen.python.is_file():
        raise UserError(
            f"{chosen.python} does not exist; `make bench-latency` sets that environment up, "
            "or pass --without-anomalib to time our side alone."
        )
    if not chosen.without_anomalib and min(chosen.sizes or (EFFICIENT_AD_SIDE,)) < EFFICIENT_AD_SIDE:
        raise UserError(
            f"EfficientAD takes no image smaller than {EFFICIENT_AD_SIDE} px; name larger --sizes, "
            "or pass --without-anomalib."
        )
    return chosen


def time_all(chosen: argparse.Namespace, folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Export and time everything: the headline first, then in order; return the rows and anomalib's versions.

    Everyone runs in onnxruntime. In OpenVINO they run at batch 1 with all threads, where latency counts, and in fp32
    alone: it refuses anomalib's EfficientAD as onnxruntime quantises it, and has a quantiser of its own.
    """
    own = own_models(chosen, folder)
    pythons, peers = {"onnxruntime": Path(sys.executable)}, {}
    if not chosen.without_anomalib:
        peers = peer_models(chosen.python, list(own), chosen.batches, folder)
        if peers["openvino"]:
            pythons["openvino"] = chosen.python
    files = {(OURS, size, batch): path for size, path in own.items() for batch in chosen.batches}
    files |= peers.pop("files", {})
    settings = [Setting(*one) for one in itertools.product(own, chosen.batches, chosen.threads, chosen.precisions)]
    rows: list[dict[str, Any]] = []
    for setting in bar(sorted(settings, key=lambda one: one != HEADLINE), "settings", len(settings)):
        models = {}
        for name in dict.fromkeys(name for name, _, _ in files):
            path = files[name, setting.size, setting.batch]
            if setting.precision == "int8":
                path, whole = folder / f"{name}-{path.stem}-int8.onnx", path
                if not path.exists():
                    quantise(whole, path, setting.size)
            for runtime in pythons:
                slowest = (1, max(chosen.threads), "fp32")
                if runtime == "onnxruntime" or (setting.batch, setting.threads, setting.precision) == slowest:
                    models[name, runtime] = path
        rows += time_setting(setting, models, pythons, chosen)
    return rows, peers


def main(arguments: Sequence[str] | None = None) -> None:
    """Time everything, print the table, and end with the JSON line."""
    chosen = parse(arguments)
    found = machine(CPU)
    print(describe(found | {"threads": max(chosen.threads)}))
    with tempfile.TemporaryDirectory(prefix="flawsmith-latency-") as scratch:
        rows, versions = time_all(chosen, Path(scratch))
    compared = ratios(rows)
    headline = compared.get(HEADLINE.name, dict.fromkeys(PEERS))
    weights = "trained" if chosen.model else "random"
    others = f", all others random. PatchCore remembers {PATCHCORE_VECTORS} random vectors" if versions else ""
    print(f"weights: ours {weights}{others}. Times say nothing of accuracy.")
    print(table(rows))
    for peer, value in headline.items():
        if value is not None:
            print(f"our p50 over {peer}'s at {HEADLINE.name}: {value:.3f}")
    finish(
        {
            "benchmark": "latency",
            "machine": found,
            "versions": versions | {"flawsmith": __version__, "onnx": onnx.__version__},
            "weights": weights,
            "peer_weights": "random" if versions else None,
            "patchcore_vectors": PATCHCORE_VECTORS if versions else None,
            "ratio_vs_efficientad": headline["efficientad"],
            "ratio_vs_patchcore": headline["patchcore"],
            "ratio_setting": HEADLINE.name,
            "ratios": compared,
            "rows": rows,
        }
    )


if __name__ == "__main__":
    guarded(main, "bench-latency")
