"""Everything that would fail hours later, looked at before anything is computed: settings, folders, every image.

`make repro` and the flow begin with it, because DVC deletes a stage's outputs before the stage can complain. All that
is found is told at once, each in a sentence with its remedy.

The test set is opened for what its files are (names, whether they decode, masks of the right size), never for how they
look or score, and nothing of it is kept for any stage: what is learned or chosen cannot depend on it.
"""

import difflib
import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

from flawsmith.data.dataset import (
    GOOD,
    MIN_CALIBRATION_IMAGES,
    MIN_FIT_IMAGES,
    Dataset,
    LabelledImage,
    load_labelled,
    tell_losses,
)
from flawsmith.data.images import inspect_values
from flawsmith.data.statistics import copies_sentence, find_copies, flat_sentence, source_digest, try_statistics
from flawsmith.data.tiling import Tiling
from flawsmith.data.walk import find, listed
from flawsmith.demo.render import KINDS
from flawsmith.errors import UserError
from flawsmith.files import digest_file, digest_json, read_json, write_json
from flawsmith.layout import Layout
from flawsmith.progress import bar
from flawsmith.settings import Settings, load_content, parse_settings, section_problems
from flawsmith.standing import unseen_sentence

RECOMMENDED = 30  # normals
FOLDERS = ("train", "test", "ground_truth")
MIXED = 1.5  # of aspects; more is told
FAINT = 0.1  # of the usual deviation; an image that varies less is told

Level = Literal["error", "warning"]


@dataclass(frozen=True)
class Finding:
    """One sentence: what is wrong and what to do. An error would end a later stage."""

    level: Level
    category: str  # "" for params.yaml
    sentence: str


@dataclass(frozen=True)
class Report:
    """All findings, and of each category the figures that a person asks for."""

    findings: tuple[Finding, ...]
    categories: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def errors(self) -> list[str]:
        return [item.sentence for item in self.findings if item.level == "error"]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "ok": not self.errors,
            "findings": [asdict(item) for item in self.findings],
            "categories": self.categories,
        }

    def __str__(self) -> str:
        lines = [f"{name}: {sentence}" for name, facts in self.categories.items() for sentence in facts["told"]]
        # a sentence that names its category itself needs no second name
        lines += [
            f"{item.level}: {item.sentence if item.category in item.sentence else f'{item.category}: {item.sentence}'}"
            for item in self.findings
        ]
        errors, warnings = len(self.errors), len(self.findings) - len(self.errors)
        return "\n".join([*lines, f"{errors} error(s), {warnings} warning(s)."])


def check(params: Path, categories: Sequence[str] = (), overrides: Mapping[str, Any] | None = None) -> Report:
    """Check params.yaml and the categories named, or all of it.

    Raises:
        UserError: params.yaml cannot be read at all.
    """
    problems, settings = check_settings(params, overrides)
    findings = [Finding("error", "", sentence) for sentence in problems]
    if settings is None:
        return Report(tuple(findings))
    facts: dict[str, dict[str, Any]] = {}
    for name in categories or settings.categories:
        if name not in settings.categories and name not in KINDS:  # `make repro demo-data@...` names a surface
            findings.append(Finding("error", name, f"No category {name} in {params}{_nearest(name, settings)}"))
            continue
        found = _Category(Layout(settings, name, params.parent))
        findings += found.look()
        facts[name] = found.facts
    return Report(tuple(findings), facts)


def check_settings(params: Path, overrides: Mapping[str, Any] | None = None) -> tuple[list[str], Settings | None]:
    """All that is wrong with params.yaml, and the settings if nothing is.

    Raises:
        UserError: it cannot be read at all.
    """
    content = load_content(params, overrides)
    problems = list(section_problems(content, str(params)))
    if problems:
        return problems, None
    try:
        return [], parse_settings(content, str(params))
    except UserError as error:  # keys that contradict each other
        return [str(error)], None


def refuse(params: Path, category: str) -> None:
    """Check one category and refuse what would fail later.

    Raises:
        UserError: it names all that would.
    """
    errors = check(params, [category]).errors
    if errors:
        raise UserError(" ".join(errors))


class _Category:
    """Looks at one category; `facts` fill up as far as it comes."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.facts: dict[str, Any] = {"told": []}
        self._findings: list[Finding] = []
        self._said: list[str] = []

    def look(self) -> list[Finding]:
        """All findings."""
        name = self.layout.category
        folder = self.layout.root / self.layout.settings.data.root / name
        if name in KINDS and self.layout.reads_demo_data:
            wanted = self.layout.settings.demo_data.train_good
            if len(find(folder / "train" / GOOD).images) != wanted:
                self.facts["told"].append("is rendered by the first stage.")
                if wanted < MIN_FIT_IMAGES + MIN_CALIBRATION_IMAGES:
                    self._say("error", f"`demo-data.train_good` is {wanted}, too few to learn and calibrate on; "
                                       f"set {MIN_FIT_IMAGES + MIN_CALIBRATION_IMAGES} or more.")  # fmt: skip
                return self._findings
        if not folder.is_dir():
            self._say("error", self._missing(folder))
            return self._findings
        if (self.layout.root / "dvc.yaml").is_file():
            for link in find(folder).linked[:1]:
                self._say("error", unseen_sentence(link))
        with _warnings() as self._said:
            try:
                surface = self.layout.surface()
                self._look_at_normals(surface)
                self._look_at_test(surface)
                self._look_at_rest(folder)
            except UserError as error:
                self._say("error", str(error))
        for sentence in self._said:
            self._say("warning", sentence)
        return self._findings

    def _say(self, level: Level, sentence: str) -> None:
        self._findings.append(Finding(level, self.layout.category, sentence))

    def _missing(self, folder: Path) -> str:
        if folder.with_name(f"{folder.name}.dvc").is_file():
            return f"{folder} is not here, but DVC knows it; run `dvc pull {folder}.dvc`."
        there = sorted(path.name for path in folder.parent.iterdir() if path.is_dir()) if folder.parent.is_dir() else []
        close = difflib.get_close_matches(folder.name, there, 1, 0.5)
        remedy = f"did you mean {close[0]}?" if close else f"put the normal images into {folder}/train/{GOOD}."
        return f"{folder} does not exist; {remedy}"

    def _look_at_normals(self, surface: Dataset) -> None:
        try:
            found = surface.find_normals()
        except UserError as error:
            self._say("error", self._misplaced(surface) or str(error))
            return
        self.facts["told"].append(f"train/{GOOD}: {found}.")
        paths = found.images
        try:
            data = self.layout.data
        except UserError as error:
            self._say("error", str(error))
            data = self.layout.settings.data
        if data.white_level:
            self.facts["white_level"] = data.white_level
            self.facts["told"].append(f"{data.white_level} is white in images of more than 8 bits.")
        statistics, bad = try_statistics(paths, data.reading, self.layout.kept_statistics())
        for sentence in bad.values():
            self._say("error", sentence)
        self._describe(list(statistics))
        tell_losses(list(statistics), data, self.layout.category)
        flat = [path for path, one in statistics.items() if one.is_flat]
        shown = [path for path in statistics if path not in flat]
        usual = median([statistics[path].deviation for path in shown] or [0.0])
        if faint := [path.name for path in shown if statistics[path].deviation < FAINT * usual]:
            self._say("warning", f"{len(faint)} normal image(s) show next to nothing beside the others "
                                 f"({listed(faint)}); look at them.")  # fmt: skip
        copies = find_copies(shown, [statistics[path] for path in shown])
        self.facts |= {"normals": len(paths), "copies": [[path.name for path in group] for group in copies]}
        if copies:
            self._say("warning", copies_sentence(copies))
        if flat:
            self._say("error", flat_sentence(flat))
            return
        try:
            split = surface.split(data.calibration_fraction, data.split_seed, copies)
        except UserError as error:
            self._say("error", str(error))
            return
        self._promise(len(split.fit), len(split.calibration), len(paths))

    def _promise(self, fit: int, calibration: int, normals: int) -> None:
        """What the split can hold."""
        target, share = self.layout.settings.evaluate.false_alarm_rate, self.layout.settings.data.calibration_fraction
        self.facts |= {"fit": fit, "calibration": calibration, "false_alarm_rate": 1 / (calibration + 1)}
        self.facts["told"].append(
            f"{fit} images to learn from, {calibration} to calibrate on, which can promise a false-alarm rate of "
            f"{1 / (calibration + 1):.1%} or more."
        )
        needed = math.ceil(1 / target - 1e-9) - 1
        if calibration < needed:
            self._say("warning", f"{calibration} calibration images cannot promise the false-alarm rate of {target:g} "
                      f"(evaluate.false_alarm_rate): that takes {needed}, or {math.ceil(needed / share)} normal images "
                      f"at data.calibration_fraction {share:g}; add images or expect up to "
                      f"{1 / (calibration + 1):.0%}.")  # fmt: skip
        if normals < RECOMMENDED:
            self._say("warning", f"{normals} normal images are few; {RECOMMENDED} or more are recommended.")

    def _describe(self, paths: Sequence[Path]) -> None:
        """Sizes, modes and depths; what a mixed set may mean."""
        values = [inspect_values(path, self.layout.settings.data.reading) for path in paths]
        if not values:
            return
        for key, counts in (
            ("sizes", Counter(f"{item.width} x {item.height}" for item in values)),
            ("modes", Counter(item.mode for item in values)),
            ("depths", Counter(f"{item.bits} bit" for item in values)),
        ):
            self.facts[key] = dict(counts.most_common())
            if len(counts) > 1 and key != "sizes":
                told = listed([f"{count} of {name}" for name, count in counts.most_common()])
                self._say("warning", f"normal images differ in their {key} ({told}); is that one camera?")
        aspects = [item.width / item.height for item in values]
        self.facts["aspects"] = [round(min(aspects), 3), round(max(aspects), 3)]
        if max(aspects) > MIXED * min(aspects):
            odd = [paths[aspects.index(found)].name for found in (min(aspects), max(aspects))]
            self._say("warning", f"normal images differ in shape (width over height {min(aspects):.2f} in {odd[0]}, "
                                 f"{max(aspects):.2f} in {odd[1]}); is that one camera?")  # fmt: skip
        shown = [f"{count} of {name}" for name, count in list(self.facts["sizes"].items())[:3]]
        more = f" and {len(self.facts['sizes']) - 3} other sizes" if len(self.facts["sizes"]) > 3 else ""
        self.facts["told"].append(f"{', '.join(shown)} pixels{more}; {', '.join(self.facts['depths'])}.")

    def _misplaced(self, surface: Dataset) -> str:
        """A sentence if images lie beside `train/good`."""
        wanted = surface.folder / "train" / GOOD
        places = Counter(
            path.parent
            for path in find(surface.folder).images
            if path.relative_to(surface.folder).parts[0] not in ("test", "ground_truth")
        )
        if find(wanted).images or not places:
            return ""
        place, count = places.most_common(1)[0]
        return f"{count} images lie in {place}, none in {wanted}; move the images to {wanted}."

    def _look_at_test(self, surface: Dataset) -> None:
        if not (surface.folder / "test").exists():
            self.facts["told"].append("no labelled test set: held-out synthetic defects will be scored instead.")
            return
        try:
            test = surface.find_test()
            labelled = surface.labelled_test()
        except UserError as error:
            self._say("error", str(error))
            return
        counts = Counter(item.defect for item in labelled)
        self.facts["test"] = dict(counts)
        kinds = listed([f"{count} {kind}" for kind, count in counts.items()])
        self.facts["told"].append(f"test: {test}{f': {kinds}' if kinds else ''}.")
        for path in sorted(surface.folder.joinpath("test").iterdir()):
            if path.is_dir() and not path.name.startswith(".") and not find(path).images:
                self._say("warning", f"{path} holds no image: {find(path)}; fill or remove it.")
        defective = [item for item in labelled if item.is_defective]
        masked = sum(item.mask_path is not None for item in defective)
        self.facts["masks"] = masked
        if masked < len(defective):
            alone = "; where there is none, figures of images alone" if masked else ": figures of images alone"
            self.facts["told"].append(f"{masked} of {len(defective)} defective images have a mask{alone}.")
        self._open_labelled(labelled)

    def _open_labelled(self, labelled: Sequence[LabelledImage]) -> None:
        """Tell test images and masks that cannot be used as they are; if all could once, none is opened again."""
        reading, tiling = self.layout.data.reading, Tiling.of(self.layout.settings.data)
        files = [path for item in labelled for path in (item.path, item.mask_path) if path is not None]
        kept = self.layout.kept_statistics().with_name("test.json")
        identity = ""
        with suppress(OSError):  # a file that cannot be read is told below
            digests = [f"{path}: {digest_file(path)}" for path in files]
            identity = digest_json({"files": digests, "reading": asdict(reading), "code": source_digest()})
        with suppress(UserError, KeyError, TypeError):  # there is none yet, or none that can be read
            known = read_json(kept)
            if known["identity"] == identity:
                self._said += known["said"]
                return
        said, errors = len(self._said), 0
        for item in bar(labelled, "looking at test", unit="image", leave=False):
            try:
                load_labelled(item, tiling, reading, original=True)
            except (UserError, OSError) as error:
                errors += 1
                known_fault = isinstance(error, UserError)
                self._say("error", str(error) if known_fault else f"{item.path} cannot be read ({error}); mend it.")
        if identity and not errors:
            with suppress(UserError, OSError):  # a read-only project: they are opened again
                write_json(kept, {"identity": identity, "said": self._said[said:]})

    def _look_at_rest(self, folder: Path) -> None:
        """What no stage will ever read."""
        names = [
            path.relative_to(folder).as_posix()
            for place, known in ((folder, FOLDERS), (folder / "train", (GOOD,)))
            for path in (sorted(place.iterdir()) if place.is_dir() else ())
            if path.name not in known and path.is_dir() and not path.name.startswith(".")
        ]
        if names:
            self._say("warning", f"{folder} holds folders that no stage reads ({listed(names)}); normal images belong "
                                 f"in train/{GOOD}, labelled ones in test.")  # fmt: skip


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """What our code warns of meanwhile, instead of its lines in the log."""
    said: list[str] = []
    logger = logging.getLogger("flawsmith")
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    before, propagate = logger.handlers[:], logger.propagate
    logger.handlers, logger.propagate = [handler], False
    try:
        yield said
    finally:
        logger.handlers, logger.propagate = before, propagate


def _nearest(name: str, settings: Settings) -> str:
    close = difflib.get_close_matches(name, settings.categories, 1, 0.5)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(settings.categories)}."
