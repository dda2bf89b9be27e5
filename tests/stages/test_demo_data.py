"""Stage demo-data: the category appears whole or not at all."""

from dataclasses import replace
from pathlib import Path

import pytest

from flawsmith.config import Settings, load_settings
from flawsmith.data.dataset import Dataset
from flawsmith.demo import render
from flawsmith.demo.config import DemoDataSettings
from flawsmith.errors import UserError
from flawsmith.stages.demo_data import run

PARAMS = Path(__file__).parents[2] / "params.yaml"


@pytest.fixture
def settings() -> Settings:
    small = DemoDataSettings(seed=1, image_size=128, train_good=4, test_good=1, test_per_defect=1)
    return replace(load_settings(PARAMS), demo_data=small)


def test_a_run_replaces_what_an_earlier_one_left(settings: Settings, tmp_path: Path) -> None:
    stale = tmp_path / settings.data.root / "brushed_metal" / "train" / "good" / "stale.png"
    stale.parent.mkdir(parents=True)
    stale.touch()
    run(settings, tmp_path, "brushed_metal")
    assert len(Dataset(tmp_path / settings.data.root / "brushed_metal").normals()) == 4
    assert not stale.exists()


def test_a_crash_midway_leaves_the_old_category_and_nothing_half_written(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(settings, tmp_path, "brushed_metal")
    data = tmp_path / settings.data.root
    before = sorted(path.relative_to(data) for path in data.rglob("*"))

    def crash(*_: object) -> None:
        raise RuntimeError("out of disk")

    monkeypatch.setattr(render, "render_defective", crash)
    with pytest.raises(RuntimeError, match="out of disk"):
        run(settings, tmp_path, "brushed_metal")
    assert sorted(path.relative_to(data) for path in data.rglob("*")) == before


def test_a_crash_in_the_first_run_leaves_no_category(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object) -> None:
        raise RuntimeError("out of disk")

    monkeypatch.setattr(render, "render_defective", crash)
    with pytest.raises(RuntimeError, match="out of disk"):
        run(settings, tmp_path, "brushed_metal")
    assert list((tmp_path / settings.data.root).iterdir()) == []


@pytest.mark.parametrize(
    ("categories", "root", "rendered"),
    [(("brushed_metal", "mine"), "data", True), (("mine",), "data", False), (("brushed_metal",), "shop", False)],
)
def test_for_dvc_a_surface_is_rendered_in_the_project_and_only_where_it_is_read(
    settings: Settings, tmp_path: Path, categories: tuple[str, ...], root: str, rendered: bool
) -> None:
    shop = tmp_path / "elsewhere" / "shop"
    shop.mkdir(parents=True)
    data = replace(settings.data, root="data" if root == "data" else str(shop))
    run(replace(settings, categories=categories, data=data), tmp_path / "project", "brushed_metal", if_category=True)
    folder = tmp_path / "project" / "data" / "brushed_metal"  # DVC wants it to exist
    assert sorted(path.name for path in folder.iterdir()) == (["ground_truth", "test", "train"] if rendered else [])
    assert not list(shop.iterdir())


def test_an_unknown_surface_is_refused_and_a_folder_of_its_name_left_alone(settings: Settings, tmp_path: Path) -> None:
    own = tmp_path / settings.data.root / "granite" / "mine.png"
    own.parent.mkdir(parents=True)
    own.touch()
    with pytest.raises(UserError, match="granite"):
        run(settings, tmp_path, "granite")
    assert own.exists()
