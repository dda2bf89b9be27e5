"""The baseline: what it remembers, and how far what is new is from it."""

import torch
from torch import Tensor

from flawsmith.detector.config import TeacherSettings
from flawsmith.detector.patchcore import PatchCore
from flawsmith.detector.teacher import build_teacher
from flawsmith.randomness import torch_generator

HEIGHT, WIDTH = 64, 96


def normals(count: int, seed: int = 0) -> Tensor:
    return 0.4 + 0.15 * torch.rand(count, 3, HEIGHT, WIDTH, generator=torch_generator(seed, "normals"))


def fitted(images: Tensor, vectors: int = 10**6, candidates: int = 10**6) -> PatchCore:
    teacher = build_teacher(TeacherSettings())
    return PatchCore.fit(teacher, images.split(2), vectors, candidates, torch_generator(0, "baseline"))


@torch.inference_mode()
def test_a_defect_is_far_from_all_that_is_remembered():
    images = normals(4)
    baseline, defect = fitted(images, vectors=200), images.clone()
    defect[..., 20:40, 30:50] = 0.05
    (_, good), (maps, bad) = baseline(images), baseline(defect)
    assert bad.min() > good.max()
    assert maps[..., 20:40, 30:50].mean() > 1.5 * maps.mean()
    assert maps.shape == (4, 1, HEIGHT, WIDTH)
    assert (bad >= maps.flatten(1).amax(dim=1)).all()  # the score is the maximum before the blur
    torch.testing.assert_close(baseline(defect[1:2])[1], bad[1:2], rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_what_is_remembered_whole_is_at_no_distance():
    images, baseline = normals(3), fitted(normals(3))
    assert baseline(images)[1].max() < 0.05 * baseline(normals(3, seed=1))[1].min()
    assert [len(fitted(images, 50, places).memory) for places in (10**6, 7)] == [50, 3 * 7]
