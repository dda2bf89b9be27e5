"""A small detector with the operations of the real one, for the tests of this folder."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from flawsmith.inference.metadata import ModelMetadata

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
    network: Path
    path: Path
    sources: list[Path]
    images: NDArray[np.float32]  # (11, 3, S, S)
