"""Not a stage: makes one triplet again from its manifest row, compares it with the stored one, and draws both."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from flawsmith.data.images import to_uint8, write_png
from flawsmith.data.triplets import TripletFolder
from flawsmith.devices import Compute
from flawsmith.errors import FlawsmithError, UserError
from flawsmith.layout import Layout
from flawsmith.stages.synthesize import STAGE, build_generator, made_with, read_rows
from flawsmith.synthesis.generate import remake
from flawsmith.synthesis.sheet import contact_sheet, triplet_row


def explain(layout: Layout, triplet_id: str, out: Path) -> bool:
    """Draw the stored triplet above the one made anew into `out`; True if the two are the same bit for bit.

    Raises:
        UserError: no such triplet, or params.yaml has changed since the triplets were made.
    """
    rows, digest, precision = read_rows(layout)
    row = next((row for row in rows if row["triplet_id"] == triplet_id), None)
    if row is None:
        raise UserError(f"No triplet `{triplet_id}` in {layout.stage(STAGE)}; ids run as {_some(rows)}.")
    if digest != made_with(layout):
        raise UserError(
            f"The triplets of {layout.category} were made with other settings than params.yaml holds; restore them, "
            "or run `dvc repro` to make the triplets anew."
        )
    compute = replace(Compute.choose(layout.settings.compute), precision=precision)
    maker = build_generator(layout, compute)
    with compute.fast_math():
        again = remake(maker, row["role"], row["candidate"])
    if again is None:
        raise FlawsmithError(f"{triplet_id} left no visible change when made again; the device or library has changed.")
    for key, value in maker.row(triplet_id, again).items():
        print(f"  {key:<15} {value:.4f}" if isinstance(value, float) else f"  {key:<15} {value}")
    normal, defect, mask = TripletFolder(layout.stage(STAGE)).read(triplet_id)
    stored = to_uint8(normal).transpose(2, 0, 1), to_uint8(defect).transpose(2, 0, 1), mask
    write_png(out, contact_sheet([triplet_row(*stored), triplet_row(again.normal, again.defect, again.mask)], 1))
    made = (again.normal, again.defect, again.mask)
    return all(np.array_equal(old, new) for old, new in zip(stored, made, strict=True))


def _some(rows: list[dict[str, object]]) -> str:
    return ", ".join(str(row["triplet_id"]) for row in rows[:2]) + ", …"
