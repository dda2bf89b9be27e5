"""The detector as one module: image in, anomaly map and score out, all normalisation inside."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flawsmith.detector.config import DistillSettings, TeacherSettings
from flawsmith.detector.energy import energy_exponent, relative_energy
from flawsmith.detector.memory import NormalMemory, as_places
from flawsmith.detector.student import DistanceHead, SegmentationHead, Student, enlarge
from flawsmith.detector.teacher import Features, Teacher
from flawsmith.errors import UserError
from flawsmith.files import atomic_file, read_json, write_json
from flawsmith.sections import settings_digest

LEAST_DEVIATION = 1e-6  # less is that of nothing: a score in units of it would be a random large number


@dataclass(frozen=True)
class DetectorConfig:
    """What is needed to build the module before its weights are loaded."""

    backbone: str
    out_indices: tuple[int, ...]
    image_size: int
    bottleneck: int
    decoder_channels: tuple[int, ...]
    head_channels: int
    locator_channels: int
    memory: int
    memory_dimensions: int
    map_weights: tuple[float, ...]
    score_weights: tuple[float, ...]
    smoothing: float
    top_shares: tuple[float, ...]

    @classmethod
    def of(cls, teacher: TeacherSettings, distill: DistillSettings, image_size: int, memory: int) -> "DetectorConfig":
        """The configuration that settings ask for, with `memory` places remembered (see `memory_size`)."""
        return cls(
            teacher.backbone,
            teacher.out_indices,
            image_size,
            distill.bottleneck,
            distill.decoder_channels,
            distill.head_channels,
            distill.locator_channels,
            memory,
            distill.memory_dimensions,
            distill.map_weights,
            distill.score_weights,
            distill.smoothing,
            distill.top_shares,
        )


class Detector(nn.Module):
    """Frozen teacher, student, memory and two heads, fused into one anomaly map and one score.

    Raw maps: 1 - cosine similarity between teacher and student at each scale that the student answers, weighted by
    energy as far as normal places ask for it (`detector.energy`); the same between the coarsest teacher feature and the
    nearest remembered one; the logit of the segmentation head, which reads the teacher's and the student's agreement
    channel by channel, and that of the locator, which reads these distances alone. Each is brought to zero mean and
    unit deviation over the pixels of the calibration normals (`calibrate`), so that a weighted mean adds like to like.
    All of them meet at the stride of the finest level that the student answers; sums are smoothed.

    Two sums are made, since what tells best whether there is a defect is not what shows best where it ends
    (docs/experiments.md, round 10): by `map_weights` the anomaly map, enlarged to the image's size; by `score_weights`
    the one that the image score looks at. Defects come at all sizes, from a pore to a shadow over the whole part, so
    the score takes several views: the means of the highest `top_shares`, each in units of its deviation over the
    calibration normals, averaged.
    """

    map_mean: Tensor
    map_std: Tensor
    score_mean: Tensor
    score_std: Tensor
    map_weights: Tensor
    score_weights: Tensor
    kernel: Tensor
    exponents: Tensor

    def __init__(self, config: DetectorConfig, teacher: Teacher | None = None) -> None:
        super().__init__()
        self.config = config
        self.teacher = teacher or Teacher(config.backbone, config.out_indices)
        channels = self.teacher.channels
        self.student = Student(channels, config.bottleneck, config.decoder_channels)
        self.memory = NormalMemory(config.memory, channels[-1], config.memory_dimensions) if config.memory else None
        answered = channels[-len(config.decoder_channels) :]
        read = (*answered, 1) if config.memory else answered
        self.head = SegmentationHead(read, config.head_channels)
        self.locator = DistanceHead(len(read), config.locator_channels)
        without = None if config.memory else len(answered)  # the place of the memory's map
        weights, score_weights = (
            torch.tensor([weight for place, weight in enumerate(given) if place != without])
            for given in (config.map_weights, config.score_weights)
        )
        used = len(weights)
        self.register_buffer("exponents", torch.zeros(len(answered)))
        self.register_buffer("map_mean", torch.zeros(used))
        self.register_buffer("map_std", torch.ones(used))
        self.register_buffer("score_mean", torch.zeros(len(config.top_shares)))
        self.register_buffer("score_std", torch.ones(len(config.top_shares)))
        self.register_buffer("map_weights", weights / weights.sum(), persistent=False)
        self.register_buffer("score_weights", score_weights / score_weights.sum(), persistent=False)
        self.register_buffer("kernel", gaussian_kernel(config.smoothing / self.stride), persistent=False)

    @property
    def stride(self) -> int:
        """Pixels a cell of the maps."""
        return self.teacher.strides[-len(self.config.decoder_channels)]

    @property
    def energy_exponents(self) -> list[float]:
        """Of each of `distances`: a scale that the student answers, finest first, then the memory."""
        return [*self.exponents.tolist(), *([] if self.memory is None else [float(self.memory.exponent)])]

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, S, S) in [0, 1] → anomaly map (B, 1, S, S) and score (B,); 0 is the mean of normal parts in both."""
        return self.answer(self.raw_maps(image), image.shape[-2:])

    def answer(self, raw: Tensor, size: torch.Size) -> tuple[Tensor, Tensor]:
        """Raw maps (B, K, h, w) → anomaly map (B, 1, *size) and score (B,)."""
        fused = self.fuse(raw, self.map_weights)
        pooled = self.pooled(self.fuse(raw, self.score_weights))
        score = ((pooled - self.score_mean) / self.score_std).mean(dim=1)
        return F.interpolate(fused, size=size, mode="bilinear", align_corners=False), score

    def fuse(self, raw: Tensor, weights: Tensor) -> Tensor:
        """Raw maps (B, K, h, w) → their smoothed mean after normalisation, weighted by `weights` (K,): (B, 1, h, w)."""
        maps = (raw - self.map_mean.view(1, -1, 1, 1)) / self.map_std.view(1, -1, 1, 1)
        return smooth((maps * weights.view(1, -1, 1, 1)).sum(dim=1, keepdim=True), self.kernel)

    def pooled(self, fused: Tensor) -> Tensor:
        """(B, 1, h, w) → (B, len(top_shares)): mean of the highest share of pixels, for each share."""
        return torch.stack([top_mean(fused, share) for share in self.config.top_shares], dim=1)

    def raw_maps(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) → (B, K, h, w) at `stride`: `distances`, then the logits of head and locator."""
        features = self.teacher(image)
        remembered = self.recall(features)
        products = feature_products(features, self.student(features))
        distances = self.distances(features, products, remembered)
        head = self.head((*products, *remembered), distances.shape[-2:])
        return torch.cat([distances, head, self.locator(distances)], dim=1)

    def distances(self, features: Features, products: Features, remembered: Features) -> Tensor:
        """How far each place is from normal, (B, D, h, w) at `stride`: a scale, finest first, then to the memory.

        Args:
            features: of the teacher, (B, C_k, h_k, w_k) a level.
            products: `feature_products` of the levels that the student answers.
            remembered: `recall`.
        """
        energies = self.energies(features)
        found = [
            (1 - product.sum(dim=1, keepdim=True)) * energy.pow(exponent)
            for product, energy, exponent in zip(products, energies, self.exponents, strict=True)
        ]
        size = found[0].shape[-2:]
        return torch.cat([enlarge(part, size) for part in (*found, *remembered)], dim=1)

    def energies(self, features: Features) -> Features:
        """`relative_energy` of the levels that the student answers."""
        return tuple(relative_energy(level) for level in features[-len(self.exponents) :])

    @torch.no_grad()
    def fit_exponents(self, normals: Iterable[tuple[Features, Features]]) -> None:
        """Ask normal images how much energy counts (`energy_exponent`), for each scale that the student answers.

        Args:
            normals: `feature_products` and the teacher's features of batches of them.
        """
        found = []
        for products, features in normals:
            distances = [1 - product.sum(dim=1, keepdim=True) for product in products]
            found.append(list(zip(self.energies(features), distances, strict=True)))
        for place, scale in enumerate(zip(*found, strict=True)):
            self.exponents[place] = energy_exponent(scale)

    def recall(self, features: Features) -> Features:
        """Distance of each place to the memory, (B, 1, h, w); nothing without one."""
        return () if self.memory is None else (self.memory(as_places(features[-1])),)

    @torch.inference_mode()
    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Set the normalisation of raw maps, then of pooled scores, from batches (B, 3, S, S) of calibration normals.

        Their raw maps are kept meanwhile: K floats a cell, 20 kB an image of 256 pixels.
        """
        self.normalise([self.raw_maps(batch) for batch in batches])

    @torch.inference_mode()
    def normalise(self, raw: Sequence[Tensor]) -> None:
        """As `calibrate`, from the raw maps (B, K, h, w) of the calibration normals.

        Raises:
            UserError: the normals do not differ, so nothing can be measured in units of their deviation.
        """
        mean, deviation = _moments(maps.movedim(1, -1).flatten(0, 2) for maps in raw)
        _check_deviation(deviation[(self.map_weights.cpu() > 0) | (self.score_weights.cpu() > 0)])
        self.map_mean.copy_(mean)
        self.map_std.copy_(deviation)
        mean, deviation = _moments(self.pooled(self.fuse(maps, self.score_weights)) for maps in raw)
        _check_deviation(deviation)
        self.score_mean.copy_(mean)
        self.score_std.copy_(deviation)


@torch.inference_mode()
def remember(detector: Detector, normals: Iterable[Tensor], images: int) -> Tensor | None:
    """Fill the detector's memory from batches (B, 3, S, S) of the fit normals, `images` in all.

    Returns:
        whose each key is, (M,) indices of normals; None if the detector has no memory.
    """
    if detector.memory is None:
        return None
    return detector.memory.fill((as_places(detector.teacher(batch)[-1]) for batch in normals), images)


def _moments(parts: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over all rows of `parts`, each (n, K), in float64."""
    sums, squares, count = torch.zeros(1), torch.zeros(1), 0
    for part in parts:
        rows = part.double().cpu()
        sums, squares, count = sums + rows.sum(dim=0), squares + rows.square().sum(dim=0), count + len(rows)
    mean = sums / count
    return mean, (squares / count - mean.square()).clamp_min(LEAST_DEVIATION**2).sqrt()


def _check_deviation(deviation: Tensor) -> None:
    if (deviation <= LEAST_DEVIATION).any():
        raise UserError(
            "The calibration normals do not differ from each other, so no threshold can be told from them; add "
            "different images to train/good, or raise data.calibration_fraction."
        )


def feature_products(teacher: Features, student: Features) -> Features:
    """Channel-wise products of L2-normalised features; their sum over channels is the cosine similarity.

    One for each level that the student answers, the coarsest ones of the teacher's.
    """
    levels = zip(teacher[-len(student) :], student, strict=True)
    return tuple(F.normalize(t, dim=1) * F.normalize(s, dim=1) for t, s in levels)


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


def save_detector(
    detector: Detector,
    folder: Path,
    teacher: TeacherSettings,
    distill: DistillSettings,
    found: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Write `detector.safetensors` (teacher included, so that nothing else is needed) and `config.json`, which also
    tells what was `found` on the way."""
    with atomic_file(folder / "detector.safetensors") as temporary:
        save_file({key: value.detach().cpu().contiguous() for key, value in detector.state_dict().items()}, temporary)
    config = {"detector": asdict(detector.config), "digest": settings_digest(teacher, distill), **found}
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
