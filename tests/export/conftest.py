"""The toy detector, exported once for all tests of this folder; a small real one, and images for it."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from filled import calibrate, detector_of
from numpy.typing import NDArray
from toy_detector import SIZE, Exported, ToyDetector

from flawsmith.config import load_settings
from flawsmith.data.dataset import load_images
from flawsmith.data.images import write_png
from flawsmith.detector.model import Detector
from flawsmith.detector.teacher import build_teacher
from flawsmith.export.onnx import export_network, write_model
from flawsmith.export.parity import run_detector
from flawsmith.inference.metadata import ModelMetadata


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch.manual_seed(0)
    detector = ToyDetector().eval()
    folder = tmp_path_factory.mktemp("export")
    generator = np.random.default_rng(0)
    sources = [folder / f"{index:02}.png" for index in range(11)]  # no multiple of 8
    for path in sources:
        write_png(path, generator.integers(0, 256, (SIZE, SIZE, 3), np.uint8))
    images = load_images(sources, (SIZE, SIZE))
    scores = np.sort(np.concatenate([run_detector(detector, image[None])[1] for image in images]).astype(float))
    metadata = ModelMetadata(
        category="toy",
        threshold=float(scores[5] + scores[6]) / 2,
        pixel_threshold=float(scores[6]),
        false_alarm_rate=0.05,
        map_low=0.0,
        map_high=2.0,
        detector_digest="0" * 64,
        teacher="toy",
        flawsmith_version="0.1.0",
        typical_score=float(scores[2]),
    )
    path = folder / "model.onnx"
    network = folder / "network.onnx"
    export_network(detector, (SIZE, SIZE), 18, network)
    write_model(onnx.load(network), metadata, path)
    return Exported(detector, metadata, network, path, sources, images)


def _images(seed: int, count: int, defective: bool) -> NDArray[np.float32]:
    """(count, 3, S, S) of a fine stripe pattern, with a bright spot where they are defective."""
    generator = np.random.default_rng(seed)
    stripes = 0.4 + 0.1 * np.sin(np.arange(SIZE) * 0.7)
    images = stripes + generator.normal(0, 0.02, (count, 3, SIZE, SIZE))
    for image in images[: count if defective else 0]:
        top, left = generator.integers(8, SIZE - 28, 2)
        image[:, top : top + 20, left : left + 20] = generator.uniform(0, 1, (3, 20, 20))
    return np.clip(images, 0, 1).astype(np.float32)


@pytest.fixture(scope="session")
def small_images() -> Callable[[int, int, bool], NDArray[np.float32]]:
    """(seed, count, defective) -> images."""
    return _images


@pytest.fixture(scope="session")
def small_detector() -> Detector:
    """The real modules with a narrow student; untrained but for its memory and its calibration."""
    params = load_settings(Path(__file__).parents[2] / "params.yaml")
    settings = dataclasses.replace(
        params.distill, bottleneck=32, decoder_channels=(16, 16), head_channels=16, memory=80,
    )  # fmt: skip
    normals = torch.from_numpy(_images(0, 12, False))
    detector, _ = detector_of(build_teacher(params.teacher), params.teacher, settings, normals[:8])
    calibrate(detector, normals[8:])
    return detector
