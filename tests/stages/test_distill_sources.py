"""Which normal each triplet was made from: the memory must not know it while the head learns."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flawsmith.errors import UserError
from flawsmith.stages.distill import _sources
from flawsmith.triplets import FIT, VALIDATION, TripletFolder

NORMALS = [Path("good") / name for name in ("a.png", "b.png", "c.png")]
IDS = {FIT: ("fit-0", "fit-1"), VALIDATION: ("val-0",)}


def folder(tmp_path: Path, sources: dict[str, str]) -> TripletFolder:
    rows = [{"triplet_id": name, "source": source} for name, source in sources.items()]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "manifest.parquet")
    return TripletFolder(tmp_path)


def test_each_triplet_is_traced_to_its_normal_whatever_the_manifests_order(tmp_path: Path) -> None:
    found = _sources(folder(tmp_path, {"val-0": "a.png", "fit-1": "b.png", "fit-0": "c.png"}), NORMALS, IDS)
    assert {role: indices.tolist() for role, indices in found.items()} == {FIT: [2, 1], VALIDATION: [0]}


def test_a_source_that_is_no_fit_normal_now_is_one_clear_error(tmp_path: Path) -> None:
    moved = folder(tmp_path, {"fit-0": "a.png", "fit-1": "gone.png", "val-0": "b.png"})
    with pytest.raises(UserError, match=r"gone\.png.*flawsmith synthesize"):
        _sources(moved, NORMALS, IDS)
