"""The toy detector, exported once for all tests of this folder."""

import numpy as np
import pytest
import torch
from toy_detector import SIZE, Exported, ToyDetector

from flawsmith.export.onnx import export_onnx
from flawsmith.export.parity import run_detector
from flawsmith.images import write_png
from flawsmith.inference.metadata import ModelMetadata
from flawsmith.surfaces import load_images


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch.manual_seed(0)
    detector = ToyDetector().eval()
    folder = tmp_path_factory.mktemp("export")
    generator = np.random.default_rng(0)
    sources = [folder / f"{index:02}.png" for index in range(11)]  # no multiple of 8
    for path in sources:
        write_png(path, generator.integers(0, 256, (SIZE, SIZE, 3), np.uint8))
    images = load_images(sources, SIZE)
    scores = np.sort(np.concatenate([run_detector(detector, image[None])[1] for image in images]).astype(float))
    metadata = ModelMetadata(
        category="toy",
        threshold=float(scores[5] + scores[6]) / 2,
        pixel_threshold=float(scores[6]),
        false_alarm_rate=0.05,
        input_size=SIZE,
        map_low=0.0,
        map_high=2.0,
        detector_digest="0" * 64,
        teacher="toy",
        flawsmith_version="0.1.0",
    )
    path = folder / "model.onnx"
    export_onnx(detector, metadata, 18, path)
    return Exported(detector, metadata, path, sources, images)
