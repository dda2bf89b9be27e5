"""Triplets on disk: `normal|defect|mask/<triplet_id>.png`, readable without the code that made them.

The role is the id's prefix: `fit-…` trains, `val-…` chooses the checkpoint; the two never share a source image.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flawsmith.data.images import FloatImage, Mask, read_image, to_uint8, write_png
from flawsmith.data.masks import read_mask
from flawsmith.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

FIT, VALIDATION = "fit", "val"
PARTS = ("normal", "defect", "mask")


def part_path(folder: Path, part: str, triplet_id: str) -> Path:
    """Where one part of a triplet lies in a folder of triplets."""
    return folder / part / f"{triplet_id}.png"


def read_manifest(path: Path) -> "pa.Table":
    """The manifest of a synthesize folder: one row a triplet (`TripletGenerator.row` says of what).

    Raises:
        UserError: the file is no parquet table with the column `triplet_id`.
    """
    import pyarrow.parquet as pq  # not needed where triplets are only trained on

    remedy = "run `flawsmith synthesize` again"
    try:
        table = pq.read_table(path)
    except (OSError, ValueError) as error:  # pyarrow's errors are subclasses of these
        raise UserError(f"{path} cannot be read as parquet ({' '.join(str(error).split())}); {remedy}.") from error
    if "triplet_id" not in table.column_names:
        raise UserError(f"{path} has no column `triplet_id`; {remedy}.")
    return table


def is_illumination_defect(row: Mapping[str, Any]) -> bool:
    """Whether a row of the manifest is an illumination defect: a change of light alone. The network learns to ignore
    it, so it counts as no defect."""
    return row.get("shade_change") is not None


@dataclass(frozen=True)
class TripletFolder:
    """A folder of triplets."""

    folder: Path

    def ids(self, role: str) -> tuple[str, ...]:
        """Sorted ids of one role.

        Raises:
            UserError: there is none.
        """
        found = tuple(sorted(path.stem for path in (self.folder / "mask").glob(f"{role}-*.png")))
        if not found:
            raise UserError(f"{self.folder} holds no triplet of role '{role}'; synthesize more triplets.")
        return found

    def read(self, triplet_id: str) -> tuple[FloatImage, FloatImage, Mask]:
        """Normal and defect image (3, H, W) and mask (H, W) of one triplet.

        Raises:
            UserError: a file is missing, unreadable or of another size than its siblings.
        """
        paths = [part_path(self.folder, part, triplet_id) for part in PARTS]
        normal, defect, mask = read_image(paths[0]), read_image(paths[1]), read_mask(paths[2])
        if not normal.shape[1:] == defect.shape[1:] == mask.shape:
            raise UserError(f"The images of triplet {triplet_id} in {self.folder} differ in size; synthesize again.")
        return normal, defect, mask

    def write(self, triplet_id: str, normal: NDArray[np.uint8], defect: NDArray[np.uint8], mask: Mask) -> None:
        """Write the three PNG files of one triplet from (3, H, W) bytes and a mask."""
        for part, pixels in (("normal", normal), ("defect", defect)):
            write_png(part_path(self.folder, part, triplet_id), np.ascontiguousarray(pixels.transpose(1, 2, 0)))
        write_png(part_path(self.folder, "mask", triplet_id), mask)


@dataclass(frozen=True)
class TripletArrays:
    """Triplets in memory as bytes: `normal` and `defect` (N, 3, H, W) uint8, `mask` (N, H, W) bool."""

    ids: tuple[str, ...]
    normal: NDArray[np.uint8]
    defect: NDArray[np.uint8]
    mask: NDArray[np.bool_]

    @classmethod
    def load(cls, folder: TripletFolder, ids: Sequence[str]) -> "TripletArrays":
        """Load the triplets of these ids.

        Raises:
            UserError: as `TripletFolder.read`, or they have several sizes.
        """
        triplets = [folder.read(triplet_id) for triplet_id in ids]
        sizes = {triplet[2].shape for triplet in triplets}
        if len(sizes) > 1:
            raise UserError(f"{folder.folder} holds triplets of several sizes {sorted(sizes)}; synthesize again.")
        normal = np.stack([to_uint8(triplet[0]).transpose(2, 0, 1) for triplet in triplets])
        defect = np.stack([to_uint8(triplet[1]).transpose(2, 0, 1) for triplet in triplets])
        return cls(tuple(ids), normal, defect, np.stack([triplet[2] for triplet in triplets]))
