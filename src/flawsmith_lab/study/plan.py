"""What a study computes: its cells (one row of the result each) and the stage runs behind them.

A stage run is addressed by a digest of all that decides its outcome: its sections of the settings, the images, its
source files and the digests of the stage runs it reads. What a stage depends on is read from dvc.yaml, the one place
that says so. Cells that agree in all of this share the run: a diffusion model is trained once per seed and settings.
"""

import itertools
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from flawsmith.data.dataset import PARTS
from flawsmith.errors import UserError
from flawsmith.files import digest_file, digest_json, digest_path
from flawsmith.layout import Layout
from flawsmith.settings import SECTIONS, Settings, deciding_values, load_settings, read_yaml, section_values

KNN = "knn"
DIFFUSION = "diffusion"  # of synthesize.texture
PIPELINE = ("ddpm-train", "synthesize", "validate", "distill", "evaluate")
STAGES = (*PIPELINE, KNN)
DIGITS = 20  # of a digest in a folder's name: 80 bits
PACKAGE = Path(__file__).parents[1]

# Of ddpm-train, what dvc.yaml lists for readiness.json alone, which no later stage but the gate reads: a study of
# teachers, or a change to the teacher's code, need not train the diffusion model again.
REPORTED_ONLY = {"ddpm-train": ("teacher", "detector/teacher.py")}
SEED_KEYS = ("data.split_seed", *(f"{stage}.seed" for stage in PIPELINE if stage != "validate"))
# Keys that a study sets itself, and what to use instead.
OWN_KEYS = {"categories": "--categories", "data.root": "--data", "evaluate.part": "--part"}


@dataclass(frozen=True)
class Method:
    """A row's recipe: settings that replace those of params.yaml, and the stages that run."""

    meaning: str
    settings: Mapping[str, Any]
    stages: tuple[str, ...] = PIPELINE


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "flawsmith": Method("the pipeline as params.yaml has it", {}),
        "no-diffusion": Method(
            "defect texture from the category's own images (DRAEM style)", {"synthesize.texture": "own"}
        ),
        "random-mask": Method("thresholded random noise in the place of Perlin masks", {"synthesize.mask": "noise"}),
        "cutpaste": Method(
            "CutPaste patches (Li et al. 2021)", {"synthesize.texture": "cutpaste", "synthesize.mask": "rectangle"}
        ),
        KNN: Method("the memory bank on the same teacher, without training", {}, (KNN,)),
        "memory": Method(
            "the detector's memory alone: the same bank with its features normalised and more places",
            {"evaluate.baseline": "cosine", "evaluate.baseline_vectors": 40000},
            (KNN,),
        ),
    }
)


@dataclass(frozen=True)
class Request:
    """What was asked for; `grid` maps a dotted key to the values it takes, `replaced` to the one of all cells."""

    params: Path
    data: Path | None
    categories: tuple[str, ...]
    seeds: tuple[int, ...]
    methods: tuple[str, ...]
    parts: tuple[str, ...] = ("all",)
    replaced: Mapping[str, Any] = field(default_factory=dict)
    grid: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    reference: str = ""


@dataclass(frozen=True)
class Dependencies:
    """What one stage of dvc.yaml reads.

    Attributes:
        sections: of params.yaml, or single keys of them (`section.key`).
        code: files and folders, relative to the package.
        upstream: earlier stages.
        data: the part of the category's folder, e.g. "train"; "." is the whole; None if it reads no image.
    """

    sections: tuple[str, ...]
    code: tuple[str, ...]
    upstream: tuple[str, ...]
    data: str | None


@dataclass(frozen=True)
class Task:
    """One stage run; `upstream` holds every run before it that it may read, directly or not."""

    stage: str
    category: str
    digest: str
    settings: Settings
    code: tuple[str, ...]
    code_digest: str
    upstream: tuple["Task", ...]

    @property
    def key(self) -> tuple[str, str, str]:
        return self.category, self.stage, self.digest


@dataclass(frozen=True)
class Cell:
    """One row: a method with a seed at a point of the grid, on one part of a category's test images."""

    category: str
    method: str
    seed: int
    part: str
    grid: Mapping[str, Any]
    tasks: tuple[Task, ...]  # in order; the last one evaluates

    @property
    def label(self) -> str:
        return row_label(self.method, self.grid)


@dataclass(frozen=True)
class Plan:
    """All cells; `reference` is the method or row label that the others are compared with."""

    cells: tuple[Cell, ...]
    reference: str
    root: Path

    @cached_property
    def tasks(self) -> tuple[Task, ...]:
        """Every stage run once, cell by cell, each after what it reads."""
        return tuple({task.key: task for cell in self.cells for task in cell.tasks}.values())


def row_label(method: str, grid: Mapping[str, Any]) -> str:
    """E.g. `flawsmith synthesize.strength=[0.1,0.4]`."""
    return " ".join([method, *(f"{key}={_plain(value)}" for key, value in grid.items())])


def parse_grid(texts: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    """`section.key=v1,v2` texts to a mapping; values are YAML, so a value may be a list: `[8,16],[32]`.

    Raises:
        UserError: a text is not of this form, or names a key or value twice.
    """
    grid: dict[str, tuple[Any, ...]] = {}
    for text in texts:
        key, equals, values = (part.strip() for part in text.partition("="))
        form = f"--grid {text}: write it as section.key=value,value, e.g. --grid distill.head_steps=60,120."
        if not (equals and "." in key and values):
            raise UserError(form)
        try:
            parsed = read_yaml(f"[{values}]")
        except yaml.YAMLError as error:
            raise UserError(form) from error
        if any(value is None for value in parsed):
            raise UserError(form)
        if key in grid:
            raise UserError(f"--grid names `{key}` twice; list all its values in one --grid {key}=...")
        if len({_plain(value) for value in parsed}) < len(parsed):
            raise UserError(f"--grid {text}: a value stands there twice; remove one.")
        grid[key] = tuple(parsed)
    return grid


def build_plan(request: Request) -> Plan:
    """Check everything that can be checked without computing, and lay out the cells.

    Raises:
        UserError: an unknown method, part, reference, category or key; a value out of bounds; no dvc.yaml.
    """
    _check(request)
    root = request.params.parent.resolve()
    builder = _Builder(root, read_dependencies(root / "dvc.yaml"))
    base = load_settings(request.params, request.replaced)
    categories, texture = request.categories or base.categories, base.synthesize.texture
    for key in request.grid:
        if not any(_is_read(key, builder.sections(name, DIFFUSION)) for name in request.methods):
            raise UserError(f"--grid {key}: no stage of {', '.join(request.methods)} reads it; remove it.")
    for category in categories:
        _check_surface(
            Layout(_settings_of(request, categories, request.methods[0], {}, 0, "all"), category, root), request
        )
    cells: dict[tuple[Any, ...], Cell] = {}
    for category, name, point, seed in itertools.product(
        categories, request.methods, _points(request.grid), request.seeds
    ):
        wanted = {**point, **METHODS[name].settings}
        read = builder.sections(name, wanted.get("synthesize.texture", texture))
        grid = {key: value for key, value in point.items() if _is_read(key, read)}
        for part in request.parts:
            identity = (category, row_label(name, grid), seed, part)
            if identity not in cells:  # a key that a method does not read gives it no further rows
                settings = _settings_of(request, categories, name, grid, seed, part)
                tasks = builder.tasks(settings, category, name)
                cells[identity] = Cell(category, name, seed, part, MappingProxyType(grid), tasks)
    plan = Plan(tuple(cells.values()), request.reference or _default_reference(tuple(cells.values())), root)
    known = list(dict.fromkeys(name for cell in plan.cells for name in (cell.method, cell.label)))
    if plan.reference not in known:
        raise UserError(f"--reference {plan.reference}: no such row; known are {', '.join(known)}.")
    return plan


def read_dependencies(path: Path) -> dict[str, Dependencies]:
    """What each stage reads, of dvc.yaml; the kNN row reads what `evaluate` does but no earlier stage.

    Raises:
        UserError: the file is missing or lacks a stage.
    """
    try:
        stages = yaml.safe_load(path.read_text())["stages"]
    except FileNotFoundError as error:
        raise UserError(
            f"{path} does not exist; a study takes from it what each stage depends on: pass --params of a project."
        ) from error
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no pipeline ({' '.join(str(error).split())}); restore it from git.") from error
    found = {}
    for name in PIPELINE:
        if name not in stages:
            raise UserError(f"{path} has no stage `{name}`; restore it from git.")
        found[name] = _dependencies(name, stages[name])
    evaluate = found["evaluate"]
    return found | {KNN: Dependencies(evaluate.sections, evaluate.code, (), evaluate.data)}


def _dependencies(name: str, entry: Mapping[str, Any]) -> Dependencies:
    code, upstream, data = [], [], None
    for dependency in entry["deps"]:
        if dependency.startswith("src/flawsmith/"):
            code.append(dependency.removeprefix("src/flawsmith/"))
        elif dependency.startswith("artifacts/${item.category}/"):
            upstream.append(dependency.split("/")[2])
        elif dependency.startswith("${data.root}/${item.category}"):
            data = dependency.removeprefix("${data.root}/${item.category}").strip("/") or "."
        else:
            raise UserError(f"dvc.yaml: a study cannot follow the dependency `{dependency}` of stage `{name}`.")
    ignored = REPORTED_ONLY.get(name, ())
    return Dependencies(
        tuple(section for section in entry["params"] if section not in ignored),
        tuple(path for path in code if path not in ignored),
        tuple(dict.fromkeys(upstream)),
        data,
    )


class _Builder:
    """Makes tasks; every file is read once, however many tasks depend on it."""

    def __init__(self, root: Path, dependencies: Mapping[str, Dependencies]) -> None:
        self._root = root
        self._dependencies = dependencies
        self._data: dict[tuple[str, str], str] = {}
        self._code: dict[tuple[str, ...], str] = {}

    def sections(self, method: str, texture: str) -> set[str]:
        """The sections of the settings that decide a method's result."""
        return {
            section
            for stage in _stages(METHODS[method].stages, texture)
            for section in self._reads(stage, texture).sections
        }

    def tasks(self, settings: Settings, category: str, method: str) -> tuple[Task, ...]:
        texture = settings.synthesize.texture
        made: dict[str, Task] = {}
        for stage in _stages(METHODS[method].stages, texture):
            made[stage] = self._task(stage, self._reads(stage, texture), settings, category, made)
        return tuple(made.values())

    def _reads(self, stage: str, texture: str) -> Dependencies:
        reads = self._dependencies[stage]
        if stage != "synthesize" or texture == DIFFUSION:
            return reads
        without = [tuple(name for name in names if name != "ddpm-train") for names in (reads.sections, reads.upstream)]
        return Dependencies(without[0], reads.code, without[1], reads.data)

    def _task(
        self, stage: str, reads: Dependencies, settings: Settings, category: str, made: Mapping[str, Task]
    ) -> Task:
        if reads.code not in self._code:
            self._code[reads.code] = code_digest(reads.code)
        needed = {name: made[name].digest for name in reads.upstream if name in made}
        content = {
            "stage": stage,
            "category": category,
            "settings": {name: _deciding(settings, name) for name in reads.sections},
            "data": self._data_digest(settings, category, reads.data),
            "code": self._code[reads.code],
            "upstream": needed,
        }
        before = {task.key: task for name in needed for task in (*made[name].upstream, made[name])}
        return Task(
            stage=stage,
            category=category,
            digest=digest_json(content)[:DIGITS],
            settings=settings,
            code=reads.code,
            code_digest=self._code[reads.code],
            upstream=tuple(before.values()),
        )

    def _data_digest(self, settings: Settings, category: str, part: str | None) -> str:
        if part is None:
            return ""
        if (category, part) not in self._data:
            self._data[category, part] = digest_path(Layout(settings, category, self._root).surface().folder / part)
        return self._data[category, part]


def code_digest(paths: Sequence[str]) -> str:
    """SHA-256 of source files and folders of the package, compiled files left out."""
    files = sorted(
        file
        for path in paths
        for file in ((PACKAGE / path).rglob("*") if (PACKAGE / path).is_dir() else (PACKAGE / path,))
        if file.is_file() and "__pycache__" not in file.parts
    )
    return digest_json({file.relative_to(PACKAGE).as_posix(): digest_file(file) for file in files})


def settings_content(settings: Settings) -> dict[str, Any]:
    """Settings shaped like params.yaml, as `parse_settings` reads them."""
    sections = {name: section_values(getattr(settings, name.replace("-", "_"))) for name in SECTIONS}
    return {"categories": list(settings.categories), **sections}


def _deciding(settings: Settings, name: str) -> dict[str, Any]:
    """A section's values, or the one key's, but for where the images lie: their content is digested."""
    section, _, only = name.partition(".")
    values = deciding_values(getattr(settings, section.replace("-", "_")))
    return {
        key: value for key, value in values.items() if (section, key) != ("data", "root") and (not only or key == only)
    }


def _is_read(key: str, sections: Collection[str]) -> bool:
    """Whether `section.key` is among what is read, by itself or with its section."""
    return key in sections or key.partition(".")[0] in sections


def _stages(stages: Sequence[str], texture: str) -> tuple[str, ...]:
    """Only diffused texture needs the diffusion model."""
    return tuple(stage for stage in stages if stage != "ddpm-train" or texture == DIFFUSION)


def _points(grid: Mapping[str, tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def _settings_of(
    request: Request, categories: Sequence[str], method: str, grid: Mapping[str, Any], seed: int, part: str
) -> Settings:
    seeds = dict.fromkeys(SEED_KEYS, seed)
    place = {} if request.data is None else {"data.root": str(request.data.resolve())}
    own = {"categories": list(categories), "evaluate.part": part, **seeds, **place}
    replaced = {"tracking.mode": "off", **request.replaced, **grid, **METHODS[method].settings, **own}
    try:
        return load_settings(request.params, replaced)
    except UserError as error:
        raise UserError(f"{row_label(method, grid)}: {error}") from error


def _default_reference(cells: Sequence[Cell]) -> str:
    return next((cell.method for cell in cells if cell.method == KNN), cells[0].label)


def _check(request: Request) -> None:
    for name, wanted, known in (("methods", request.methods, METHODS), ("part", request.parts, PARTS)):
        for value in wanted:
            if value not in known:
                raise UserError(f"--{name} {value}: there is no such one; known are {', '.join(known)}.")
    for name, listed in (
        ("categories", request.categories),
        ("seeds", request.seeds),
        ("methods", request.methods),
        ("part", request.parts),
    ):
        if len(set(listed)) < len(listed):
            raise UserError(f"--{name} names one twice: {', '.join(map(str, listed))}; remove it.")
        if not listed and name != "categories":
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


def _check_surface(layout: Layout, request: Request) -> None:
    """Refuse a folder now that would fail after the first category's hours."""
    surface = layout.surface()
    surface.normals()
    untrained = [name for name in request.methods if METHODS[name].stages == (KNN,)]
    if (untrained or request.parts != ("all",)) and not (surface.folder / "test").is_dir():
        raise UserError(
            f"{surface.folder} has no labelled test set (test/good, test/<defect>), without which there is no method "
            f"{' or '.join(untrained) or KNN} and no --part; add one, or leave them out."
        )


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
