"""Where the stages of one category read and write: the one place that knows the folder names."""

import logging
import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from flawsmith.config import Settings, load_settings
from flawsmith.data.config import DataSettings
from flawsmith.data.dataset import Dataset, Split
from flawsmith.data.images import find_aspect, find_white_level
from flawsmith.data.statistics import copies_sentence, find_copies, flat_sentence, read_statistics
from flawsmith.errors import UserError
from flawsmith.files import restore

log = logging.getLogger(__name__)

DVC_STAGE = "DVC_STAGE"  # the variable that DVC sets for the commands that it runs
DEMO_DATA = "data"  # where the first stage renders, in the project also where `data.root` names another place


@dataclass(frozen=True)
class Layout:
    """Paths of one category below the project's root (where params.yaml lies), and the settings that hold for it."""

    settings: Settings
    category: str
    root: Path = Path()

    def __post_init__(self) -> None:
        object.__setattr__(self, "settings", self.settings.of(self.category))

    @property
    def effective_settings(self) -> Path:
        """The file that holds what params.yaml says for this category: what its stages depend on in dvc.yaml."""
        return self.stage("settings") / "effective.json"

    def as_recorded(self) -> "Layout":
        """Return this layout, in a command that DVC runs with the settings that dvc.lock will name.

        These stand in `effective_settings`; params.yaml may have been edited since DVC began.
        """
        if DVC_STAGE not in os.environ or not self.effective_settings.is_file():
            return self
        return replace(self, settings=load_settings(self.effective_settings))

    def surface(self) -> Dataset:
        """The category's folder of images.

        Raises:
            UserError: the folder is missing.
        """
        folder = self.root / self.settings.data.root / self.category
        if not folder.is_dir():
            raise UserError(
                f"{folder} does not exist; put the images of '{self.category}' there in MVTec AD layout "
                "(train/good/*.png), or correct `categories` and `data.root` in params.yaml."
            )
        return Dataset(folder)

    @cached_property
    def data(self) -> DataSettings:
        """The section `data` as images are to be read by: with aspect and white level of the normals where it asks for
        them.

        Raises:
            UserError: there is no normal image, or only `data.white_level` can tell what is white.
        """
        data, normals = self.settings.data, self.surface().normals()
        white = data.white_level or find_white_level(normals, data.reading, self.category)
        return replace(data, white_level=white, aspect=data.aspect or find_aspect(normals))

    @property
    def reads_demo_data(self) -> bool:
        """Whether categories are read from where the first stage renders."""
        return (self.root / self.settings.data.root).resolve() == (self.root / DEMO_DATA).resolve()

    def split(self) -> Split:
        """The fit and calibration parts of the category's normal images; copies among them are named in the log.

        Raises:
            UserError: images cannot be read or show nothing, or there are too few for both parts.
        """
        return self._split

    @cached_property
    def _split(self) -> Split:  # every image's bytes are read for it, and evaluate asks twice
        data, surface = self.data, self.surface()
        paths = surface.normals()
        statistics = read_statistics(paths, data.reading, self.kept_statistics())
        if flat := [path for path, one in zip(paths, statistics, strict=True) if one.is_flat]:
            raise UserError(flat_sentence(flat))
        split = surface.split(data.calibration_fraction, data.split_seed, find_copies(paths, statistics))
        if split.copies:
            log.warning("%s: %s", self.category, copies_sentence(split.copies))
        return split

    def kept_statistics(self) -> Path:
        """The file that keeps what was seen of the category's images."""
        return self.root / "artifacts" / self.category / ".cache" / "statistics.npy"

    def stage(self, name: str) -> Path:
        """The folder a stage writes; its name is the stage's."""
        return self.root / "artifacts" / self.category / name

    def resume(self, name: str) -> Path:
        """The folder of a stage's unfinished checkpoint: outside the stage's output, which DVC deletes before a run."""
        return self.root / "artifacts" / self.category / ".resume" / name

    def input(self, name: str, file: str) -> Path:
        """A file or folder that an earlier stage wrote.

        Raises:
            UserError: it is not there.
        """
        path = self.stage(name) / file
        if not path.exists():
            restore(path)
        if not path.exists():
            raise UserError(f"{path} does not exist; run `flawsmith {name} --category {self.category}` first.")
        return path
