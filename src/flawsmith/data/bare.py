"""A folder of images as people have it, before anybody has put them into a layout."""

from pathlib import Path

from flawsmith.data.dataset import GOOD, Dataset
from flawsmith.data.walk import SUFFIXES, Found, find, listed
from flawsmith.errors import UserError


class BareFolder(Dataset):
    """Good images directly in a folder, with nothing beside them; there is no test set."""

    def find_normals(self) -> Found:
        """Find the images of the folder.

        Raises:
            UserError: it holds none, or some lie deeper, or it cannot be read as a whole.
        """
        found = find(self.folder)
        found.check()
        if not found.images:
            raise UserError(
                f"{self.folder} holds no image ({', '.join(SUFFIXES)}): {found}; name a folder of defect-free images."
            )
        deeper = sorted({found.name_of(path).split("/")[0] for path in found.images if path.parent != self.folder})
        if deeper:
            raise UserError(
                f"{self.folder} holds images in folders of its own ({listed(deeper)}), and which of them are good "
                f"cannot be told; name the folder of the good ones, or put these into {self.folder}/train/{GOOD}."
            )
        return found


def open_folder(folder: Path) -> Dataset:
    """A category in MVTec AD layout if the folder holds `train/good`, else a bare folder of good images.

    Raises:
        UserError: it is no folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; name one that holds defect-free images.")
    return Dataset(folder) if (folder / "train" / GOOD).is_dir() else BareFolder(folder)


def name_folder(folder: Path) -> str:
    """What to call the product whose images a folder holds: `screw` of `screw`, and of `screw/train/good`."""
    parts = folder.resolve().parts
    return (parts[-3] if parts[-2:] == ("train", GOOD) and len(parts) > 3 else folder.resolve().name) or "parts"
