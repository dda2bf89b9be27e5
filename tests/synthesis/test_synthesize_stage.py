"""The stage: a control needs no diffusion model, and every triplet it wrote is explained bit for bit."""

from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from flawsmith.config import load_settings
from flawsmith.data.images import write_png
from flawsmith.data.triplets import TripletFolder, read_manifest
from flawsmith.errors import UserError
from flawsmith.layout import Layout
from flawsmith.stages import synthesize
from flawsmith.stages.explain import explain

OVERRIDES = {
    "categories": ["plate"],
    "tracking.mode": "off",
    "data.image_size": 96,
    "ddpm-train.crop": 64,
    "synthesize.windows": [64, 96],
    "synthesize.triplets": 10,
    "synthesize.area": [0.002, 0.08],
    "validate.min_triplets": 1,
}


def layout(root: Path, **changes: object) -> Layout:
    folder = root / "data" / "plate" / "train" / "good"
    if not folder.exists():
        folder.mkdir(parents=True)
        for index in range(12):
            grain = ndimage.gaussian_filter(np.random.default_rng(index).normal(0, 40, (96, 96)), (4, 0.5))
            write_png(
                folder / f"{index:03d}.png", np.repeat(np.clip(120 + grain, 0, 255)[..., None], 3, 2).astype(np.uint8)
            )
    settings = load_settings(
        Path(__file__).parents[2] / "params.yaml",
        OVERRIDES | {f"synthesize.{key}": value for key, value in changes.items()},
    )
    return Layout(settings, "plate", root)


def test_a_control_runs_without_a_diffusion_model_and_is_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = layout(tmp_path, mixture={"own": 0.4, "illumination": 0.3, "cutpaste": 0.3})
    synthesize.run(made)
    rows = read_manifest(made.stage("synthesize") / "manifest.parquet").to_pylist()
    folder = TripletFolder(made.stage("synthesize"))
    assert sorted(row["triplet_id"] for row in rows) == sorted((*folder.ids("fit"), *folder.ids("val")))
    assert {row["defect_source"] for row in rows} == {"own", "illumination", "cutpaste"}
    for row in rows:
        normal, _, mask = folder.read(row["triplet_id"])
        assert mask.mean() == pytest.approx(row["mask_area"])
        source = made.surface().folder / "train" / "good" / row["source"]
        assert source.is_file()
        assert normal.shape == (3, 96, 96)
        assert (row["donor"] is None) == (row["defect_source"] != "own")
    for triplet_id in {row["defect_source"]: row["triplet_id"] for row in rows}.values():
        assert explain(made, triplet_id, tmp_path / "explained.png")
    assert "mask_kind       shade" in capsys.readouterr().out


def test_settings_of_the_diffusion_model_decide_nothing_about_a_control(tmp_path: Path) -> None:
    control, method = layout(tmp_path, mixture={"own": 1.0}), layout(tmp_path)
    assert synthesize.made_with(control) != synthesize.made_with(method)
    for made, decides in ((control, False), (method, True)):
        settings = load_settings(
            Path(__file__).parents[2] / "params.yaml",
            OVERRIDES | {"synthesize.mixture": made.settings.synthesize.mixture, "ddpm-train.steps": 7},
        )
        assert (synthesize.made_with(Layout(settings, "plate", tmp_path)) != synthesize.made_with(made)) == decides


def test_the_method_itself_still_asks_for_its_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="flawsmith ddpm-train"):
        synthesize.run(layout(tmp_path))
