"""The detector as one module: image in, anomaly map and score out, all normalisation inside."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flawsmith.detector.student import SegmentationHead, Student
from flawsmith.detector.teacher import Features, Teacher
from flawsmith.errors import UserError
from flawsmith.files import atomic_file, read_json, write_json
from flawsmith.settings import DistillSettings, TeacherSettings, settings_digest


@dataclass(frozen=True)
class DetectorConfig:
    """What is needed to build the module before its weights are loaded."""

    backbone: str
    out_indices: tuple[int, ...]
    image_size: int
    bottleneck: int
    decoder_channels: tuple[int, ...]
    head_channels: int
    map_weights: tuple[float, ...]
    smoothing: float
    top_share: float

    @classmethod
    def of(cls, teacher: TeacherSettings, distill: DistillSettings, image_size: int) -> "DetectorConfig":
        return cls(
            teacher.backbone,
            teacher.out_indices,
            image_size,
            distill.bottleneck,
            distill.decoder_channels,
            distill.head_channels,
            distill.map_weights,
            distill.smoothing,
            distill.top_share,
        )


class Detector(nn.Module):
    """Frozen teacher, student and segmentation head, fused into one anomaly map.

    Four raw maps at the finest feature resolution: 1 - cosine similarity at three scales, and the head's logit. Each is
    brought to zero mean and unit deviation over the pixels of the calibration normals (`calibrate`), so that their
    weighted mean adds like to like; the fused map is smoothed and enlarged to the image's size.
    """

    map_mean: Tensor
    map_std: Tensor
    weights: Tensor
    kernel: Tensor

    def __init__(self, config: DetectorConfig, teacher: Teacher | None = None) -> None:
        super().__init__()
        self.config = config
        self.teacher = teacher or Teacher(config.backbone, config.out_indices)
        self.student = Student(self.teacher.channels, config.bottleneck, config.decoder_channels)
        self.head = SegmentationHead(self.teacher.channels, config.head_channels)
        maps = len(self.teacher.channels) + 1
        weights = torch.tensor(config.map_weights)
        self.register_buffer("map_mean", torch.zeros(maps))
        self.register_buffer("map_std", torch.ones(maps))
        self.register_buffer("weights", weights / weights.sum(), persistent=False)
        self.register_buffer("kernel", gaussian_kernel(config.smoothing / self.teacher.strides[0]), persistent=False)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, S, S) in [0, 1] → anomaly map (B, 1, S, S) and score (B,); 0 is the mean of normal pixels."""
        maps = (self.raw_maps(image) - self.map_mean.view(1, -1, 1, 1)) / self.map_std.view(1, -1, 1, 1)
        fused = (maps * self.weights.view(1, -1, 1, 1)).sum(dim=1, keepdim=True)
        fused = smooth(fused, self.kernel)
        score = top_mean(fused, self.config.top_share)
        return F.interpolate(fused, size=image.shape[-2:], mode="bilinear", align_corners=False), score

    def raw_maps(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) → (B, 4, S/4, S/4): cosine distance a scale, finest first, then the head's logit."""
        features = self.teacher(image)
        products = feature_products(features, self.student(features))
        size = products[0].shape[-2:]
        distances = [1 - product.sum(dim=1, keepdim=True) for product in products]
        enlarged = [
            distance if distance.shape[-2:] == size else F.interpolate(distance, size=size, mode="bilinear")
            for distance in distances
        ]
        return torch.cat([*enlarged, self.head(products)], dim=1)

    @torch.inference_mode()
    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Set the normalisation of each raw map from batches (B, 3, S, S) of calibration normals."""
        sums, squares, count = torch.zeros(len(self.map_mean)), torch.zeros(len(self.map_mean)), 0
        for batch in batches:
            maps = self.raw_maps(batch).double().cpu()
            sums = sums + maps.sum(dim=(0, 2, 3))
            squares = squares + maps.square().sum(dim=(0, 2, 3))
            count += maps.shape[0] * maps.shape[2] * maps.shape[3]
        mean = sums / count
        self.map_mean.copy_(mean)
        self.map_std.copy_((squares / count - mean.square()).clamp_min(1e-12).sqrt())


def feature_products(teacher: Features, student: Features) -> Features:
    """Channel-wise products of L2-normalised features; their sum over channels is the cosine similarity."""
    return tuple(F.normalize(t, dim=1) * F.normalize(s, dim=1) for t, s in zip(teacher, student, strict=True))


def gaussian_kernel(sigma: float) -> Tensor:
    """(1, 1, k) one-dimensional Gaussian that sums to 1, cut at 3 sigma; sigma 0 is the identity."""
    radius = math.ceil(3 * sigma)
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (offsets / max(sigma, 1e-6)).square())
    return (kernel / kernel.sum()).view(1, 1, -1)


def smooth(maps: Tensor, kernel: Tensor) -> Tensor:
    """Separable Gaussian blur of (B, 1, H, W) with replicated borders."""
    radius = kernel.shape[-1] // 2
    if radius == 0:
        return maps
    padded = F.pad(maps, (radius,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel.unsqueeze(2)), kernel.unsqueeze(3))


def top_mean(maps: Tensor, share: float) -> Tensor:
    """Mean of the highest `share` of each map's pixels, at least one: (B, 1, H, W) → (B,)."""
    flat = maps.flatten(1)
    count = max(1, round(share * flat.shape[1]))
    return flat.topk(count, dim=1).values.mean(dim=1)


def save_detector(detector: Detector, folder: Path, teacher: TeacherSettings, distill: DistillSettings) -> None:
    """Write `detector.safetensors` (teacher included, so that nothing else is needed) and `config.json`."""
    with atomic_file(folder / "detector.safetensors") as temporary:
        save_file({key: value.detach().cpu().contiguous() for key, value in detector.state_dict().items()}, temporary)
    config = {"detector": asdict(detector.config), "digest": settings_digest(teacher, distill)}
    write_json(folder / "config.json", config)


def load_detector(folder: Path, device: str | torch.device = "cpu") -> Detector:
    """Read what `save_detector` wrote, in eval mode.

    Raises:
        UserError: a file is missing, damaged or does not fit the other.
    """
    path = folder / "config.json"
    try:
        fields = read_json(path)["detector"]
        values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}
        config = DetectorConfig(**values)
        detector = Detector(config)
        detector.load_state_dict(load_file(folder / "detector.safetensors"))
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{folder} holds no detector that fits its config.json ({type(error).__name__}); run distill again."
        ) from error
    return detector.to(device).eval()
