"""Each row changes the part that it names, and the first row changes nothing."""

import dataclasses
from pathlib import Path

import torch
from filled import calibrate, detector_of

from flawsmith.config import load_settings
from flawsmith.detector.teacher import build_teacher
from flawsmith_lab.ablation import variants

PARAMS = load_settings(Path(__file__).parents[2] / "params.yaml")


def test_each_variant_changes_what_it_names() -> None:
    settings = dataclasses.replace(PARAMS.distill, bottleneck=16, decoder_channels=(8, 8), head_channels=8, memory=60)
    normals = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    detector, _ = detector_of(build_teacher(PARAMS.teacher), PARAMS.teacher, settings, normals[:5])
    detector.weights.copy_(torch.tensor([0.8, 0.2]))
    calibrate(detector, normals[5:])
    with torch.inference_mode():
        asked = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
        found = {name: (own, own(asked)[0]) for name, own in variants(detector, [normals[5:]])}
        expected = detector(asked)[0]
    same, (_, shipped) = {"segmentation head without", "student not trusted"}, found["as trained"]
    torch.testing.assert_close(shipped, expected)
    assert detector.trust == 0  # an untrained student answers nothing
    for name, (_, maps) in found.items():
        assert torch.isfinite(maps).all()
        assert torch.equal(maps, shipped) is (name == "as trained" or name in same), name
    assert found["memory_fine alone"][0].weights.tolist() == [1, 0]
    assert not found["no allowance: plain squared distances"][0].memories["memory_fine"].allowance.any()
    assert detector.memories["memory_fine"].allowance.any()
