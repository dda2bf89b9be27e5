"""Stage synthesize: normal images, and the denoiser where it is used → triplets (normal, defect, mask) and manifest."""

import json
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from flawsmith.data.dataset import load_tiles, normal_name, plan_tiles
from flawsmith.data.foreground import Foreground
from flawsmith.data.images import write_png
from flawsmith.data.triplets import TripletFolder, read_manifest
from flawsmith.devices import Compute
from flawsmith.diffusion.unet import build_scheduler, load_denoiser
from flawsmith.files import atomic_file, atomic_folder
from flawsmith.layout import Layout
from flawsmith.randomness import numpy_generator
from flawsmith.sections import section_values, settings_digest
from flawsmith.synthesis.generate import TripletGenerator, generate, role_counts
from flawsmith.synthesis.sheet import contact_sheet, triplet_row
from flawsmith.tracking import stage_run

STAGE = "synthesize"
SHEET_ROWS = 16
FOREGROUND_SAMPLE = 32  # normals from which object or texture is told
# in the manifest's schema metadata: with what settings the triplets were made, and in what precision
DIGEST_KEY, PRECISION_KEY = b"flawsmith.settings", b"flawsmith.precision"


def run(layout: Layout) -> None:
    """Make the triplets and write `normal|defect|mask/`, `manifest.parquet` and `sheet.png`."""
    settings, data = layout.settings.synthesize, layout.data
    compute = Compute.choose(layout.settings.compute)
    params = {STAGE: section_values(settings), "data": section_values(data), "compute": compute.describe()}
    with stage_run(layout, STAGE, params) as tracked, compute.fast_math():
        maker = build_generator(layout, compute)
        rows: list[dict[str, Any]] = []
        strips = []
        with atomic_folder(layout.stage(STAGE)) as out:
            folder = TripletFolder(out)
            for role, count in role_counts(settings).items():
                for index, triplet in enumerate(generate(maker, role, count)):
                    triplet_id = f"{role}-{index:05d}"
                    folder.write(triplet_id, triplet.normal, triplet.defect, triplet.mask)
                    rows.append(maker.row(triplet_id, triplet))
                    if role == "fit" and index < SHEET_ROWS:
                        strips.append(triplet_row(triplet.normal, triplet.defect, triplet.mask))
            write_manifest(rows, made_with(layout), compute.precision, out)
            write_png(out / "sheet.png", contact_sheet(strips))
        areas = [row["mask_area"] for row in rows]
        print(f"{layout.category}: {len(rows)} triplets, median defect {np.median(areas):.2%} of the image")
        tracked.log_metrics({"triplets": len(rows), "median_mask_area": float(np.median(areas))})
        tracked.log_artifact(layout.stage(STAGE) / "sheet.png")
        tracked.set_output(layout.stage(STAGE) / "defect")


def build_generator(
    layout: Layout, compute: Compute, sources: Collection[str] = (), paths: Sequence[Path] = (), most: int = 0
) -> TripletGenerator:
    """Normals, and the denoiser if one of `sources` needs it, ready to make any triplet of this category.

    By default the sources are those of the mixture, and the normals, images at `paths`, the fit part; of tiles there
    are up to `most`, by default `data.max_tiles`.
    """
    data = replace(layout.data, max_tiles=most or layout.data.max_tiles)
    denoiser, scheduler = None, None
    if "diffusion" in (sources or layout.settings.synthesize.shares):
        layout.input("ddpm-train", "unet.safetensors")
        loaded, ddpm = load_denoiser(layout.stage("ddpm-train"))
        denoiser = loaded.to(compute.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        scheduler = build_scheduler(ddpm)
    split = layout.split()
    tiles = plan_tiles(paths or split.fit, data)
    normals = load_tiles(tiles, data)
    generator = numpy_generator(layout.settings.synthesize.seed, "foreground")
    sample = np.sort(generator.permutation(len(normals))[:FOREGROUND_SAMPLE])
    foreground = Foreground.estimate(normals[sample].astype(np.float32) / np.float32(255))
    return TripletGenerator(
        denoiser=denoiser,
        scheduler=scheduler,
        normals=normals,
        names=[normal_name(tile.path) for tile in tiles],
        places=[tile.place for tile in tiles],
        foreground=foreground,
        settings=layout.settings.synthesize,
        compute=compute,
        twins=split.twins,
    )


def made_with(layout: Layout) -> str:
    """Digest of all settings that decide a triplet (the denoiser's own digest stands in its config)."""
    settings = layout.settings
    model = (settings.ddpm_train,) if "diffusion" in settings.synthesize.shares else ()
    return settings_digest(settings.data, settings.synthesize, *model)


def write_manifest(rows: list[dict[str, Any]], digest: str, precision: str, folder: Any) -> None:
    """One row a triplet, with the digest of the settings and the precision in the schema's metadata.

    The table has all columns of all rows: a source leaves empty what it has no use for.
    """
    columns = dict.fromkeys(key for row in rows for key in row)
    made = {DIGEST_KEY: json.dumps(digest), PRECISION_KEY: precision}
    table = pa.Table.from_pylist([{key: row.get(key) for key in columns} for row in rows]).replace_schema_metadata(made)
    with atomic_file(folder / "manifest.parquet") as temporary:
        pq.write_table(table, temporary)


def read_rows(layout: Layout) -> tuple[list[dict[str, Any]], str, str]:
    """The manifest's rows, the digest of the settings they were made with, and the precision."""
    table = read_manifest(layout.input(STAGE, "manifest.parquet"))
    made = table.schema.metadata or {}
    return table.to_pylist(), json.loads(made.get(DIGEST_KEY, b'""')), made.get(PRECISION_KEY, b"float32").decode()
