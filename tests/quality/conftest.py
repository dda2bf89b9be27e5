"""The gate's reports on good and broken sets of triplets.

Great Expectations takes seconds to start and more than one for each suite, so each set is judged once a session.
"""

from pathlib import Path

import numpy as np
import pytest
from triplet_sets import SIDE, Report, edit, judge, write_manifest

from flawsmith.data.images import FloatImage, Mask, write_png
from flawsmith.data.triplets import part_path


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return judge(tmp_path_factory.mktemp("good"), lambda folder: None)


@pytest.fixture(scope="session")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Every kind of corruption, each in a triplet of its own."""

    def prepare(folder: Path) -> None:
        part_path(folder, "defect", "fit-00000").unlink()
        truncated = part_path(folder, "defect", "fit-00001")
        truncated.write_bytes(truncated.read_bytes()[:200])
        write_png(part_path(folder, "mask", "fit-00002"), np.ones((SIDE // 2, SIDE), np.bool_))
        write_png(part_path(folder, "mask", "fit-00003"), np.zeros((SIDE, SIDE), np.bool_))

        def far_away(normal: FloatImage, defect: FloatImage, mask: Mask) -> None:
            defect[:, 0, 0] = 1 - np.round(defect[:, 0, 0])

        def invisible(normal: FloatImage, defect: FloatImage, mask: Mask) -> None:
            defect[:] = normal
            defect[:, mask] += 1 / 255  # a single gray level

        edit(folder, "fit-00004", far_away)
        edit(folder, "val-00005", invisible)
        for part in ("normal", "defect", "mask"):
            part_path(folder, part, "fit-00099").write_bytes(part_path(folder, part, "fit-00006").read_bytes())
        ids = [path.stem for path in sorted((folder / "normal").glob("*.png"))]
        ids.remove("fit-00007")  # on disk but not in the manifest
        write_manifest(folder, [*ids, "fit-00008"])  # listed twice

    return judge(tmp_path_factory.mktemp("broken"), prepare)


@pytest.fixture(scope="session")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Nothing is wrong with the files, but half of the masks are scattered specks."""

    def speckle(normal: FloatImage, defect: FloatImage, mask: Mask) -> None:
        mask[:] = False
        mask[4:-4:6, 4:-4:6] = True
        defect[:] = np.where(mask, 0.5 * normal, normal)

    def prepare(folder: Path) -> None:
        for triplet_id in ("fit-00001", "fit-00002", "fit-00003", "fit-00004", "fit-00006", "fit-00007"):
            edit(folder, triplet_id, speckle)

    return judge(tmp_path_factory.mktemp("odd"), prepare)


@pytest.fixture(scope="session")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """A manifest without rows and no files."""

    def prepare(folder: Path) -> None:
        for path in folder.rglob("*.png"):
            path.unlink()
        write_manifest(folder, [])

    return judge(tmp_path_factory.mktemp("empty"), prepare)
