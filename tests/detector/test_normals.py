"""What the memories may hold: never the source of a validation triplet, nor in training that of the triplet."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flawsmith.data.dataset import Split, Tile
from flawsmith.data.triplets import FIT, VALIDATION, TripletFolder
from flawsmith.detector.normals import image_ids, manifest_rows, remembered_normals, triplet_sources
from flawsmith.errors import UserError

NORMALS = [Path("good") / name for name in ("a.png", "b.png", "c.png", "d.png")]
SPLIT = Split(fit=tuple(NORMALS), calibration=())
SOURCES = {"val-0": "b.png", "fit-1": "c.png", "fit-0": "a.png"}  # the manifest's order means nothing


def rows(tmp_path: Path, sources: dict[str, str]) -> dict[str, dict[str, Any]]:
    table = [
        {"triplet_id": name, "source": source, "role": VALIDATION if name.startswith("val") else FIT}
        for name, source in sources.items()
    ]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "manifest.parquet")
    return manifest_rows(TripletFolder(tmp_path), NORMALS)


def test_the_memory_never_holds_the_source_of_a_validation_triplet(tmp_path: Path) -> None:
    kept = remembered_normals(SPLIT, rows(tmp_path, SOURCES))
    assert [path.name for path in kept] == ["a.png", "c.png", "d.png"]


def test_each_training_triplet_is_traced_to_its_normal_in_the_memory(tmp_path: Path) -> None:
    found = rows(tmp_path, SOURCES)
    kept = remembered_normals(SPLIT, found)
    assert triplet_sources(kept, found, ["fit-0", "fit-1", "val-0"]).sources.tolist() == [0, 1, -1]


def test_a_source_that_is_no_fit_normal_now_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.png.*flawsmith synthesize"):
        rows(tmp_path, SOURCES | {"fit-1": "gone.png"})


def test_every_tile_of_the_image_behind_a_triplet_is_kept_from_it(tmp_path: Path) -> None:
    found = rows(tmp_path, SOURCES)
    kept = remembered_normals(SPLIT, found)
    tiles = [Tile(path, (0, left)) for path in kept for left in range(0, 96 if path.name == "c.png" else 64, 32)]
    source_ids = image_ids(tiles, kept)
    (source,) = triplet_sources(kept, found, ["fit-1"]).sources
    assert [tile for tile, owner in zip(tiles, source_ids, strict=True) if owner == source] == tiles[2:5]
    assert {tile.path.name for tile in tiles[2:5]} == {"c.png"}


def test_a_copy_of_an_image_is_kept_from_where_the_image_is(tmp_path: Path) -> None:
    found = rows(tmp_path, SOURCES)
    a, b, c, d = NORMALS
    split = Split(tuple(NORMALS), (), copies=((b, d),))  # b is behind a validation triplet
    assert remembered_normals(split, found) == [a, c]
    split = Split(tuple(NORMALS), (), copies=((c, d),))  # c is behind a training triplet
    kept = remembered_normals(split, found)
    (source,) = triplet_sources(kept, found, ["fit-1"], split.twins).sources
    source_ids = image_ids([Tile(path) for path in kept], kept, split.twins)
    assert [path for path, owner in zip(kept, source_ids, strict=True) if owner == source] == [c, d]


def test_shades_are_no_textures_unless_there_is_nothing_else() -> None:
    shades: dict[str, dict[str, Any]] = {
        "fit-0": {"shade_change": 0.1}, "fit-1": {"shade_change": None}, "fit-2": {"shade_change": -0.2},
    }  # fmt: skip
    for row in shades.values():
        row["source"] = "a.png"
    assert triplet_sources(NORMALS, shades, ["fit-0", "fit-1", "fit-2"]).textured.tolist() == [1]
    assert triplet_sources(NORMALS, shades, ["fit-2", "fit-0"]).textured.tolist() == [0, 1]
