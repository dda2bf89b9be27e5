"""The memory bank: what was kept is recalled, nearest means nearest, and what is excluded does not count."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flawsmith.detector import memory as module
from flawsmith.detector.memory import MemoryBank, as_patches, memory_size, subsample

CHANNELS = 6


def patches(images: int, side: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(images, CHANNELS, side, side, generator=generator), dim=1)


def filled(normals: Tensor, size: int) -> tuple[MemoryBank, Tensor]:
    memory = MemoryBank(size, CHANNELS)
    return memory, memory.fill(normals.split(2), len(normals))


@given(images=st.integers(1, 20), height=st.integers(1, 9), width=st.integers(1, 9), limit=st.integers(1, 2000))
@settings(deadline=None)
def test_a_subsample_keeps_as_many_patches_as_asked(images: int, height: int, width: int, limit: int) -> None:
    size = memory_size(limit, images, height, width)
    assert size == min(limit, images * height * width)
    assert int(subsample(images, height, width, size).sum()) == size


def test_a_subsample_is_even_over_images_and_over_the_borders() -> None:
    kept = subsample(60, 16, 16, 60 * 256 // 4).double()
    assert kept.mean(dim=(1, 2)).sub(0.25).abs().max() < 0.03  # a random draw: up to 0.07
    assert kept.mean(dim=0).sub(0.25).abs().max() < 0.06  # every cell, so every border cell too
    beside = (kept[:, :, 1:] * kept[:, :, :-1]).mean() + (kept[:, 1:] * kept[:, :-1]).mean()
    assert beside < 0.25**2  # two directions by chance: 2 x 0.0625


def test_a_whole_memory_knows_every_normal_place() -> None:
    normals = patches(5, 4)
    memory, source_ids = filled(normals, 5 * 16)
    torch.testing.assert_close(memory(normals), torch.zeros(5, 1, 4, 4), atol=1e-3, rtol=0)
    assert source_ids.tolist() == [image for image in range(5) for _ in range(16)]


def test_the_distance_is_that_of_the_patch_of_greatest_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, _ = filled(patches(5, 4), 50)
    asked = patches(3, 4, seed=1)
    rows = asked.permute(0, 2, 3, 1).reshape(-1, CHANNELS)
    expected = 1 - (rows @ memory.patches.float().T).amax(dim=1)
    for chunk in (1, 7, 50, 8192):
        monkeypatch.setattr(module, "CHUNK", chunk)
        torch.testing.assert_close(memory(asked).flatten(), expected)


def test_the_patches_of_a_excluded_image_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 7)
    normals = patches(4, 4)
    memory, source_ids = filled(normals, 64)
    for image in range(4):
        asked = normals[image : image + 1]
        others, _ = filled(torch.cat([normals[:image], normals[image + 1 :]]), 48)
        torch.testing.assert_close(memory(asked, source_ids == image), others(asked))
        assert (memory(asked) < memory(asked, source_ids == image)).all()


def test_a_basis_of_the_normals_own_dimensions_loses_no_distance() -> None:
    generator = torch.Generator().manual_seed(5)
    few = torch.randn(4, 9, generator=generator)  # all normal patches lie in 4 of 9 dimensions
    normal = F.normalize(torch.randn(3 * 25, 4, generator=generator) @ few, dim=1).view(3, 5, 5, 9).permute(0, 3, 1, 2)
    strange = F.normalize(torch.randn(2, 9, 5, 5, generator=generator), dim=1)
    whole, projected, narrow, again = (MemoryBank(40, 9, dimensions) for dimensions in (0, 4, 2, 4))
    source_ids = whole.fill([normal], 3)
    for memory in (projected, narrow, again):
        assert torch.equal(memory.fill(normal.split(2), 3), source_ids)
    assert (whole.patches.shape, projected.patches.shape, narrow.patches.shape) == ((40, 9), (40, 4), (40, 2))
    torch.testing.assert_close(projected(normal), whole(normal), atol=2e-3, rtol=0)
    # of a place that is not among them, the part is compared that lies in their dimensions
    span = torch.linalg.qr(few.T).Q
    part = F.normalize(torch.einsum("cd,ed,behw->bchw", span, span, strange), dim=1)
    torch.testing.assert_close(projected(strange), whole(part), atol=2e-3, rtol=0)
    assert (narrow(normal) - whole(normal)).abs().max() > 0.02
    assert torch.equal(again.patches, projected.patches)


@given(gain=st.floats(0.2, 5), seed=st.integers(0, 100))
@settings(deadline=None, max_examples=20)
def test_patches_do_not_see_contrast(gain: float, seed: int) -> None:
    level = torch.randn(1, CHANNELS, 5, 5, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(as_patches(level * gain), as_patches(level), atol=1e-5, rtol=0)
    torch.testing.assert_close(as_patches(level).norm(dim=1).mean(), torch.tensor(1.0), atol=1e-5, rtol=0)


@given(gain=st.floats(0.2, 5))
@settings(deadline=None, max_examples=20)
def test_without_an_norm_power_norm_does_not_count(gain: float) -> None:
    memory, _ = filled(patches(5, 4), 50)
    asked = patches(2, 4, seed=1)
    torch.testing.assert_close(memory(asked * gain), memory(asked), atol=1e-5, rtol=0)


DIRECTION = torch.ones(1, CHANNELS, 1, 1) / CHANNELS**0.5


def noisy(images: int, seed: int, falls: float) -> Tensor:
    """AsPatches off one direction by a noise whose square falls with norm to the power of `falls`."""
    generator = torch.Generator().manual_seed(seed)
    norm = torch.rand(images, 1, 8, 8, generator=generator) * 1.5 + 0.5
    noise = torch.randn(images, CHANNELS, 8, 8, generator=generator) * 0.03
    return F.normalize(DIRECTION + noise * norm ** (-falls / 2), dim=1) * norm


def of_one_direction() -> MemoryBank:
    memory, _ = filled(DIRECTION.expand(2, -1, 2, 2), 8)
    return memory


@pytest.mark.parametrize(("falls", "expected"), [(0.0, 0.0), (1.0, 1.0), (1.5, 1.5), (6.0, 2.0), (-2.0, 0.0)])
def test_the_normals_tell_how_much_norm_counts(falls: float, expected: float) -> None:
    memory = of_one_direction()
    images = [(image[None], None) for image in noisy(60, 1, falls)]
    found = memory.fit_norm_power(images)
    assert found == pytest.approx(expected, abs=0.2)
    assert float(memory.norm_power) == found
    assert memory.fit_norm_power(images) == found  # what was found before plays no part


def test_a_weight_by_norm_evens_out_the_noise() -> None:
    memory, fresh = of_one_direction(), noisy(60, 1, 2.0)
    weak = fresh.norm(dim=1, keepdim=True) < 1
    before = memory(fresh)
    memory.fit_norm_power([(fresh, None)])
    after = memory(fresh)
    assert before[weak].quantile(0.99) > 2 * before[~weak].quantile(0.99)
    assert after[weak].quantile(0.99) < 1.3 * after[~weak].quantile(0.99)


def test_a_few_patches_tell_nothing() -> None:
    assert of_one_direction().fit_norm_power([(noisy(2, 1, 2.0), None)]) == 0
