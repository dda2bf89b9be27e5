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
from flawsmith.detector.feature_norm import norm_power, relative_norm
from flawsmith.detector.memory import MemoryBank, as_patches
from flawsmith.detector.student import LocalisationHead, SegmentationHead, Student, enlarge
from flawsmith.detector.teacher import Features, Teacher
from flawsmith.errors import UserError
from flawsmith.files import atomic_file, read_json, write_json
from flawsmith.sections import settings_digest

LEAST_DEVIATION = 1e-6  # less is that of nothing: a score in units of it would be a random large number


@dataclass(frozen=True)
class DetectorConfig:
    """What the module is built from before its weights are loaded."""

    backbone: str
    out_indices: tuple[int, ...]
    shape: tuple[int, int]  # height and width of the images
    bottleneck: int
    decoder_channels: tuple[int, ...]
    head_channels: int
    localisation_channels: int
    memory: int
    memory_dimensions: int
    map_weights: tuple[float, ...]
    score_weights: tuple[float, ...]
    smoothing: float
    top_shares: tuple[float, ...]

    @classmethod
    def of(
        cls, teacher: TeacherSettings, distill: DistillSettings, shape: tuple[int, int], memory: int
    ) -> "DetectorConfig":
        """The configuration of the settings, with room for `memory` patches in the memory bank (see `memory_size`)."""
        return cls(
            teacher.backbone,
            teacher.out_indices,
            shape,
            distill.bottleneck,
            distill.decoder_channels,
            distill.head_channels,
            distill.localisation_channels,
            memory,
            distill.memory_dimensions,
            distill.map_weights,
            distill.score_weights,
            distill.smoothing,
            distill.top_shares,
        )


class Detector(nn.Module):
    """Frozen teacher, student, memory bank and two heads, fused into one anomaly map and one score.

    Raw maps, at the stride of the finest level that the student answers, each (B, 1, h, w):

    - for each of these levels 1 - cosine similarity of teacher and student, times a power of the feature norm;
    - the distance to the memory bank, if there is one;
    - the logit of the segmentation head, which reads teacher and student channel by channel;
    - the logit of the localisation head, which reads the distances above alone.

    Each is brought to zero mean and unit deviation over the pixels of the calibration normals (`calibrate`) and summed
    with two sets of weights, since what tells best whether there is a defect does not show best where it ends. The sum
    by `map_weights`, smoothed and enlarged, is the anomaly map. The score reads the sum by `score_weights`: the means
    of its highest `top_shares` of pixels, each in units of its deviation over the calibration normals, averaged, since
    defects come at all sizes.
    """

    map_mean: Tensor
    map_std: Tensor
    score_mean: Tensor
    score_std: Tensor
    map_weights: Tensor
    score_weights: Tensor
    kernel: Tensor
    norm_powers: Tensor

    def __init__(self, config: DetectorConfig, teacher: Teacher | None = None) -> None:
        super().__init__()
        self.config = config
        self.teacher = teacher or Teacher(config.backbone, config.out_indices)
        channels = self.teacher.channels
        self.student = Student(channels, config.bottleneck, config.decoder_channels)
        self.memory = MemoryBank(config.memory, channels[-1], config.memory_dimensions) if config.memory else None
        answered = channels[-len(config.decoder_channels) :]
        read = (*answered, 1) if config.memory else answered
        self.head = SegmentationHead(read, config.head_channels)
        self.localisation = LocalisationHead(len(read), config.localisation_channels)
        without = None if config.memory else len(answered)  # the index of the memory bank's map
        weights, score_weights = (
            torch.tensor([weight for index, weight in enumerate(given) if index != without])
            for given in (config.map_weights, config.score_weights)
        )
        used = len(weights)
        self.register_buffer("norm_powers", torch.zeros(len(answered)))
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
    def all_norm_powers(self) -> list[float]:
        """The norm power of each of `distances`."""
        return [*self.norm_powers.tolist(), *([] if self.memory is None else [float(self.memory.norm_power)])]

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
        """Normalise raw maps (B, K, h, w), average them by `weights` (K,) and smooth: (B, 1, h, w)."""
        maps = (raw - self.map_mean.view(1, -1, 1, 1)) / self.map_std.view(1, -1, 1, 1)
        return smooth((maps * weights.view(1, -1, 1, 1)).sum(dim=1, keepdim=True), self.kernel)

    def pooled(self, fused: Tensor) -> Tensor:
        """(B, 1, h, w) → (B, len(top_shares)): mean of the highest share of pixels, for each share."""
        return torch.stack([top_mean(fused, share) for share in self.config.top_shares], dim=1)

    def raw_maps(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) → (B, K, h, w) at `stride`: `distances`, then the logits of the two heads."""
        features = self.teacher(image)
        remembered = self.recall(features)
        products = feature_products(features, self.student(features))
        distances = self.distances(features, products, remembered)
        head = self.head((*products, *remembered), distances.shape[-2:])
        return torch.cat([distances, head, self.localisation(distances)], dim=1)

    def distances(self, features: Features, products: Features, remembered: Features) -> Tensor:
        """How far each cell is from normal, (B, D, h, w) at `stride`: by level, finest first, then by the memory bank.

        Args:
            features: of the teacher, (B, C_k, h_k, w_k) a level.
            products: `feature_products` of the levels that the student answers.
            remembered: `recall`.
        """
        found = [
            (1 - product.sum(dim=1, keepdim=True)) * norm.pow(power)
            for product, norm, power in zip(products, self.feature_norms(features), self.norm_powers, strict=True)
        ]
        size = found[0].shape[-2:]
        return torch.cat([enlarge(part, size) for part in (*found, *remembered)], dim=1)

    def feature_norms(self, features: Features) -> Features:
        """`relative_norm` of the levels that the student answers."""
        return tuple(relative_norm(level) for level in features[-len(self.norm_powers) :])

    @torch.no_grad()
    def fit_norm_powers(self, normals: Iterable[tuple[Features, Features]]) -> None:
        """Set the norm power of each level that the student answers from normal images (`feature_norm`).

        Args:
            normals: `feature_products` and the teacher's features of batches of them.
        """
        found = []
        for products, features in normals:
            distances = [1 - product.sum(dim=1, keepdim=True) for product in products]
            found.append(list(zip(self.feature_norms(features), distances, strict=True)))
        for level, pairs in enumerate(zip(*found, strict=True)):
            self.norm_powers[level] = norm_power(pairs)

    def recall(self, features: Features) -> Features:
        """Distance of each patch to the memory bank, (B, 1, h, w); nothing without one."""
        return () if self.memory is None else (self.memory(as_patches(features[-1])),)

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
    """Fill the detector's memory bank from batches (B, 3, S, S) of the fit normals, `images` in all.

    Returns:
        source ids: the index of the normal behind each patch, (M,); None if the detector has no memory bank.
    """
    if detector.memory is None:
        return None
    return detector.memory.fill((as_patches(detector.teacher(batch)[-1]) for batch in normals), images)


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
