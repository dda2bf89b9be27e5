"""The detector as one module: image in, anomaly map and score out, all normalisation inside."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flawsmith.detector.config import DistillSettings, TeacherSettings
from flawsmith.detector.memory import MEMORIES, TINY, MemoryBank
from flawsmith.detector.student import SegmentationHead, Student, enlarge
from flawsmith.detector.teacher import Features, Teacher
from flawsmith.errors import UserError
from flawsmith.files import atomic_file, read_json, write_json
from flawsmith.sections import settings_digest

RINGS = 4  # distances from the border, in cells, with units of their own
LEVELS = ("fine", "middle", "coarse")  # of the teacher
SHARPNESS = 40.0  # of the memories' weights: with .03 of AUROC less a memory counts a third
TOLD = 0.005  # share of the highest cells by which memories are weighed
# The student is trusted whole at the first value and beyond, not at all at the second, in between by proportion.
WRONG = (0.14, 0.22)  # mean 1 - cosine similarity of teacher and student on normal parts
MARKED = (0.65, 0.45)  # its average precision on synthetic defects over that of the memories
NOTHING_EXCLUDED: Mapping[str, Tensor] = MappingProxyType({})
LEAST_DEVIATION = 1e-6  # less is that of nothing: a score in units of it would be a random large number


@dataclass(frozen=True)
class DetectorConfig:
    """What the module is built from before its weights are loaded.

    Attributes:
        shape: height and width of the images.
        decoder_channels: as `Student`; () for no student.
        head_channels: 0 for no segmentation head.
        memories: patches that each of MEMORIES keeps; () for no memories.
    """

    backbone: str
    out_indices: tuple[int, ...]
    shape: tuple[int, int]
    bottleneck: int
    decoder_channels: tuple[int, ...]
    head_channels: int
    memories: tuple[int, ...]
    smoothing: float
    top_shares: tuple[float, ...]

    @classmethod
    def of(
        cls, teacher: TeacherSettings, distill: DistillSettings, shape: tuple[int, int], memories: tuple[int, ...]
    ) -> "DetectorConfig":
        """The configuration of the settings, with memories of these sizes (see `normals.memory_sizes`)."""
        return cls(
            teacher.backbone,
            teacher.out_indices,
            shape,
            distill.bottleneck,
            distill.decoder_channels,
            distill.head_channels,
            memories,
            distill.smoothing,
            distill.top_shares,
        )


class Detector(nn.Module):
    """Frozen teacher, memories, student and segmentation head, fused into one anomaly map and one score.

    1. `raw_maps`: how far each cell is from normal, by name: its power distance to each memory; for each level that the
       student answers, 1 - cosine similarity of teacher and student.
    2. `standardise`: each map in units of its deviation over the calibration normals, apart for the cells at each
       distance from the border, since the zeros beyond it make features noisy.
    3. `remembered` and `answered` sum up the memories' maps, weighed by how well each finds the synthetic defects, and
       the student's. The student counts as far as it deserves `trust`: if it cannot answer the features of normal
       parts, a wrong answer tells nothing; nor may it mark the synthetic defects much worse than the memories.
    4. The score reads `decided`, the product of both: it is high where both find something. It averages the means of
       the highest `top_shares` of cells, each in units of its deviation over the calibration normals, since defects
       come at all sizes.
    5. The anomaly map is `drawn` by the student where it is trusted, else by the memories: an image of another weave or
       cast is far from all that is remembered, as a whole, and the defect does not stand out. The segmentation head,
       which reads the standardised maps, counts half in it (`head_share`) if it marks the validation triplets better,
       else nothing. The map is then smoothed and enlarged. Small defects stand out in what is not smoothed: so the
       score reads that.
    """

    map_mean: Tensor
    map_deviation: Tensor
    weights: Tensor
    trust: Tensor
    head_share: Tensor
    fused_mean: Tensor
    fused_deviation: Tensor
    score_mean: Tensor
    score_deviation: Tensor
    kernel: Tensor

    def __init__(self, config: DetectorConfig, teacher: Teacher | None = None) -> None:
        super().__init__()
        self.config = config
        self.teacher = teacher or Teacher(config.backbone, config.out_indices)
        channels, strides = self.teacher.channels, self.teacher.strides
        self.student = Student(channels, strides, config.bottleneck, config.decoder_channels)
        kinds = zip(MEMORIES.items(), config.memories, strict=False)
        self.memories = nn.ModuleDict(
            {name: MemoryBank(size, kind.channels(self.teacher)) for (name, kind), size in kinds}
        )
        answered = [f"student_{level}" for level in LEVELS[len(LEVELS) - len(config.decoder_channels) :]]
        self.names = (*self.memories, *answered)
        self.head = SegmentationHead(len(self.names), config.head_channels)
        shares = len(config.top_shares)
        self.register_buffer("map_mean", torch.zeros(len(self.names), RINGS))
        self.register_buffer("map_deviation", torch.ones(len(self.names), RINGS))
        self.register_buffer("weights", torch.full((len(self.memories),), 1 / max(1, len(self.memories))))
        self.register_buffer("trust", torch.tensor(0.0 if self.memories else 1.0))
        self.register_buffer("head_share", torch.zeros(()))
        self.register_buffer("fused_mean", torch.zeros(2))
        self.register_buffer("fused_deviation", torch.ones(2))
        self.register_buffer("score_mean", torch.zeros(shares))
        self.register_buffer("score_deviation", torch.ones(shares))
        self.register_buffer("kernel", gaussian_kernel(config.smoothing / self.stride), persistent=False)

    @property
    def banks(self) -> dict[str, MemoryBank]:
        """The memories by name."""
        return {name: bank for name, bank in self.memories.items() if isinstance(bank, MemoryBank)}

    @property
    def stride(self) -> int:
        """Pixels a cell of the maps."""
        return self.teacher.strides[min(1, 3 - len(self.config.decoder_channels))]

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) in [0, 1] → anomaly map (B, 1, H, W) and score (B,); 0 is the mean of normal parts in both."""
        return self.judge(self.raw_maps(image), image.shape[-2:])

    def judge(self, raw: Mapping[str, Tensor], size: torch.Size | tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """As `forward`, from the raw maps of images of a size."""
        maps = self.standardise(raw)
        score = ((self.pooled(self.decided(maps)) - self.score_mean) / self.score_deviation).mean(dim=1)
        return enlarge(smooth(self.fuse(maps), self.kernel), size), score

    def raw_maps(self, image: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) → name → (B, 1, h, w) at `stride`, higher where less normal."""
        return self.maps_of(self.teacher(image))

    def maps_of(self, features: Features, excluded: Mapping[str, Tensor] = NOTHING_EXCLUDED) -> dict[str, Tensor]:
        """As `raw_maps`, of the teacher's features (B, C_k, h_k, w_k) a level.

        Args:
            excluded: memory → (B, M) bool, its patches that do not count for an image.
        """
        found = {
            name: memory(MEMORIES[name].patches(features), excluded.get(name)) for name, memory in self.memories.items()
        }
        products = feature_products(features, self.student(features))
        answered = self.names[len(found) :]
        found |= {name: 1 - product.sum(dim=1, keepdim=True) for name, product in zip(answered, products, strict=True)}
        pixels = features[0].shape[-2] * self.teacher.strides[0], features[0].shape[-1] * self.teacher.strides[0]
        size = pixels[0] // self.stride, pixels[1] // self.stride
        return {name: enlarge(part, size) for name, part in found.items()}

    def standardise(self, raw: Mapping[str, Tensor]) -> Tensor:
        """Raw maps, each (B, 1, h, w) → (B, K, h, w) in the order of `names`."""
        maps = torch.cat([raw[name] for name in self.names], dim=1)
        rings = ring_of_cells(*maps.shape[-2:]).to(maps.device)
        return (maps - self.map_mean[:, rings]) / self.map_deviation[:, rings]

    def remembered(self, maps: Tensor) -> Tensor:
        """Standardised maps (B, K, h, w) → (B, 1, h, w): logarithm of what the memories find."""
        memories = maps[:, : len(self.weights)] * self.weights.view(1, -1, 1, 1)
        return F.softplus(memories.sum(dim=1, keepdim=True)).clamp_min(TINY).log()

    def answered(self, maps: Tensor) -> Tensor:
        """Standardised maps (B, K, h, w) → (B, 1, h, w): logarithm of what the student finds, averaged over levels;
        0 without a student."""
        if len(self.names) == len(self.weights):
            return torch.zeros_like(maps[:, :1])
        return F.softplus(maps[:, len(self.weights) :]).clamp_min(TINY).log().mean(dim=1, keepdim=True)

    def decided(self, maps: Tensor) -> Tensor:
        """Standardised maps (B, K, h, w) → (B, 1, h, w), above 0: the map that the score reads."""
        return (self.remembered(maps) + self.trust * self.answered(maps)).exp()

    def drawn(self, maps: Tensor) -> Tensor:
        """Standardised maps (B, K, h, w) → (B, 1, h, w), above 0: the anomaly map but for the segmentation head."""
        return ((1 - self.trust) * self.remembered(maps) + self.trust * self.answered(maps)).exp()

    def fuse(self, maps: Tensor) -> Tensor:
        """Standardised maps (B, K, h, w) → anomaly map (B, 1, h, w), not smoothed."""
        both = torch.cat([self.drawn(maps), self.head(maps)], dim=1)
        both = (both - self.fused_mean.view(1, -1, 1, 1)) / self.fused_deviation.view(1, -1, 1, 1)
        return both[:, :1] * (1 - self.head_share) + both[:, 1:] * self.head_share

    def pooled(self, maps: Tensor) -> Tensor:
        """(B, 1, h, w) → (B, len(top_shares)): mean of the highest share of pixels, for each share."""
        return torch.stack([top_mean(maps, share) for share in self.config.top_shares], dim=1)

    @torch.no_grad()
    def fit_standard(self, raw: Mapping[str, Tensor]) -> None:
        """Set the units of the maps from calibration normals.

        Args:
            raw: their raw maps, each (N, 1, h, w).

        Raises:
            UserError: the normals do not differ, so nothing can be measured in units of their deviation.
        """
        maps = torch.cat([raw[name] for name in self.names], dim=1).double()
        rings = ring_of_cells(*maps.shape[-2:]).to(maps.device)
        inside = maps.movedim(1, -1).flatten(0, 2)
        _check_deviation(inside.std(dim=0))
        for ring in range(RINGS):
            # a map may be so small that it has no inner ring
            cells = maps[:, :, rings == ring].movedim(1, -1).flatten(0, 1) if (rings == ring).any() else inside
            self.map_mean[:, ring] = cells.mean(dim=0)
            self.map_deviation[:, ring] = cells.std(dim=0).clamp_min(LEAST_DEVIATION)

    @torch.no_grad()
    def fit_weights(self, normal: Tensor, defect: Tensor) -> None:
        """Weigh the memories by how well each alone tells defect images from normal ones: a softmax of SHARPNESS times
        the AUROC of its highest TOLD of cells averaged.

        Args:
            normal, defect: standardised maps (N, K, h, w) of normal images and of images with synthetic defects.
        """
        good, bad = (
            torch.stack([top_mean(maps[:, place : place + 1], TOLD) for place in range(maps.shape[1])]).double()
            for maps in (normal, defect)
        )
        above, equal = ((bad[:, :, None] > good[:, None]), (bad[:, :, None] == good[:, None]))
        areas = (above.double() + 0.5 * equal.double()).mean(dim=(1, 2))
        self.weights.copy_(torch.softmax(SHARPNESS * areas[: len(self.weights)], dim=0))

    @torch.no_grad()
    def fit_trust(self, raw: Mapping[str, Tensor], student: float, memories: float) -> None:
        """Set how far the student is trusted. Without a memory there is nothing but the student.

        Args:
            raw: raw maps of calibration normals, each (N, 1, h, w).
            student, memories: average precision, in [0, 1], with which each marks synthetic defects; nan if there are
                none, and then the student is not trusted.
        """
        if not len(self.weights):
            return
        wrong = float(torch.stack([raw[name].mean() for name in self.names[len(self.weights) :]]).mean())
        self.trust.fill_(_share(wrong, *WRONG) * _share(student / max(memories, TINY), *MARKED))

    @torch.no_grad()
    def calibrate(self, maps: Tensor) -> None:
        """Set the units of the anomaly map's parts and of the score from standardised maps (N, K, h, w) of calibration
        normals.

        Raises:
            UserError: the normals do not differ.
        """
        both = torch.cat([self.drawn(maps), self.head(maps)], dim=1).double().movedim(1, -1).flatten(0, 2)
        self.fused_mean.copy_(both.mean(dim=0))
        self.fused_deviation.copy_(both.std(dim=0).clamp_min(LEAST_DEVIATION))
        pooled = self.pooled(self.decided(maps)).double()
        deviation = pooled.std(dim=0, unbiased=False)
        _check_deviation(deviation)
        self.score_mean.copy_(pooled.mean(dim=0))
        self.score_deviation.copy_(deviation)

    def told(self) -> dict[str, Any]:
        """What training found: how much each part counts."""
        parts = {
            **dict(zip(self.memories, self.weights.tolist(), strict=True)),
            "student": float(self.trust),
            "head": float(self.head_share),
        }
        return {name: round(value, 4) for name, value in parts.items()}


def ring_of_cells(height: int, width: int) -> Tensor:
    """(height, width): each cell's distance from the border in cells, RINGS - 1 for all that are farther."""
    rows, columns = (torch.minimum(torch.arange(n), n - 1 - torch.arange(n)) for n in (height, width))
    return torch.minimum(rows[:, None], columns[None]).clamp_max(RINGS - 1)


def _share(value: float, whole: float, none: float) -> float:
    """1 at `whole` and beyond, 0 at `none` and beyond, in between by proportion; 0 of nan."""
    return min(1.0, max(0.0, (value - none) / (whole - none)))


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
    levels = zip(teacher[len(teacher) - len(student) :], student, strict=True)
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
