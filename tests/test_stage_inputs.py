"""What a stage depends on must be the same before and after, or DVC would record what was not."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from small_settings import write_params

from flawsmith.config import load_settings
from flawsmith.errors import FlawsmithError, UserError
from flawsmith.layout import Layout
from flawsmith.stages import settings
from flawsmith.tracking import stage_run

DVC = """
stages:
  distill:
    matrix: {category: "${categories}"}
    cmd: flawsmith distill
    deps:
      - artifacts/${item.category}/validate/verdict.json
      - ${data.root}/${item.category}/train
      - src/flawsmith/detector
    params: [data, distill.steps]
"""


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    for name in ("artifacts/plate/validate/verdict.json", "shop/plate/train/good/a.png", "src/flawsmith/detector/a.py"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("old")
    (tmp_path / "dvc.yaml").write_text(DVC)
    write_params(tmp_path / "params.yaml", {"tracking": {"mode": "off"}, "data": {"root": "shop"}})
    return Layout(load_settings(tmp_path / "params.yaml"), "plate", tmp_path)


def rewrite(name: str) -> Callable[[Path], object]:
    return lambda root: (root / name).write_text("another")


def replace_value(root: Path) -> None:
    text = (root / "params.yaml").read_text()
    (root / "params.yaml").write_text(text.replace("root: shop", "root: hall"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (rewrite("src/flawsmith/detector/a.py"), r"detector/a\.py"),
        (rewrite("src/flawsmith/detector/new.py"), r"detector/new\.py"),
        (rewrite("shop/plate/train/good/a.png"), r"train/good/a\.png"),
        (rewrite("artifacts/plate/validate/verdict.json"), r"validate/verdict\.json"),
        (lambda root: (root / "shop/plate/train/good/a.png").unlink(), r"train/good/a\.png"),
        (replace_value, r"`data` in params\.yaml"),
    ],
)
def test_what_is_changed_while_a_stage_runs_makes_it_fail(
    layout: Layout, change: Callable[[Path], object], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_STAGE", "distill@plate")
    with pytest.raises(FlawsmithError, match=rf"Changed while stage `distill` ran: .*{named}\. DVC would record"):  # noqa: SIM117
        with stage_run(layout, "distill", {}):
            change(layout.root)


def test_a_stage_that_dvc_runs_takes_the_settings_that_dvc_records(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.run(layout)
    assert load_settings(layout.effective_settings) == replace(layout.settings, categories=("plate",))
    changed = Layout(load_settings(layout.root / "params.yaml", {"distill.batch": 3}), "plate", layout.root)
    monkeypatch.delenv("DVC_STAGE", raising=False)
    assert changed.as_recorded().settings.distill.batch == 3
    monkeypatch.setenv("DVC_STAGE", "distill@plate")
    assert changed.as_recorded().settings.distill == layout.settings.distill


def test_what_changes_no_content_is_no_change(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DVC_STAGE", raising=False)
    with stage_run(layout, "distill", {}):
        os.utime(layout.root / "src/flawsmith/detector/a.py", (1, 1))
        cache = layout.root / "src/flawsmith/detector/__pycache__/a.cpython-311.pyc"
        cache.parent.mkdir()
        cache.write_bytes(b"compiled")
        replace_value(layout.root)  # outside DVC the stage has its values from wherever it was told
        rewrite("src/flawsmith/other.py")(layout.root)


def test_a_linked_folder_that_dvc_does_not_see_is_refused(layout: Layout, tmp_path: Path) -> None:
    good = tmp_path / "shop/plate/train/good"
    good.rename(tmp_path / "share")
    good.symlink_to(tmp_path / "share")
    with pytest.raises(UserError, match=r"train/good is a linked folder, and DVC does not see .* set `data\.root`"):  # noqa: SIM117
        with stage_run(layout, "distill", {}):
            pass
    good.unlink()
    good.parent.rmdir()
    good.parent.parent.rmdir()
    (tmp_path / "hall/plate/train").mkdir(parents=True)
    (tmp_path / "share").rename(tmp_path / "hall/plate/train/good")
    (tmp_path / "shop/plate").symlink_to(tmp_path / "hall/plate")  # the whole category: DVC follows that
    with stage_run(layout, "distill", {}):
        pass
