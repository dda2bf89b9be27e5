"""Where the stages of one category read and write: the one place that knows the folder names."""

from dataclasses import dataclass
from pathlib import Path

from flawsmith.errors import UserError
from flawsmith.settings import Settings
from flawsmith.surfaces import Split, Surface


@dataclass(frozen=True)
class Layout:
    """Paths of one category below the project's root (where params.yaml lies)."""

    settings: Settings
    category: str
    root: Path = Path()

    def surface(self) -> Surface:
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
        return Surface(folder, self.settings.data.max_pixels)

    def split(self) -> Split:
        """The fit and calibration parts of the category's normal images."""
        return self.surface().split(self.settings.data.calibration_fraction, self.settings.data.split_seed)

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
            raise UserError(f"{path} does not exist; run `flawsmith {name} --category {self.category}` first.")
        return path
