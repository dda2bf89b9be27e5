"""Latency of the exported detector beside anomalib's EfficientAD-S and PatchCore, all as ONNX files, in one run.

    python -m flawsmith_lab.bench.latency [--model model.onnx] [--without-anomalib]        (make bench-latency)

Every model runs in a process of its own, with the same code and the same random images, for every image size, batch,
number of threads and precision asked for. Rounds take turns (ours, theirs, ours, ...), so that a noisy machine slows
all of them alike. Weights are random unless --model names a trained model: how long a network takes does not depend on
them.
The last line of stdout is JSON.
"""

import argparse
import json
import logging
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import timm
import torch
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from torch.nn import functional as F

from flawsmith import __version__
from flawsmith.detector.memory import memory_size
from flawsmith.detector.model import Detector, DetectorConfig
from flawsmith.detector.teacher import Teacher
from flawsmith.devices import CPU
from flawsmith.errors import FlawsmithError, UserError
from flawsmith.export.onnx import export_onnx
from flawsmith.inference.metadata import ModelMetadata
from flawsmith.inference.predictor import Predictor
from flawsmith.progress import bar
from flawsmith.settings import Settings
from flawsmith_lab.bench import latency_peers, latency_worker
from flawsmith_lab.bench.measure import bench_settings, describe, finish, guarded, machine

OURS, PEERS = "flawsmith", ("efficientad", "patchcore")
SIZES, BATCHES, THREADS, PRECISIONS = (256, 512), (1, 8), (1, 2), ("fp32", "int8")
NORMALS = 200  # images that the memories of our detector and of PatchCore would be filled from
PATCHCORE_NETWORK, PATCHCORE_STRIDE, PATCHCORE_CORESET = "wide_resnet50_2", 8, 0.1  # anomalib's defaults
PATCHCORE_SIDE = 256  # its memory is what 256 px images leave, at every size
EFFICIENT_AD_SIDE = 256  # pixels; its autoencoder takes no smaller image
SIZE_MULTIPLE = 32  # pixels; as for data.image_size of params.yaml
MOST_RUNS = 200  # of one row
QUICK = 1.0  # seconds; a model slower than that is warmed up by one run instead of two
CALIBRATION = 4  # random images that int8 is calibrated on: its ranges cost no time
NEEDED_RUNS = 2  # a row needs time for a warm-up and at least one run
HEADLINE_WEIGHT = 4  # its rows get that many times the seconds of the others
LEAST_SHARE = 2.0  # seconds of a row, even when exports have eaten all of them: what is quick is always timed


@dataclass(frozen=True)
class Setting:
    """What all models are timed at side by side."""

    size: int
    batch: int
    threads: int
    precision: str

    @property
    def work(self) -> float:
        """Pixels a thread: what seconds are taken to grow with until they are measured."""
        return self.size**2 * self.batch / self.threads

    @property
    def name(self) -> str:
        return f"{self.size}px-b{self.batch}-t{self.threads}-{self.precision}"


HEADLINE = Setting(256, 1, 2, "fp32")


@dataclass(frozen=True)
class Contender:
    """A model in a runtime."""

    model: str
    runtime: str = "onnxruntime"


class Speaker:
    """A program that answers a line of stdin with a line of JSON, and speaks first; stderr is kept for its last words.

    Raises:
        FlawsmithError: it ended; the message holds the last line it wrote.
    """

    def __init__(self, command: Sequence[str | Path], name: str) -> None:
        self._name, self._last = name, ""
        self._words = tempfile.TemporaryFile("w+")  # noqa: SIM115 - kept as long as the process
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._words, text=True
        )
        self.first = self._listen()

    def ask(self, line: str) -> dict[str, Any]:
        """Send a line and wait for the answer."""
        if self._process.stdin is None or self._process.poll() is not None:
            raise self._ended()
        try:
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._ended() from error
        return self._listen()

    def close(self) -> None:
        """End the process and wait for it; once is enough."""
        if self._words.closed:
            return
        self._process.kill()
        self._process.communicate()
        self._words.close()

    def _listen(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            raise self._ended()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _ended(self) -> FlawsmithError:
        status = self._process.wait()
        if not self._words.closed:
            self._words.seek(0)
            self._last = (self._words.read().strip().splitlines() or ["no message"])[-1]
            self.close()
        return FlawsmithError(f"{self._name} ended with status {status}: {self._last[:300]}")


@dataclass
class Files:
    """Which file a model is for a setting; made when first asked for, since what takes too long is never timed."""

    folder: Path
    ours: dict[int, Path]
    peers: Speaker | None
    seconds: float = 0.0  # spent on making them
    _made: dict[Path, Path] = field(default_factory=dict)

    def get(self, model: str, setting: Setting) -> Path:
        began = time.monotonic()
        path = self._get(model, setting)
        self.seconds += time.monotonic() - began
        return path

    def _get(self, model: str, setting: Setting) -> Path:
        path = self.ours[setting.size] if model == OURS else self._ask(model, setting)
        if setting.precision == "fp32":
            return path
        if path not in self._made:
            target = self.folder / f"{path.stem}-{model}-int8.onnx"
            quantise(path, target, setting.size)
            self._made[path] = target
        return self._made[path]

    def _ask(self, model: str, setting: Setting) -> Path:
        if self.peers is None:
            raise FlawsmithError(f"There is no {model} without anomalib.")
        return Path(self.peers.ask(f"{model} {setting.size} {setting.batch}")["file"])


class _Random(CalibrationDataReader):
    """Batches of random images for the calibration of int8."""

    def __init__(self, name: str, batch: int, size: int) -> None:
        generator = np.random.default_rng(0)
        count = max(1, CALIBRATION // batch)
        self._feeds = iter([{name: generator.random((batch, 3, size, size), np.float32)} for _ in range(count)])

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        return next(self._feeds, None)


def quantise(model: Path, target: Path, size: int) -> None:
    """Static int8 of every convolution and matrix product, weights a channel each; the same for all models.

    Ranges come from random images: they decide accuracy, which is not measured here, and no speed. `flawsmith.export`
    has no such thing for models that are not its own.
    """
    graph = onnx.load(model, load_external_data=False).graph
    taken = graph.input[0]
    batch = taken.type.tensor_type.shape.dim[0].dim_value or 1  # 0 where any will do
    before = logging.root.level
    logging.root.setLevel(logging.ERROR)  # onnxruntime advises a preparation that changes nothing here
    try:
        quantize_static(
            model,
            target,
            _Random(taken.name, batch, size),
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
        cells = size // frozen.strides[-1]
        places = memory_size(settings.distill.memory, NORMALS, cells, cells)
        detector = Detector(DetectorConfig.of(teacher, settings.distill, size, places), frozen).eval()
        if detector.memory is not None:
            detector.memory.keys.copy_(F.normalize(torch.randn(detector.memory.keys.shape), dim=1))
        detector.calibrate([torch.rand(2, 3, size, size)])
    metadata = ModelMetadata(
        category="random-weights",
        threshold=1.0,
        pixel_threshold=1.0,
        false_alarm_rate=settings.evaluate.false_alarm_rate,
        input_size=size,
        map_low=0.0,
        map_high=2.0,
        detector_digest="0" * 64,
        teacher=teacher.backbone,
        flawsmith_version=__version__,
    )
    export_onnx(detector, metadata, settings.export.opset, path)


def patchcore_vectors() -> int:
    """Size of PatchCore's memory: its coreset of the patches of NORMALS images."""
    return round(PATCHCORE_CORESET * NORMALS * (PATCHCORE_SIDE // PATCHCORE_STRIDE) ** 2)


def settings_in_order(sizes: Sequence[int], batches: Sequence[int], threads: Sequence[int],
                      precisions: Sequence[str]) -> list[Setting]:  # fmt: skip
    """The headline first, then from cheap to dear: time that cheap ones leave over goes to the dear ones."""
    found = [Setting(s, b, t, p) for s in sizes for b in batches for t in threads for p in precisions]
    return sorted(found, key=lambda one: (one != HEADLINE, one.work, one.precision))


def contenders(setting: Setting, names: Sequence[str], most_threads: int, openvino: bool) -> list[Contender]:
    """Who runs at a setting: everyone in onnxruntime; in OpenVINO at batch 1 with all threads, where latency counts.

    In fp32 alone there: it refuses anomalib's EfficientAD as onnxruntime quantises it, and has a quantiser of its own.
    """
    found = [Contender(name) for name in names]
    if openvino and (setting.batch, setting.threads, setting.precision) == (1, most_threads, "fp32"):
        found += [Contender(name, "openvino") for name in names]
    return found


def expected_seconds(rows: Sequence[dict[str, Any]], who: Contender, setting: Setting) -> float | None:
    """What a run should take, by the measured row of the same model that is most like it; None if there is none."""
    known = [row for row in rows if row["model"] == who.model and row["p50_ms"] is not None]
    if not known:
        return None

    def distance(row: dict[str, Any]) -> tuple[float, bool, bool]:
        work = Setting(*(row[key] for key in ("size", "batch", "threads", "precision"))).work
        return (
            abs(math.log(setting.work / work)), row["runtime"] != who.runtime, row["precision"] != setting.precision
        )  # fmt: skip

    nearest = min(known, key=distance)
    work = Setting(*(nearest[key] for key in ("size", "batch", "threads", "precision"))).work
    return float(nearest["p50_ms"]) / 1000 * setting.work / work


def plan(seconds: float, run: float, rounds: int) -> tuple[int, int]:
    """Rounds, and runs a round, that fit into `seconds` when a run takes `run`; at least one of one."""
    runs = max(1, min(MOST_RUNS, int(seconds / run)))
    return min(rounds, runs), max(1, runs // rounds)


def summary(rounds: Sequence[Sequence[float]], batch: int) -> dict[str, Any]:
    """Seconds of the runs of each round → milliseconds. p50 is the median over rounds of the rounds' medians, so that a
    round that was disturbed counts once; p95 and p99 are of all runs together."""
    p50 = float(np.median([np.median(one) for one in rounds])) * 1000
    p95, p99 = (float(value) * 1000 for value in np.percentile(np.concatenate(rounds), (95, 99)))
    return {
        "p50_ms": round(p50, 3),
        "p95_ms": round(p95, 3),
        "p99_ms": round(p99, 3),
        "images_per_second": round(1000 * batch / p50, 3),
        "runs": sum(len(one) for one in rounds),
        "rounds": len(rounds),
    }


def time_setting(
    setting: Setting,
    who: Sequence[Contender],
    shares: Sequence[float],
    files: Files,
    pythons: dict[str, Path],
    rounds: int,
    known: Sequence[dict[str, Any]],
    progress: Any,
) -> list[dict[str, Any]]:
    """One row a contender, timed in turns within `shares` of seconds, or saying why it was not."""
    rows, workers, plans = [], {}, {}
    with ExitStack() as stack:
        for one, share in zip(who, shares, strict=True):
            row: dict[str, Any] = {"model": one.model, "runtime": one.runtime} | vars(setting)
            row |= dict.fromkeys(("p50_ms", "p95_ms", "p99_ms", "images_per_second", "peak_mb", "model_mb", "skipped"))
            row |= {"runs": 0, "rounds": 0}
            rows.append(row)
            progress.set_postfix(row=f"{setting.name} {one.model} {one.runtime}")
            expected = expected_seconds(known, one, setting)
            if expected is not None and NEEDED_RUNS * expected > share:
                row["skipped"] = f"a run takes some {expected:.1f} s; --seconds leaves {share:.1f} s"
                continue
            try:
                path = files.get(one.model, setting)
                row["model_mb"] = round(model_bytes(path) / 2**20, 1)
                worker, run, spent = start(one, setting, path, pythons[one.runtime], stack)
            except FlawsmithError as error:
                if one == Contender(OURS):
                    raise
                row["skipped"] = str(error)  # what a peer cannot do costs no other row
                continue
            workers[one], plans[one] = worker, plan(share - spent, run, rounds)
            if setting == HEADLINE:  # no ratio hangs on one run
                plans[one] = (rounds, plans[one][1])
        seen: dict[Contender, list[list[float]]] = {one: [] for one in workers}
        for number in range(rounds):
            for one, worker in workers.items():
                wanted, runs = plans[one]
                if number < wanted:
                    progress.set_postfix(row=f"{setting.name} {one.model} {one.runtime}")
                    answer = worker.ask(str(runs))
                    seen[one].append(answer["seconds"])
                    rows[who.index(one)]["peak_mb"] = answer["peak_mb"]
        for one, taken in seen.items():
            rows[who.index(one)] |= summary(taken, setting.batch)
    return rows


def start(one: Contender, setting: Setting, path: Path, python: Path, stack: ExitStack) -> tuple[Speaker, float, float]:
    """A worker that is loaded and warm: itself, seconds of its last run, and of all its runs.

    Raises:
        FlawsmithError: the runtime refuses the model.
    """
    options = [str(value) for value in (setting.size, setting.batch, setting.threads)]
    worker = Speaker(
        [python, "-P", Path(latency_worker.__file__).resolve(), one.runtime, path, *options],
        f"{one.model} in {one.runtime} at {setting.name}",
    )
    stack.callback(worker.close)
    taken = worker.ask("1")["seconds"]
    if taken[0] < QUICK:
        taken += worker.ask("1")["seconds"]
    return worker, taken[-1], sum(taken)


def model_bytes(path: Path) -> int:
    """Size of an ONNX file and of the weights that may lie beside it."""
    beside = path.with_name(f"{path.name}.data")
    return path.stat().st_size + (beside.stat().st_size if beside.exists() else 0)


def bench(
    order: Sequence[Setting],
    names: Sequence[str],
    files: Files,
    pythons: dict[str, Path],
    seconds: float,
    rounds: int,
) -> Iterator[dict[str, Any]]:
    """All rows. Each takes at most its even share of the seconds that are left, and leaves the rest to the others."""
    most = max(one.threads for one in order)
    work = [(setting, contenders(setting, names, most, "openvino" in pythons)) for setting in order]
    weights = [HEADLINE_WEIGHT if setting == HEADLINE else 1 for setting in order]
    waiting = sum(weight * len(who) for weight, (_, who) in zip(weights, work, strict=True))
    left = seconds
    rows: list[dict[str, Any]] = []
    with bar(total=sum(len(who) for _, who in work), unit="row") as progress:
        for weight, (setting, who) in zip(weights, work, strict=True):
            shares = [max(LEAST_SHARE, left * weight / waiting)] * len(who)
            began, made = time.monotonic(), files.seconds
            found = time_setting(setting, who, shares, files, pythons, rounds, rows, progress)
            left -= time.monotonic() - began - (files.seconds - made)
            waiting -= weight * len(who)
            rows += found
            progress.update(len(who))
            yield from found


def ratios(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Our p50 over each peer's in onnxruntime, by setting: below 1 we are faster. None where one of them is missing."""
    p50 = {
        (Setting(row["size"], row["batch"], row["threads"], row["precision"]), row["model"]): row["p50_ms"]
        for row in rows
        if row["runtime"] == "onnxruntime"
    }
    found: dict[str, dict[str, float | None]] = {}
    for setting in dict.fromkeys(setting for setting, _ in p50):
        ours = p50.get((setting, OURS))
        found[setting.name] = {
            peer: round(ours / theirs, 4) if ours and (theirs := p50.get((setting, peer))) else None for peer in PEERS
        }
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    head = ("px", "batch", "threads", "precision", "model", "runtime", "p50, ms", "p95, ms", "p99, ms", "images/s",
            "runs", "peak, MiB")  # fmt: skip
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for row in rows:
        cells = [str(row[key]) for key in ("size", "batch", "threads", "precision", "model", "runtime")]
        if row["skipped"]:
            cells += [f"not timed: {row['skipped']}", *[""] * 5]
        else:
            cells += [f"{row[key]:.1f}" for key in ("p50_ms", "p95_ms", "p99_ms", "images_per_second")]
            cells += [str(row["runs"]), f"{row['peak_mb']:.0f}"]
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def numbers(option: str, text: str) -> tuple[int, ...]:
    """A list of whole numbers above 0.

    Raises:
        UserError: it is none.
    """
    try:
        found = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise UserError(f"{option} is `{text}`; give whole numbers above 0 with commas between them, e.g. 1,2.")
    return found


def own_sizes(chosen: argparse.Namespace) -> tuple[int, ...]:
    """The image sizes to time: those asked for, or the one of the given model.

    Raises:
        UserError: a size is none the detector takes; the model is missing, no fp32 model of ours, or for another size.
    """
    sizes = numbers("--sizes", chosen.sizes) if chosen.sizes else None
    if chosen.model is None:
        for size in sizes or ():
            if size % SIZE_MULTIPLE:
                raise UserError(f"--sizes names {size}; the detector takes multiples of {SIZE_MULTIPLE} px.")
        return sizes or SIZES
    size = Predictor(chosen.model).metadata.input_size
    if sizes not in (None, (size,)):
        raise UserError(f"{chosen.model} takes images of {size} px; leave out --sizes, or --model.")
    graph = onnx.load(chosen.model, load_external_data=False).graph
    if any(node.op_type == "QuantizeLinear" for node in graph.node):
        raise UserError(f"{chosen.model} is quantised already; name the fp32 model.onnx of the export stage.")
    return (size,)


def own_models(chosen: argparse.Namespace, sizes: Sequence[int], folder: Path) -> dict[int, Path]:
    """Our model for each image size: the given one, or one a size with random weights.

    Raises:
        UserError: params.yaml is wrong.
    """
    if chosen.model is not None:
        return dict.fromkeys(sizes, chosen.model)
    settings = bench_settings(chosen.params, None, None)
    own = {size: folder / f"{OURS}-{size}.onnx" for size in sizes}
    for size, path in own.items():
        print(f"exporting our detector for {size} px ...", flush=True)
        random_model(settings, size, path)
    return own


def main(arguments: Sequence[str] | None = None) -> None:
    """Time everything, print the table, and end with the JSON line."""
    parser = argparse.ArgumentParser(prog="flawsmith_lab.bench.latency", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, help="a model.onnx of the export stage; default: random weights")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--python", type=Path, default=Path(".venv-anomalib/bin/python"), help="that has anomalib")
    parser.add_argument("--without-anomalib", action="store_true", help="our side alone; the ratios are null")
    parser.add_argument("--sizes", help=f"pixels a side; default: {','.join(map(str, SIZES))}")
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)), help="default: %(default)s")
    parser.add_argument("--threads", default=",".join(map(str, THREADS)), help="default: %(default)s")
    parser.add_argument("--precisions", default=",".join(PRECISIONS), help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=7, help="turns that a row's runs are spread over (%(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=360.0, help="for all rows together, exports apart (%(default)s)"
    )
    chosen = parser.parse_args(arguments)
    batches, threads = numbers("--batches", chosen.batches), numbers("--threads", chosen.threads)
    precisions = tuple(dict.fromkeys(chosen.precisions.split(",")))
    for name in precisions:
        if name not in PRECISIONS:
            raise UserError(f"--precisions `{name}` is unknown; it may name {', '.join(PRECISIONS)}.")
    if chosen.rounds < 1 or not chosen.seconds > 0:
        raise UserError("--rounds must be 1 or more, and --seconds above 0.")
    if not chosen.without_anomalib and not chosen.python.is_file():
        raise UserError(
            f"{chosen.python} does not exist; `make bench-latency` sets that environment up, "
            "or pass --without-anomalib to time our side alone."
        )
    sizes = own_sizes(chosen)
    if not chosen.without_anomalib and min(sizes) < EFFICIENT_AD_SIDE:
        raise UserError(
            f"EfficientAD takes no image smaller than {EFFICIENT_AD_SIDE} px; name larger --sizes, "
            "or pass --without-anomalib."
        )
    found = machine(CPU)
    print(describe(found | {"threads": max(threads)}))
    with tempfile.TemporaryDirectory(prefix="flawsmith-latency-") as scratch, ExitStack() as stack:
        folder = Path(scratch)
        own = own_models(chosen, sizes, folder)
        pythons, names, versions, peers = {"onnxruntime": Path(sys.executable)}, [OURS], {}, None
        if not chosen.without_anomalib:
            request = {"seed": 0, "backbone": PATCHCORE_NETWORK, "vectors": patchcore_vectors()}
            (folder / "request.json").write_text(json.dumps(request))
            # -P: this folder's modules must not hide packages of the same name
            print("starting anomalib's side ...", flush=True)
            peers = Speaker([chosen.python, "-P", Path(latency_peers.__file__).resolve(), folder], "anomalib's side")
            stack.callback(peers.close)
            versions, names = peers.first, [OURS, *PEERS]
            if versions["openvino"]:
                pythons["openvino"] = chosen.python
        order = settings_in_order(sizes, batches, threads, precisions)
        rows = list(bench(order, names, Files(folder, own, peers), pythons, chosen.seconds, chosen.rounds))
    compared = ratios(rows)
    headline = compared.get(HEADLINE.name, dict.fromkeys(PEERS))
    weights = "trained" if chosen.model else "random"
    memories = f"PatchCore remembers {patchcore_vectors()} random vectors. " if names[1:] else ""
    print(
        f"weights: ours {weights}{', all others random' if names[1:] else ''}. {memories}Times say nothing of accuracy."
    )
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
            "peer_weights": "random" if names[1:] else None,
            "patchcore_vectors": patchcore_vectors() if names[1:] else None,
            "ratio_vs_efficientad": headline["efficientad"],
            "ratio_vs_patchcore": headline["patchcore"],
            "ratio_setting": HEADLINE.name,
            "ratios": compared,
            "rows": rows,
        }
    )


if __name__ == "__main__":
    guarded(main, "bench-latency")
