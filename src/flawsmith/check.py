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

from flawsmith.config import Settings, load_content, parse_settings, problems
from flawsmith.data.config import DataSettings
from flawsmith.data.dataset import (
    GOOD,
    MIN_CALIBRATION_IMAGES,
    MIN_FIT_IMAGES,
    Dataset,
    LabelledImage,
    load_labelled,
    tell_losses,
)
from flawsmith.data.images import inspect_values, stored_size
from flawsmith.data.statistics import copies_sentence, find_copies, flat_sentence, source_digest, try_statistics
from flawsmith.data.tiling import Tiling
from flawsmith.data.walk import find, listed
from flawsmith.demo.render import KINDS
from flawsmith.errors import UserError
from flawsmith.files import digest_file, digest_json, read_json, write_json
from flawsmith.layout import Layout
from flawsmith.progress import bar
from flawsmith.stage_inputs import unseen_sentence

RECOMMENDED = 30  # normals
FOLDERS = ("train", "test", "ground_truth")
MIXED = 1.5  # of aspects; more is told
SHRUNK = 0.8  # of the normals' shorter side: where models see less, a larger size is worth a try
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
    """All findings, and for each category the figures that a person asks for."""

    findings: tuple[Finding, ...]
    categories: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def errors(self) -> list[str]:
        """The sentences of all errors."""
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
    sentences, settings = check_settings(params, overrides)
    findings = [Finding("error", "", sentence) for sentence in sentences]
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
    if found := problems(content):
        return [f"{params}: {sentence}" for sentence in found], None
    return [], parse_settings(content, str(params))


def refuse(params: Path, category: str) -> None:
    """Check one category and refuse it if a later stage would fail.

    Raises:
        UserError: it names every error.
    """
    errors = check(params, [category]).errors
    if errors:
        raise UserError(" ".join(errors))


class _Category:
    """Checks one category; `facts` and `findings` fill up as far as it comes."""

    def __init__(self, layout: Layout) -> None:
        self.layout, self.name, self.settings = layout, layout.category, layout.settings
        self.facts: dict[str, Any] = {"told": []}
        self._findings: list[Finding] = []
        self._logged: list[str] = []  # warnings of the code that reads images

    def look(self) -> list[Finding]:
        """All findings."""
        folder = self.layout.root / self.settings.data.root / self.name
        wanted = self.settings.demo_data.train_good
        is_demo = self.name in KINDS and self.layout.reads_demo_data
        if is_demo and len(find(folder / "train" / GOOD).images) != wanted:
            self._tell("is rendered by the first stage.")
            least = MIN_FIT_IMAGES + MIN_CALIBRATION_IMAGES
            if wanted < least:
                few = f"`demo-data.train_good` is {wanted}, too few to learn and calibrate on"
                self._add("error", f"{few}; set {least} or more.")
            return self._findings
        if not folder.is_dir():
            self._add("error", self._missing(folder))
            return self._findings
        if (self.layout.root / "dvc.yaml").is_file():
            for link in find(folder).linked[:1]:
                self._add("error", unseen_sentence(link))
        dataset = Dataset(folder)
        with _warnings() as self._logged:
            for part in (self._check_normals, self._check_test, self._check_rest):
                try:
                    part(dataset)
                except UserError as error:
                    self._add("error", str(error))
        for sentence in self._logged:
            self._add("warning", sentence)
        return self._findings

    def _add(self, level: Level, sentence: str) -> None:
        self._findings.append(Finding(level, self.name, sentence))

    def _tell(self, sentence: str) -> None:
        self.facts["told"].append(sentence)

    def _missing(self, folder: Path) -> str:
        if folder.with_name(f"{folder.name}.dvc").is_file():
            return f"{folder} is not here, but DVC knows it; run `dvc pull {folder}.dvc`."
        there = sorted(path.name for path in folder.parent.iterdir() if path.is_dir()) if folder.parent.is_dir() else []
        close = difflib.get_close_matches(folder.name, there, 1, 0.5)
        remedy = f"did you mean {close[0]}?" if close else f"put the normal images into {folder}/train/{GOOD}."
        return f"{folder} does not exist; {remedy}"

    def _check_normals(self, dataset: Dataset) -> None:
        try:
            found = dataset.find_normals()
        except UserError as error:
            raise UserError(self._misplaced(dataset) or str(error)) from error
        self._tell(f"train/{GOOD}: {found}.")
        try:
            data = self.layout.data
        except UserError as error:
            self._add("error", str(error))
            data = self.settings.data
        if data.white_level:
            self.facts["white_level"] = data.white_level
            self._tell(f"{data.white_level} is white in images of more than 8 bits.")
        statistics, bad = try_statistics(found.images, data.reading, self.layout.kept_statistics())
        for sentence in bad.values():
            self._add("error", sentence)
        self._describe(list(statistics), data)
        tell_losses(list(statistics), data, self.name)
        flat = [path for path, one in statistics.items() if one.is_flat]
        shown = [path for path, one in statistics.items() if not one.is_flat]
        usual = median([statistics[path].deviation for path in shown] or [0.0])
        if faint := [path.name for path in shown if statistics[path].deviation < FAINT * usual]:
            self._add("warning", f"{len(faint)} normal image(s) show next to nothing beside the others "
                                 f"({listed(faint)}); look at them.")  # fmt: skip
        copies = find_copies(shown, [statistics[path] for path in shown])
        self.facts |= {"normals": len(found.images), "copies": [[path.name for path in group] for group in copies]}
        if copies:
            self._add("warning", copies_sentence(copies))
        if flat:
            raise UserError(flat_sentence(flat))
        split = dataset.split(data.calibration_fraction, data.split_seed, copies)
        self._promise(len(split.fit), len(split.calibration), len(found.images))

    def _promise(self, fit: int, calibration: int, normals: int) -> None:
        """Tell which false-alarm rate the split can promise."""
        target, share = self.settings.evaluate.false_alarm_rate, self.settings.data.calibration_fraction
        rate = 1 / (calibration + 1)
        self.facts |= {"fit": fit, "calibration": calibration, "false_alarm_rate": rate}
        parts = f"{fit} images to learn from, {calibration} to calibrate on"
        self._tell(f"{parts}: the lowest false-alarm rate that these can promise is {rate:.1%}.")
        needed = math.ceil(1 / target - 1e-9) - 1
        if calibration < needed:
            enough = f"{needed}: {math.ceil(needed / share)} normal images at data.calibration_fraction {share:g}"
            self._add("warning", f"{calibration} calibration images cannot promise the false-alarm rate of {target:g} "
                                 f"(evaluate.false_alarm_rate), which takes {enough}; add images, or expect up to "
                                 f"{rate:.0%}.")  # fmt: skip
        if normals < RECOMMENDED:
            self._add("warning", f"{normals} normal images are few; {RECOMMENDED} or more are recommended.")

    def _describe(self, paths: Sequence[Path], data: DataSettings) -> None:
        """Tell sizes, modes and depths, and at which size models see them; warn of a mixed set."""
        values = [inspect_values(path, data.reading) for path in paths]
        if not values:
            return
        sizes = [stored_size(path) for path in paths]
        kinds = {
            "sizes": [f"{width} x {height}" for height, width in sizes],
            "modes": [item.mode for item in values],
            "depths": [f"{item.bits} bit" for item in values],
        }
        for key, found in kinds.items():
            counts = self.facts[key] = dict(Counter(found).most_common())
            if len(counts) > 1 and key != "sizes":
                self._add("warning", f"normal images differ in their {key} ({_counted(counts)}); is that one camera?")
        aspects = [width / height for height, width in sizes]
        self.facts["aspects"] = [round(min(aspects), 3), round(max(aspects), 3)]
        if max(aspects) > MIXED * min(aspects):
            odd = [paths[aspects.index(found)].name for found in (min(aspects), max(aspects))]
            self._add("warning", f"normal images differ in shape (width over height {min(aspects):.2f} in {odd[0]}, "
                                 f"{max(aspects):.2f} in {odd[1]}); is that one camera?")  # fmt: skip
        shown = [f"{count} of {name}" for name, count in list(self.facts["sizes"].items())[:3]]
        more = f" and {len(self.facts['sizes']) - 3} other sizes" if len(self.facts["sizes"]) > 3 else ""
        self._tell(f"{', '.join(shown)} pixels{more}; {', '.join(self.facts['depths'])}.")
        height, width = self.facts["shape"] = data.shape
        if data.scale:
            self._tell(f"models see tiles of {width} x {height} pixels, at {data.scale:g} of the images' size.")
            return
        shrunk = min(height, width) / median(min(size) for size in sizes)
        larger = "; a larger data.image_size shows smaller defects and takes more time" if shrunk < SHRUNK else ""
        self._tell(f"models see them at {width} x {height} pixels, {shrunk:.2g} of their size{larger}.")

    def _misplaced(self, dataset: Dataset) -> str:
        """A sentence if all normal images lie beside `train/good`, else nothing."""
        wanted = dataset.folder / "train" / GOOD
        places = Counter(
            path.parent
            for path in find(dataset.folder).images
            if path.relative_to(dataset.folder).parts[0] not in ("test", "ground_truth")
        )
        if find(wanted).images or not places:
            return ""
        place, count = places.most_common(1)[0]
        return f"{count} images lie in {place}, none in {wanted}; move the images to {wanted}."

    def _check_test(self, dataset: Dataset) -> None:
        if not (dataset.folder / "test").exists():
            self._tell("no labelled test set: held-out synthetic defects will be scored instead.")
            return
        test, labelled = dataset.find_test(), dataset.labelled_test()
        counts = self.facts["test"] = dict(Counter(item.defect for item in labelled))
        kinds = listed([f"{count} {kind}" for kind, count in counts.items()])
        self._tell(f"test: {test}{f': {kinds}' if kinds else ''}.")
        for path in sorted(dataset.folder.joinpath("test").iterdir()):
            if path.is_dir() and not path.name.startswith(".") and not find(path).images:
                self._add("warning", f"{path} holds no image: {find(path)}; fill or remove it.")
        defective = [item for item in labelled if item.is_defective]
        masked = self.facts["masks"] = sum(item.mask_path is not None for item in defective)
        if masked < len(defective):
            alone = "; the others count for image scores alone" if masked else ": image scores alone can be judged"
            self._tell(f"{masked} of {len(defective)} defective images have a mask{alone}.")
        self._open_labelled(labelled)

    def _open_labelled(self, labelled: Sequence[LabelledImage]) -> None:
        """Tell test images and masks that cannot be used as they are; if all could once, none is opened again."""
        reading, tiling = self.layout.data.reading, Tiling.of(self.layout.data)
        files = [path for item in labelled for path in (item.path, item.mask_path) if path is not None]
        kept = self.layout.kept_statistics().with_name("test.json")
        identity = ""
        with suppress(OSError):  # a file that cannot be read is told below
            digests = [f"{path}: {digest_file(path)}" for path in files]
            identity = digest_json({"files": digests, "reading": asdict(reading), "code": source_digest()})
        with suppress(UserError, KeyError, TypeError):  # there is none yet, or none that can be read
            known = read_json(kept)
            if known["identity"] == identity:
                self._logged += known["said"]
                return
        before, errors = len(self._logged), len(self._findings)
        for item in bar(labelled, "looking at test", unit="image", leave=False):
            try:
                load_labelled(item, tiling, reading, original=True)
            except UserError as error:
                self._add("error", str(error))
            except OSError as error:
                self._add("error", f"{item.path} cannot be read ({error}); mend it.")
        if identity and len(self._findings) == errors:
            with suppress(UserError, OSError):  # a read-only project: they are opened again
                write_json(kept, {"identity": identity, "said": self._logged[before:]})

    def _check_rest(self, dataset: Dataset) -> None:
        """Warn of folders that no stage will ever read."""
        folder = dataset.folder
        names = [
            path.relative_to(folder).as_posix()
            for place, known in ((folder, FOLDERS), (folder / "train", (GOOD,)))
            for path in (sorted(place.iterdir()) if place.is_dir() else ())
            if path.name not in known and path.is_dir() and not path.name.startswith(".")
        ]
        if names:
            self._add("warning", f"{folder} holds folders that no stage reads ({listed(names)}); normal images belong "
                                 f"in train/{GOOD}, labelled ones in test.")  # fmt: skip


def _counted(counts: Mapping[str, int]) -> str:
    return listed([f"{count} of {name}" for name, count in counts.items()])


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Collect what our code warns of while the block runs, instead of logging it."""
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
