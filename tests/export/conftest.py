"""A small detector with the operations of the real one, exported once for all tests."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from flawsmith.export.onnx import export_onnx
from flawsmith.export.parity import run_detector
from flawsmith.images import write_png
from flawsmith.inference.metadata import ModelMetadata
from flawsmith.surfaces import load_images

SIZE = 64


class ToyDetector(nn.Module):
    """Cosine distance of an encoder's and a decoder's features, upsampled, smoothed; score = mean of the top pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.BatchNorm2d(8), nn.ReLU6())
        self.decoder = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 8, 1))
        kernel = torch.exp(-(torch.arange(-4.0, 5.0) ** 2) / 8)
        self.register_buffer("kernel", kernel / kernel.sum())

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.encoder((image - self.mean) / 0.225)
        distance = 1 - F.cosine_similarity(features, self.decoder(features), dim=1)[:, None]
        raw = F.interpolate(distance, size=image.shape[-2:], mode="bilinear", align_corners=False)
        padded = F.pad(raw, (4, 4, 4, 4), mode="replicate")
        smooth = F.conv2d(F.conv2d(padded, self.kernel.view(1, 1, 1, -1)), self.kernel.view(1, 1, -1, 1))
        return smooth, smooth.flatten(1).topk(40, dim=1).values.mean(dim=1)


@dataclass(frozen=True)
class Exported:
    detector: ToyDetector
    metadata: ModelMetadata
    path: Path
    sources: list[Path]
    images: NDArray[np.float32]  # (11, 3, S, S)


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
