"""params.yaml as frozen settings: one class a section, each in the `config.py` of its package.

A section or key that params.yaml does not name has its default. The first wrong one is refused, in a sentence that
names it and what it may be.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from flawsmith.data.config import DataSettings
from flawsmith.demo.config import DemoDataSettings
from flawsmith.detector.config import DistillSettings, TeacherSettings
from flawsmith.diffusion.config import DdpmTrainSettings
from flawsmith.errors import UserError
from flawsmith.evaluation.config import EvaluateSettings
from flawsmith.export.config import ExportSettings
from flawsmith.monitoring.config import MonitorSettings
from flawsmith.quality.config import ValidateSettings
from flawsmith.registry.config import PromoteSettings
from flawsmith.sections import STRICT, nearest, section_problems, section_values, tuples
from flawsmith.synthesis.config import SynthesizeSettings, default_windows

_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_-])?")
_TAKEN = (".dvc", ".tmp", ".pyc", ".egg-info", "__pycache__", "thumbs.db")
LONGEST_CATEGORY = 100  # characters: file names and MLflow's experiments are made from it
FEATHER_REACH = 2  # pixels beyond synthesize.feather that a blended defect may still change


Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True, config=STRICT)
class ComputeSettings:
    """`compute`: where torch computes; the variables FLAWSMITH_DEVICE and FLAWSMITH_PRECISION count more."""

    device: Device = Field("auto", description="`auto`: a CUDA GPU where there is one")
    precision: Precision = Field("auto", description="`auto`: bfloat16 where the hardware has it")


@dataclass(frozen=True, config=STRICT)
class TrackingSettings:
    """`tracking`: whether stages are recorded in MLflow."""

    mode: Literal["on", "off"] = Field("on", description="`on` records every stage in MLflow, `off` records nothing")
    experiment_prefix: str = Field("flawsmith", description="experiments are named <prefix>/<category>")


@dataclasses.dataclass(frozen=True)
class Settings:
    """All of params.yaml, or of one category what holds for it."""

    categories: tuple[str, ...]
    seed: int
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
    overrides: Mapping[str, "Settings"]  # of the categories that have their own

    def of(self, category: str) -> "Settings":
        """Return what holds for one category: with its `overrides`, if it has any."""
        return self.overrides.get(category, self)

    def to_json(self) -> dict[str, Any]:
        """Return the seed and all sections as plain JSON values, shaped like params.yaml."""
        sections = {name: section_values(getattr(self, name.replace("-", "_"))) for name in SECTIONS}
        return {"seed": self.seed, **sections}


SECTIONS: dict[str, Any] = {
    name.replace("_", "-"): item.type
    for name, item in Settings.__dataclass_fields__.items()
    if dataclasses.is_dataclass(item.type)
}
# These keys follow another one where params.yaml does not name them.
FOLLOWS = {
    "data.split_seed": "seed",
    **{f"{stage}.seed": "seed" for stage in ("ddpm-train", "synthesize", "distill", "evaluate", "promote", "monitor")},
    "synthesize.windows": "data.image_size",
    "validate.visible_change": "synthesize.visibility",
    "validate.max_change_outside": "synthesize.visibility",
    "validate.outside_margin": "synthesize.feather",
}
# What `overrides` may hold; the others are the same for all categories.
OVERRIDABLE = [name for name in SECTIONS if name not in ("demo-data", "tracking")]


def load_settings(path: Path, replaced: Mapping[str, Any] | None = None) -> Settings:
    """Read params.yaml; `replaced` maps dotted keys such as `distill.batch` to values that count more than the file's.

    Raises:
        UserError: the file is missing or no mapping, a section or key is unknown (the nearest known one is named), or
            a value has the wrong type or lies outside its bounds.
    """
    return parse_settings(load_content(path, replaced), str(path))


def load_content(path: Path, replaced: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read params.yaml, with `replaced` as `load_settings` takes it, without a look at what the keys are.

    Raises:
        UserError: the file is missing or no mapping, or there is no such place for a replaced value.
    """
    try:
        content = read_yaml(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; run the command where params.yaml lies, or pass --params.") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid YAML: {error}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold sections such as `data:` and `distill:`; it holds {type(content).__name__}.")
    return _replace(content, replaced or {})


def default_settings(replaced: Mapping[str, Any]) -> Settings:
    """The settings of a params.yaml that says nothing, with `replaced` as `load_settings` takes it; errors as there."""
    return parse_settings(_replace({"categories": ["parts"]}, replaced), "--set")


def _replace(content: dict[str, Any], replaced: Mapping[str, Any]) -> dict[str, Any]:
    """Put values of dotted keys into `content`."""
    overrides = content["overrides"] if isinstance(content.get("overrides"), dict) else {}
    # whole sections first, so that none takes back a key that is named beside it
    for dotted, value in sorted(replaced.items(), key=lambda item: "." in item[0]):
        section, point, key = dotted.partition(".")
        if point and (not key or section in ("categories", "seed", "overrides")):
            known = "holds no keys" if key else "is to be followed by the name of a key"
            raise UserError(f"`{dotted}` cannot be replaced: `{section}` {known}.")
        if section == "categories" and isinstance(value, list):  # those of the others are no matter
            content["overrides"] = {name: own for name, own in overrides.items() if name in value}
        for place in [content, *(own for own in overrides.values() if isinstance(own, dict) and section in own)]:
            if not point:
                place[section] = value
            elif place.get(section) is None:
                place[section] = {key: value}
            elif isinstance(place[section], dict):  # else it is refused later
                place[section][key] = value
    return content


def read_yaml(text: str) -> Any:
    """Read YAML with the library that DVC reads with, so that a params.yaml means one thing to both.

    Raises:
        ValueError: it is no YAML, or a key stands twice.
    """
    try:
        return YAML(typ="safe", pure=True).load(text)
    except MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{str(error.problem).partition(' with value')[0]}{line}") from error
    except YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def parse_settings(content: Mapping[str, Any], source: str) -> Settings:
    """Check a mapping shaped like params.yaml; `source` names it in errors.

    Raises:
        UserError: the first fault.
    """
    for problem in problems(content):
        raise UserError(f"{source}: {problem}")
    own = {name: _build(_merged(content, values or {})) for name, values in _keys(content, "overrides").items()}
    return dataclasses.replace(_build(content), overrides=own)


def problems(content: Mapping[str, Any]) -> list[str]:
    """Say in one sentence each what is wrong with a mapping shaped like params.yaml.

    Faults of single keys come first; keys that contradict each other are only looked for where there are none.
    """
    found = [*_unknown(content, ["categories", "seed", "overrides", *SECTIONS], ""), *_category_problems(content)]
    seed = content.get("seed", 0)
    if type(seed) is not int or seed < 0:
        found.append(f"`seed` is {seed!r}; it must be a whole number of 0 or more.")
    for name, section in SECTIONS.items():
        found += section_problems(name, _keys(content, name), section)
    found = found or list(_conflicts(_build(content)))
    overrides = _keys(content, "overrides")
    if not isinstance(overrides, Mapping):
        found.append("`overrides` must hold the names of categories and, below them, sections with their keys.")
    elif not found:
        for category, own in overrides.items():
            found += _override_problems(content, category, {} if own is None else own)
    return found


def _override_problems(content: Mapping[str, Any], category: Any, own: Any) -> list[str]:
    """Say what is wrong with a category's own keys, where those of all are right."""
    place = f"overrides.{category}"
    if category not in content["categories"]:
        return [f"`{place}` names no category{nearest(str(category), content['categories'])}"]
    if not isinstance(own, Mapping):
        return [f"`{place}` must hold sections such as `data:`, with their keys below."]
    found = list(_unknown(own, OVERRIDABLE, f"{place}."))
    merged = _merged(content, own)
    for name in [name for name in own if name in OVERRIDABLE]:
        found += section_problems(name, merged[name], SECTIONS[name], f"{place}.")
        if name == "data" and isinstance(own[name], Mapping) and "root" in own[name]:
            found.append(f"`{place}.data.root` cannot be: dvc.yaml looks for all categories in one place; remove it.")
    return found or [f"with `{place}`, {conflict}" for conflict in _conflicts(_build(merged))]


def _unknown(content: Mapping[str, Any], known: list[str], place: str) -> Iterator[str]:
    for key in content:
        if key not in known:
            yield f"unknown section `{place}{key}`{nearest(str(key), known)}"


def _category_problems(content: Mapping[str, Any]) -> Iterator[str]:
    """Find categories whose name a folder, DVC, the shell, MLflow or Prefect cannot carry, or not tell apart."""
    names = content.get("categories")
    if not isinstance(names, list | tuple) or not names:
        yield "`categories` must be a list of one name or more, such as [my_part]."
        return
    alike: dict[str, str] = {}
    for name in names:
        if not isinstance(name, str):
            yield (
                f"`categories` holds {name}, which YAML reads as {type(name).__name__}, not as text; write the name of "
                'the folder in quotes, for example ["0815"].'
            )
        elif fault := _name_fault(name):
            yield f"category {name!r} {fault}; rename its folder and the category."
        elif (other := alike.setdefault(re.sub(r"[-_.]+", "-", name.lower()), name)) != name:
            yield (
                f"categories {other!r} and {name!r} differ only by case or by `-`, `_` and `.`, which some file "
                "systems and Prefect do not tell apart; rename one."
            )
        elif names.count(name) > 1:
            yield f"`categories` names {name!r} twice; remove one."


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


def _keys(content: Mapping[str, Any], name: str) -> Any:
    """A section's keys; none of them where it is left out or empty."""
    return {} if content.get(name) is None else content[name]


def _merged(content: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Lay a category's own keys over those of all."""
    merged = dict(content)
    for name, values in ((name, _keys(own, name)) for name in own):
        merged[name] = {**_keys(content, name), **values} if isinstance(values, Mapping) else values
    return merged


def _build(content: Mapping[str, Any]) -> Settings:
    """Build what has no faults, and fill in the keys that follow others."""
    sections = {name: section(**tuples(_keys(content, name))) for name, section in SECTIONS.items()}
    data, ddpm, synthesis = sections["data"], sections["ddpm-train"], sections["synthesize"]
    values = {
        "seed": content.get("seed", 0),
        "data.image_size": default_windows(data.image_size, ddpm.multiple),
        "synthesize.visibility": synthesis.visibility,
        "synthesize.feather": math.ceil(synthesis.feather) + FEATHER_REACH,
    }
    for dotted, followed in FOLLOWS.items():
        name, _, key = dotted.partition(".")
        if key not in _keys(content, name):
            sections[name] = dataclasses.replace(sections[name], **{key: values[followed]})
    named = {name.replace("-", "_"): section for name, section in sections.items()}
    return Settings(categories=tuple(content["categories"]), seed=values["seed"], overrides={}, **named)


def _conflicts(settings: Settings) -> Iterator[str]:
    """Find keys of several sections that cannot work together."""
    ddpm, gate, synthesis = settings.ddpm_train, settings.validate, settings.synthesize
    height, width = settings.data.shape
    for name, sides in (("ddpm-train.crop", (ddpm.crop,)), ("synthesize.windows", synthesis.windows)):
        for side in sides:
            if side % ddpm.multiple or side > settings.data.image_size:
                yield (
                    f"`{name}` is {side}; it must be a multiple of {ddpm.multiple} (patch and levels of the UNet) and "
                    f"at most data.image_size ({settings.data.image_size})."
                )
    if synthesis.steps > ddpm.train_timesteps:
        yield (
            f"`synthesize.steps` is {synthesis.steps}; it must be at most ddpm-train.train_timesteps "
            f"({ddpm.train_timesteps}), of which each step takes one or more."
        )
    if gate.outside_margin < synthesis.feather + FEATHER_REACH:
        yield (
            f"`validate.outside_margin` is {gate.outside_margin}; it must be at least synthesize.feather "
            f"({synthesis.feather:g}) + {FEATHER_REACH}, or every defect's soft edge counts as a change outside it."
        )
    if gate.min_triplets > synthesis.triplets:
        yield (
            f"`validate.min_triplets` is {gate.min_triplets} but `synthesize.triplets` only {synthesis.triplets}, so "
            "the gate would always fail; make more triplets or demand fewer."
        )
    low, high = synthesis.area
    window = max(0.0, max(synthesis.windows) - 4 * synthesis.feather)
    if max(1.0, low * height * width) > min(high * height * width, window**2):
        yield (
            f"`synthesize.area` is {[low, high]}, which no mask in {width} x {height} pixels can have inside "
            f"`synthesize.windows` {list(synthesis.windows)} and `synthesize.feather` {synthesis.feather:g}; "
            "change one of them."
        )
    if low > gate.mask_area[1] or high < gate.mask_area[0]:
        yield (
            f"`synthesize.area` is {[low, high]} but `validate.mask_area` allows only {list(gate.mask_area)}, so "
            "the gate would always fail; let them overlap."
        )
    for name, value, other, limit in (
        ("shade_area", synthesis.shade_area[1], "mask_area", gate.mask_area[1]),
        ("visibility", synthesis.visibility, "max_change_outside", gate.max_change_outside),
    ):
        if "illumination" in synthesis.shares and value > limit:
            yield (
                f"`synthesize.{name}` reaches {value:g} but `validate.{other}` allows only {limit:g}, so the gate "
                "would fail on shades; lower the first or raise the second."
            )
