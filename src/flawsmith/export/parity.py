"""Proof that an exported model decides as the trained one does, on real images, and how fast it is here."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from flawsmith.errors import FlawsmithError
from flawsmith.export.latency import measure_latency
from flawsmith.files import digest_file
from flawsmith.inference.predictor import Prediction, Predictor, is_defective
from flawsmith.inference.providers import package_version

BATCHES = (1, 8)


@dataclass(frozen=True)
class Difference:
    """The largest differences between torch and ONNX over all images, fed in batches of one size: absolute ones of
    values up to 1, shares of the larger ones."""

    batch: int
    map: float
    score: float
    decision_flips: int  # images that one of the two flags and the other does not


def compare(
    batch: int,
    maps: NDArray[np.float32],
    scores: NDArray[np.float32],
    threshold: float,
    answers: Sequence[Prediction],
) -> Difference:
    """Compare the detector's maps and scores with the exported model's answers; NaN makes a difference infinite.

    Args:
        batch: images fed at once.
        maps: the detector's, (N, 1, H, W).
        scores: the detector's, (N,).
        threshold: what the detector's scores are judged at.
        answers: the exported model's, N with verdicts of their own.
    """
    return Difference(
        batch,
        map=_largest_gap(maps[:, 0], np.stack([answer.anomaly_map for answer in answers])),
        score=_largest_gap(scores, np.array([answer.score for answer in answers])),
        decision_flips=sum(
            is_defective(float(score), threshold) != answer.is_defective
            for score, answer in zip(scores, answers, strict=True)
        ),
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
    """Run `images` (N, 3, H, W) through both runtimes in batches of each size; the last is filled up from the start.

    The detector's decisions are made at `threshold`, the exported model's at the one in its file.
    """
    found = []
    for batch in batches:
        feeds = [images[rows] for rows in _full_batches(len(images), batch)]
        maps, scores = (
            np.concatenate(part) for part in zip(*(run_detector(detector, feed) for feed in feeds), strict=True)
        )
        answers = [answer for feed in feeds for answer in predictor.predict_prepared(list(feed))]
        found.append(compare(batch, maps, scores, threshold, answers))
    return found


def certificate(
    detector: nn.Module,
    threshold: float,
    predictor: Predictor,
    model_path: Path,
    images: NDArray[np.float32],
    sources: Sequence[Path],
    tolerance: float,
) -> dict[str, Any]:
    """Measure parity on `images` (N, 3, H, W), read from `sources`, and state it so that it can be checked again.

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
        "input_shape": list(predictor.input_shape),
        "model_bytes": model_path.stat().st_size,
        "model_digest": digest_file(model_path),
        "threshold": threshold,
        "tolerance": tolerance,
        "versions": {name: package_version(name) for name in ("flawsmith", "onnx", "onnxruntime", "torch")},
    }


def time_predictor(predictor: Predictor, images: NDArray[np.float32], rounds: int) -> dict[str, dict[str, float]]:
    """Time a model on images (N, 3, H, W) of its own size, from floats to verdicts.

    Returns p50 and p95 in milliseconds and images per second (at p50), by batch size: figures of this machine now.
    """
    feeds = [list(images[_full_batches(len(images), batch)[0]]) for batch in BATCHES]
    times = measure_latency([partial(predictor.predict_prepared, feed) for feed in feeds], rounds)
    figures = {}
    for batch, (p50, p95) in zip(BATCHES, np.percentile(times, (50, 95), axis=1).T.tolist(), strict=True):
        figures[str(batch)] = {
            "p50_ms": round(p50, 2),
            "p95_ms": round(p95, 2),
            "images_per_second": round(1000 * batch / p50, 2),
        }
    return figures


def run_detector(detector: nn.Module, images: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """One batch (B, 3, H, W) through torch: maps (B, 1, H, W) and scores (B,)."""
    with torch.inference_mode():
        maps, scores = detector(torch.from_numpy(np.ascontiguousarray(images)))
    return maps.numpy(), scores.numpy()


def _largest_gap(one: NDArray[np.floating], other: NDArray[np.floating]) -> float:
    """In units of the value where it is above 1: the floats behind a score of 100 are a hundred times as coarse."""
    gap = np.abs(one.astype(np.float64) - other.astype(np.float64)) / np.maximum(1.0, np.abs(one))
    return float(np.nan_to_num(gap, nan=np.inf).max())


def _full_batches(count: int, batch: int) -> list[NDArray[np.int64]]:
    """Row numbers that cover `count` images in batches all of one size."""
    number = -(-count // batch)
    return [np.arange(start, start + batch) % count for start in range(0, number * batch, batch)]


def significant(value: float) -> float:
    """Rounded to three significant digits, all that a difference between runtimes has."""
    return float(f"{value:.3g}")
