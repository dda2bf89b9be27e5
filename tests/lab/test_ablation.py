"""Each row changes the part that it names, and the first row changes nothing."""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from filled import calibrate, detector_of

from flawsmith.config import load_settings
from flawsmith.detector.teacher import build_teacher
from flawsmith_lab.ablation import RawMaps, variants

PARAMS = load_settings(Path(__file__).parents[2] / "params.yaml")
SETTINGS = dataclasses.replace(PARAMS.distill, bottleneck=16, decoder_channels=(8, 8), head_channels=8, memory=60)


def test_each_variant_changes_what_it_names(tmp_path: Path) -> None:
    normals = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    detector, _ = detector_of(build_teacher(PARAMS.teacher), PARAMS.teacher, SETTINGS, normals[:5])
    detector.weights.copy_(torch.tensor([0.8, 0.2]))
    calibrate(detector, normals[5:])
    with torch.inference_mode():
        asked = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
        expected = detector(asked)[0][:, 0]
    found = {one.part: one for one in variants(detector, normals[5:].numpy(), tmp_path)}
    maps = {part: torch.from_numpy(one(asked.numpy())[0]) for part, one in found.items()}
    same, shipped = {"segmentation head without", "student not trusted"}, maps["as trained"]
    torch.testing.assert_close(shipped, expected, atol=1e-3, rtol=1e-3)  # images come one by one there
    assert detector.trust == 0  # an untrained student answers nothing
    for part, told in maps.items():
        assert torch.isfinite(told).all()
        assert torch.equal(told, shipped) is (part == "as trained" or part in same), part
    assert found["memory_fine alone"].detector.weights.tolist() == [1, 0]
    assert not torch.equal(maps["no allowance: plain squared distances"], shipped)


def test_an_image_is_shown_to_the_detector_once(tmp_path: Path) -> None:
    detector = detector_of(build_teacher(PARAMS.teacher), PARAMS.teacher, SETTINGS, torch.rand(4, 3, 64, 64))[0]
    asked = np.random.default_rng(0).random((2, 3, 64, 64), dtype=np.float32)
    before = RawMaps(detector, tmp_path)(asked)
    detector.memories["memory_fine"].allowance += 1  # would now answer otherwise
    again = RawMaps(detector, tmp_path)(asked[::-1])
    for name, maps in before.items():
        assert torch.equal(maps.flip(0), again[name])
