"""The synthesis benchmark: its arithmetic, and the whole command on a project that takes moments."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from flawsmith.errors import UserError
from flawsmith.synthesis.masks import MaskDraw
from flawsmith.synthesis.sources.base import Candidate, Defect
from flawsmith_lab.bench.measure import Target, bench_settings, count_flops, first_category
from flawsmith_lab.bench.synthesis import in_whole_image, main


@given(st.integers(1, 4), st.integers(1, 3))
def test_flops_are_those_of_the_shapes_and_grow_with_the_batch(batch: int, channels: int) -> None:
    layer, image = nn.Conv2d(3, channels, 3, padding=1), torch.zeros(batch, 3, 8, 8)
    forward = 2 * batch * channels * 3 * 9 * 64
    assert count_flops(lambda: layer(image)) == forward
    # the gradient of the weights costs as much again; the image needs none
    assert count_flops(lambda: layer(image).sum().backward()) == 2 * forward


def test_a_target_that_is_reached_exactly_is_met() -> None:
    assert Target("speed", 5.0, 5.0).is_met
    assert not Target("speed", 4.99, 5.0).is_met
    assert "MISSED" in Target("speed", 4.99, 5.0).sentence()


def test_the_whole_image_is_sampled_for_the_very_same_defects() -> None:
    mask = np.zeros((64, 64), np.bool_)
    mask[10:14, 20:24] = True
    outline = MaskDraw(mask, "perlin", 8.0, 0.1, 0.5, (4, 12, 48))
    defect = Defect(outline, np.float32(0.9) * mask, {"strength": 0.2, "start": 0.7})
    candidate = Candidate("fit", 3, 0, "diffusion", defect)
    whole = in_whole_image(candidate)
    assert whole.defect.outline.window == (0, 0, 64)
    assert (whole.defect.outline.mask == mask).all()
    assert (whole.role, whole.number, whole.normal) == ("fit", 3, 0)
    assert np.array_equal(whole.defect.alpha, defect.alpha)
    assert whole.defect.values == defect.values


def test_settings_of_a_benchmark_name_no_place_relative_to_the_project(params: Path) -> None:
    settings = bench_settings(params, "brushed_metal", None, {"teacher.weights": "w.pth"})
    assert settings.categories == ("brushed_metal",)
    assert settings.tracking.mode == "off"
    assert Path(settings.data.root) == params.parent / "data"
    assert Path(bench_settings(params, None, params.parent / "other").data.root) == params.parent / "other"


def test_a_category_that_nobody_can_find_is_refused(params: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist; name another --data"):
        main(["--params", str(params), "--category", "nothing"])
    with pytest.raises(UserError, match="holds no category; put images into"):
        main(["--params", str(params), "--data", str(tmp_path)])


def test_without_a_name_the_first_category_of_the_folder_is_measured(tmp_path: Path) -> None:
    for name in ("b", "a", "0_no_images"):
        (tmp_path / name / ("test" if name.startswith("0") else "train/good")).mkdir(parents=True)
    assert first_category(tmp_path, "other") == "a"
    assert first_category(None, "other") == "other"


def test_the_command_measures_and_ends_with_json(params: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--params", str(params), "--steps", "2", "--chunks", "1", "--compared", "1"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["image_size"] == 64
    assert found["triplets_per_second"] > 0
    assert found["ddpm"]["step_gflop"] > 0
    assert found["ddpm"]["matmul_gflops"] >= found["ddpm"]["matmul_gflops_median"] > 0
    local = found["local_against_whole"]
    # cost goes with the area: that of a window over that of the image, averaged over the defects
    area = sum(int(side) ** 2 * count for side, count in local["windows"].items()) / local["defects"]
    assert local["flops_ratio"] == pytest.approx(64**2 / area, rel=0.02)
    for target in found["targets"].values():
        assert target["met"] == (target["value"] >= target["target"])
    assert not (params.parent / "artifacts").exists()  # the project is only read
