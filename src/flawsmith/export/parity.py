"""Proof that an exported model decides as the trained one does, on real images, and how fast it is here."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from flawsmith.errors import FlawsmithError
from flawsmith.files import digest_file
from flawsmith.inference.predictor import Prediction, Predictor, is_defective
from flawsmith.inference.providers import package_version

BATCHES = (1, 8)
_WARM_UP = 2  # untimed runs: the first ones allocate


@dataclass(frozen=True)
class Difference:
    """The largest absolute differences between torch and ONNX over all images, fed in batches of one size."""

    batch: int
    map: float
    score: float
    decision_flips: int  # images that one of the two flags and the other does not


def compare(
    maps: NDArray[np.float32], scores: NDArray[np.float32], threshold: float, answers: Sequence[Prediction]
) -> Difference:
    """Compare the detector's `maps` (B, 1, S, S) and `scores` (B,), judged at `threshold`, with the exported model's
    answers, which carry verdicts of their own; NaN makes a difference infinite."""
    return Difference(
        batch=len(answers),
        map=_largest_gap(maps[:, 0], np.stack([answer.anomaly_map for answer in answers])),
        score=_largest_gap(scores, np.array([answer.score for answer in answers])),
        decision_flips=sum(
            is_defective(float(score), threshold) != answer.is_defective
            for score, answer in zip(scores, answers, strict=True)
        ),
    )


def merge(differences: Sequence[Difference]) -> Difference:
    """The differences of several batches of the same size as one."""
    return Difference(
        differences[0].batch,
        max(item.map for item in differences),
        max(item.score for item in differences),
        sum(item.decision_flips for item in differences),
    )


def objections(differences: Iterable[Difference], tolerance: float) -> list[str]:
    """What speaks against the model, in words; empty if nothing does."""
    found = []
    for item in differences:
        if not item.map <= tolerance:
            found.append(f"batch {item.batch}: maps differ by {item.map:.3g} (tolerance {tolerance:g})")
        if not item.score <= tolerance:
            found.append(f"batch {item.batch}: scores differ by {item.score:.3g} (tolerance {tolerance:g})")
        if item.decision_flips:
            found.append(f"batch {item.batch}: {item.decision_flips} decision(s) flipped")
    return found


def measure_parity(
    detector: nn.Module,
    threshold: float,
    predictor: Predictor,
    images: NDArray[np.float32],
    batches: Sequence[int] = BATCHES,
) -> list[Difference]:
    """Run `images` (N, 3, S, S) through both runtimes in batches of each size; the last is filled up from the start.

    The detector's decisions are made at `threshold`, the exported model's at the one in its file.
    """
    return [
        merge(
            [
                compare(
                    *run_detector(detector, images[rows]), threshold, predictor.predict_prepared(list(images[rows]))
                )
                for rows in _full_batches(len(images), batch)
            ]
        )
        for batch in batches
    ]


def certificate(
    detector: nn.Module,
    threshold: float,
    predictor: Predictor,
    model_path: Path,
    images: NDArray[np.float32],
    sources: Sequence[Path],
    tolerance: float,
) -> dict[str, Any]:
    """Measure parity on `images` (N, 3, S, S), read from `sources`, and state it so that it can be checked again.

    Raises:
        FlawsmithError: a difference exceeds `tolerance`, or a decision flips.
    """
    differences = measure_parity(detector, threshold, predictor, images)
    found = objections(differences, tolerance)
    if found:
        raise FlawsmithError(
            f"The ONNX model does not agree with the trained detector on {len(images)} images: {'; '.join(found)}. "
            "Nothing was exported. If the report of `evaluate` shows sound scores, the fault is ours: tell us, with "
            "what `flawsmith doctor` prints."
        )
    return {
        "batches": {
            str(item.batch): {
                "map_difference": significant(item.map),
                "score_difference": significant(item.score),
                "decision_flips": item.decision_flips,
            }
            for item in differences
        },
        "detector_digest": predictor.metadata.detector_digest,
        "images": [{"digest": digest_file(path), "file": path.name} for path in sources],
        "input_size": predictor.metadata.input_size,
        "model_bytes": model_path.stat().st_size,
        "model_digest": digest_file(model_path),
        "threshold": threshold,
        "tolerance": tolerance,
        "versions": {name: package_version(name) for name in ("flawsmith", "onnx", "onnxruntime", "torch")},
    }


def measure_latency(
    predictor: Predictor, images: NDArray[np.float32], runs: int, batches: Sequence[int] = BATCHES
) -> dict[str, dict[str, float]]:
    """Wall time of one `Predictor.predict` in milliseconds, from float images at the model's size to verdicts: of one
    tile each where the model sees tiles.

    Returns p50, p95 and images per second (at p50) by batch size: figures of this machine at this moment.
    """
    figures = {}
    for batch in batches:
        rows = _full_batches(len(images), batch)
        times = []
        for run in range(_WARM_UP + runs):
            feed = list(images[rows[run % len(rows)]])
            start = time.perf_counter()
            predictor.predict_prepared(feed)
            times.append(time.perf_counter() - start)
        p50, p95 = (float(value) * 1000 for value in np.percentile(times[_WARM_UP:], (50, 95)))
        figures[str(batch)] = {
            "p50_ms": round(p50, 2),
            "p95_ms": round(p95, 2),
            "images_per_second": round(1000 * batch / p50, 2),
        }
    return figures


def run_detector(detector: nn.Module, images: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """One batch (B, 3, S, S) through torch: maps (B, 1, S, S) and scores (B,)."""
    with torch.inference_mode():
        maps, scores = detector(torch.from_numpy(np.ascontiguousarray(images)))
    return maps.numpy(), scores.numpy()


def _largest_gap(one: NDArray[np.floating], other: NDArray[np.floating]) -> float:
    gap = np.abs(one.astype(np.float64) - other.astype(np.float64))
    return float(np.nan_to_num(gap, nan=np.inf).max())


def _full_batches(count: int, batch: int) -> list[NDArray[np.int64]]:
    """Row numbers that cover `count` images in batches all of one size."""
    number = -(-count // batch)
    return [np.arange(start, start + batch) % count for start in range(0, number * batch, batch)]


def significant(value: float) -> float:
    """Rounded to three significant digits, all that a difference between runtimes has."""
    return float(f"{value:.3g}")
