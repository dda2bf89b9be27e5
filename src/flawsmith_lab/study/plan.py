"""What a study computes: its cells, one row of the result each, and the stage runs behind them.

A stage run lies in OUT/store/<category>/<stage>/<digest>. The digest covers all that decides its outcome: settings,
images, code and the run before it. Cells that agree in all of this share the run, so a diffusion model is trained once
for all that build on it.
"""

import itertools
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import flawsmith
from flawsmith.config import FOLLOWS, Settings, load_settings, read_yaml
from flawsmith.data.dataset import PARTS
from flawsmith.errors import FlawsmithError, UserError
from flawsmith.files import digest_file, digest_json, digest_path, read_json
from flawsmith.layout import Layout
from flawsmith.sections import deciding_values

PATCHCORE = "patchcore"
DIFFUSION = "diffusion"  # of synthesize.mixture
PIPELINE = ("ddpm-train", "synthesize", "validate", "distill", "evaluate")
STAGES = (*PIPELINE, PATCHCORE)
DIGITS = 20  # of a digest in a folder's name: 80 bits

# The sections or keys of the settings that a stage reads, beside SHARED and those that the stages before it read.
# ddpm-train reads the teacher only to report on itself, so a study of teachers trains the diffusion model once.
SHARED = ("data", "compute")
READS: Mapping[str, tuple[str, ...]] = {
    "ddpm-train": ("ddpm-train",),
    "synthesize": ("synthesize",),
    "validate": ("validate",),
    "distill": ("teacher", "distill"),
    "evaluate": ("teacher", "evaluate", "export.opset"),
    PATCHCORE: ("teacher", "evaluate"),
}
LABELLED = ("evaluate", PATCHCORE)  # what reads the whole category; the others read train/ alone
USES_A_MODEL = ("cli", "demo", "monitoring", "registry", "serve")  # packages without a say in what a stage leaves

SEED_KEYS = ("seed", *(key for key, followed in FOLLOWS.items() if followed == "seed"))
# Keys that a study sets itself, and what to use instead.
OWN_KEYS = {"categories": "--categories", "data.root": "--data", "evaluate.part": "--part"}


@dataclass(frozen=True)
class Method:
    """A row's recipe: settings that replace those of params.yaml, and the stages that run."""

    meaning: str
    settings: Mapping[str, Any]
    stages: tuple[str, ...] = PIPELINE


METHODS: Mapping[str, Method] = {
    "flawsmith": Method("the pipeline as params.yaml has it", {}),
    "no-diffusion": Method(
        "defect texture from the category's own images (DRAEM style)",
        {"synthesize.mixture": {"own": 0.8, "illumination": 0.2}},
    ),
    "random-mask": Method("thresholded random noise in the place of Perlin masks", {"synthesize.mask": "noise"}),
    "cutpaste": Method(
        "CutPaste patches (Li et al. 2021)", {"synthesize.mixture": {"cutpaste": 0.8, "illumination": 0.2}}
    ),
    "pieces": Method(
        "pieces of the part, missing, bent or moved", {"synthesize.mixture": {"pieces": 0.8, "illumination": 0.2}}
    ),
    PATCHCORE: Method("PatchCore on the same teacher, without training", {}, (PATCHCORE,)),
}


@dataclass(frozen=True)
class Request:
    """What was asked for; `grid` maps a dotted key to the values it takes, `replaced` to the one of all cells."""

    params: Path
    out: Path
    data: Path | None
    categories: tuple[str, ...]
    seeds: tuple[int, ...]
    methods: tuple[str, ...]
    parts: tuple[str, ...] = ("all",)
    replaced: Mapping[str, Any] = field(default_factory=dict)
    grid: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    reference: str = ""


@dataclass(frozen=True)
class StudyLayout(Layout):
    """A category's paths with each stage in a folder of its own choice; no stage can tell the difference."""

    folders: Mapping[str, Path] = field(default_factory=dict)

    def stage(self, name: str) -> Path:
        """The folder of a stage of this cell.

        Raises:
            FlawsmithError: the stage did not run before this one.
        """
        if name not in self.folders:
            raise FlawsmithError(f"A stage asked for `{name}`, which does not run before it in this study.")
        return self.folders[name]

    def resume(self, name: str) -> Path:
        """The folder of a stage's unfinished checkpoint."""
        return self.stage(name).with_suffix(".resume")


@dataclass(frozen=True)
class StageRun:
    """One stage run of one or more cells; `code` is the digest of the source files it must run with."""

    stage: str
    layout: StudyLayout
    code: str

    @property
    def folder(self) -> Path:
        """What the stage leaves; its name is the digest."""
        return self.layout.stage(self.stage)

    @property
    def is_done(self) -> bool:
        """Whether it has been computed: `<digest>.json` is written last."""
        return self.folder.with_suffix(".json").is_file() and self.folder.is_dir()

    @property
    def cost(self) -> dict[str, Any]:
        """Seconds, memory and device of the run that left the folder."""
        found: dict[str, Any] = read_json(self.folder.with_suffix(".json"))
        return found


@dataclass(frozen=True)
class Cell:
    """One row: a method with a seed at a point of the grid, on one part of a category's test images."""

    category: str
    method: str
    seed: int
    part: str
    grid: Mapping[str, Any]
    runs: tuple[StageRun, ...]  # in order; the last one evaluates

    @property
    def label(self) -> str:
        """E.g. `flawsmith synthesize.strength=[0.1,0.4]`."""
        return row_label(self.method, self.grid)


@dataclass(frozen=True)
class Plan:
    """All cells; `reference` is the method or row label that the others are compared with."""

    cells: tuple[Cell, ...]
    reference: str
    root: Path

    @cached_property
    def runs(self) -> tuple[StageRun, ...]:
        """Every stage run once, cell by cell, each after what it reads."""
        return tuple({run.folder: run for cell in self.cells for run in cell.runs}.values())


def row_label(method: str, grid: Mapping[str, Any]) -> str:
    """Name a row by its method and its point of the grid."""
    return " ".join([method, *(f"{key}={_plain(value)}" for key, value in grid.items())])


def parse_grid(texts: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    """`section.key=v1,v2` texts to a mapping; values are YAML, so a value may be a list: `[8,16],[32]`.

    Raises:
        UserError: a text is not of this form, or names a key or value twice.
    """
    grid: dict[str, tuple[Any, ...]] = {}
    for text in texts:
        key, _, values = (part.strip() for part in text.partition("="))
        try:
            parsed = read_yaml(f"[{values}]")
        except ValueError:
            parsed = []
        if "." not in key or not parsed or None in parsed:
            raise UserError(
                f"--grid {text}: write it as section.key=value,value, e.g. --grid distill.head_steps=60,120."
            )
        if key in grid:
            raise UserError(f"--grid names `{key}` twice; list all its values in one --grid {key}=...")
        if len({_plain(value) for value in parsed}) < len(parsed):
            raise UserError(f"--grid {text}: a value stands there twice; remove one.")
        grid[key] = tuple(parsed)
    return grid


def build_plan(request: Request) -> Plan:
    """Check everything that can be checked without computing, and lay out the cells.

    Raises:
        UserError: an unknown method, part, reference, category or key; a value out of bounds; unusable images.
    """
    _check_options(request)
    root = request.params.parent.resolve()
    base = load_settings(request.params, request.replaced)
    categories = request.categories or base.categories
    for category in categories:
        settings = _settings_of(request, categories, request.methods[0], {}, request.seeds[0], "all")
        _check_images(Layout(settings, category, root), request)
    points = [dict(zip(request.grid, values, strict=True)) for values in itertools.product(*request.grid.values())]
    code, digest = code_digest(), cache(digest_path)
    cells: dict[tuple[Any, ...], Cell] = {}
    for category, name, point, seed, part in itertools.product(
        categories, request.methods, points, request.seeds, request.parts
    ):
        shares = _settings_of(request, categories, name, point, seed, part).of(category).synthesize.shares
        stages = [one for one in METHODS[name].stages if one != "ddpm-train" or DIFFUSION in shares]
        read = {*SHARED, *(name for stage in stages for name in READS[stage])}
        grid = {key: value for key, value in point.items() if key in read or key.partition(".")[0] in read}
        identity = (category, row_label(name, grid), seed, part)
        if identity not in cells:  # a key that a method does not read gives it no further rows
            settings = _settings_of(request, categories, name, grid, seed, part)
            layout = StudyLayout(settings, category, root)
            runs = _stage_runs(layout, stages, request.out.resolve() / "store", code, digest)
            cells[identity] = Cell(category, name, seed, part, MappingProxyType(grid), runs)
    for key in request.grid:
        if not any(key in cell.grid for cell in cells.values()):
            raise UserError(f"--grid {key}: no stage of {', '.join(request.methods)} reads it; remove it.")
    known = list(dict.fromkeys(name for cell in cells.values() for name in (cell.method, cell.label)))
    reference = request.reference or (PATCHCORE if PATCHCORE in known else next(iter(cells.values())).label)
    if reference not in known:
        raise UserError(f"--reference {reference}: no such row; known are {', '.join(known)}.")
    return Plan(tuple(cells.values()), reference, root)


def _stage_runs(
    layout: StudyLayout, stages: Iterable[str], store: Path, code: str, digest: Callable[[Path], str]
) -> tuple[StageRun, ...]:
    images, runs, before = layout.surface().folder, [], ""
    folders: dict[str, Path] = {}
    for stage in stages:
        content = {
            "stage": stage,
            "category": layout.category,
            "settings": {name: _deciding(layout.settings, name) for name in (*SHARED, *READS[stage])},
            "images": digest(images if stage in LABELLED else images / "train"),
            "code": code,
            "before": before,
        }
        before = digest_json(content)[:DIGITS]
        folders = {**folders, stage: store / layout.category / stage / before}
        runs.append(StageRun(stage, StudyLayout(layout.settings, layout.category, layout.root, folders), code))
    return tuple(runs)


def code_digest(package: Path = Path(flawsmith.__file__).parent) -> str:
    """SHA-256 of the product's source files, without the packages that use a finished model."""
    files = sorted(path.relative_to(package) for path in package.rglob("*.py"))
    deciding = [path for path in files if path.parts[0].removesuffix(".py") not in USES_A_MODEL]
    return digest_json({path.as_posix(): digest_file(package / path) for path in deciding})


def _deciding(settings: Settings, name: str) -> dict[str, Any]:
    """A section's values, or the one key's, but for where the images lie: their content is digested."""
    section, _, only = name.partition(".")
    values = deciding_values(getattr(settings, section.replace("-", "_")))
    return {key: value for key, value in values.items() if only in ("", key) and (section, key) != ("data", "root")}


def _settings_of(
    request: Request, categories: Sequence[str], method: str, grid: Mapping[str, Any], seed: int, part: str
) -> Settings:
    place = {} if request.data is None else {"data.root": str(request.data.resolve())}
    own = {"categories": list(categories), "evaluate.part": part, "seed": seed, **place}
    replaced = {"tracking.mode": "off", **request.replaced, **grid, **METHODS[method].settings, **own}
    try:
        return load_settings(request.params, replaced)
    except UserError as error:
        raise UserError(f"{row_label(method, grid)}: {error}") from error


def _check_options(request: Request) -> None:
    listed: dict[str, tuple[Sequence[Any], Collection[str]]] = {
        "categories": (request.categories, ()),
        "seeds": (request.seeds, ()),
        "methods": (request.methods, METHODS.keys()),
        "part": (request.parts, PARTS),
    }
    for name, (values, known) in listed.items():
        for value in values:
            if known and value not in known:
                raise UserError(f"--{name} {value}: there is no such one; known are {', '.join(known)}.")
        if len(set(values)) < len(values):
            raise UserError(f"--{name} names one twice: {', '.join(map(str, values))}; remove it.")
        if not values and name != "categories":
            raise UserError(f"--{name} is empty; name at least one.")
    for key in (*request.replaced, *request.grid):
        if key in OWN_KEYS:
            raise UserError(f"`{key}` is the study's own; use {OWN_KEYS[key]}.")
        if key in SEED_KEYS:
            raise UserError(f"`{key}` follows the study's seeds; use --seeds.")
    for key in request.grid:
        if key in request.replaced:
            raise UserError(f"`{key}` stands in --set and in --grid; leave it in one of them.")
        for name in request.methods:
            if key in METHODS[name].settings:
                raise UserError(
                    f"--grid {key}: the method {name} sets it to {METHODS[name].settings[key]}; choose other methods."
                )


def _check_images(layout: Layout, request: Request) -> None:
    """Refuse a folder now that would fail after the first category's hours."""
    dataset = layout.surface()
    dataset.normals()
    untrained = [name for name in request.methods if METHODS[name].stages == (PATCHCORE,)]
    if (untrained or request.parts != ("all",)) and not (dataset.folder / "test").is_dir():
        raise UserError(
            f"{dataset.folder} has no labelled test set (test/good, test/<defect>), without which there is no method "
            f"{' or '.join(untrained) or PATCHCORE} and no --part; add one, or leave them out."
        )


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
