"""Training of the denoiser: it learns, resumes on the same curve, and is judged honestly."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from flawsmith.config import load_settings
from flawsmith.devices import BFLOAT16, CPU, FLOAT32
from flawsmith.diffusion.readiness import colour_noise, energy_distance, judge_readiness
from flawsmith.diffusion.train import random_crops, train_denoiser
from flawsmith.diffusion.unet import Denoiser, load_denoiser, save_denoiser
from flawsmith.errors import FlawsmithError, UserError
from flawsmith.training import ResumePoint

SETTINGS = replace(
    load_settings(Path(__file__).parents[2] / "params.yaml").ddpm_train,
    crop=16, patch=2, channels=(8, 16), fine_channels=8, steps=12, batch=4, checkpoint_every=5, warmup=2,
)  # fmt: skip


@pytest.fixture
def images() -> np.ndarray:
    rows = np.random.default_rng(0).integers(80, 170, (6, 1, 40, 1))
    return np.broadcast_to(rows, (6, 3, 40, 40)).astype(np.uint8)  # horizontal stripes


def test_the_loss_falls(images: np.ndarray, tmp_path: Path) -> None:
    settings = replace(SETTINGS, steps=150, learning_rate=4e-3)
    _, rows = train_denoiser(images, settings, ResumePoint(tmp_path, "a"), CPU)
    losses = [row[1] for row in rows]
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:5])


@pytest.mark.parametrize("precision", [FLOAT32, BFLOAT16])
def test_a_killed_run_continues_on_the_same_curve(images: np.ndarray, tmp_path: Path, precision: str) -> None:
    compute = replace(CPU, precision=precision)  # both in one process, in either order
    whole, rows = train_denoiser(images, SETTINGS, ResumePoint(tmp_path / "whole", "a"), compute)

    def die_at_8(step: int, metrics: object) -> None:
        if step == 8:
            raise KeyboardInterrupt

    point = ResumePoint(tmp_path / "killed", "a")
    with pytest.raises(KeyboardInterrupt):
        train_denoiser(images, SETTINGS, point, compute, die_at_8)
    started_at: list[int] = []
    resumed, again = train_denoiser(images, SETTINGS, point, compute, lambda step, metrics: started_at.append(step))
    assert started_at[0] == 5  # the last checkpoint before the kill
    assert again == rows
    for left, right in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(left, right)


def test_a_checkpoint_of_other_settings_is_not_resumed(images: np.ndarray, tmp_path: Path) -> None:
    train_denoiser(images, SETTINGS, ResumePoint(tmp_path, "a"), CPU)
    started_at: list[int] = []
    train_denoiser(images, SETTINGS, ResumePoint(tmp_path, "b"), CPU, lambda step, metrics: started_at.append(step))
    assert started_at[0] == 0


def test_a_damaged_checkpoint_is_not_resumed(images: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(b"not a checkpoint")
    _, rows = train_denoiser(images, SETTINGS, ResumePoint(tmp_path, "a"), CPU)
    assert len(rows) == SETTINGS.steps


def test_a_diverging_loss_is_one_clear_error(
    images: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = Denoiser.forward
    monkeypatch.setattr(Denoiser, "forward", lambda *inputs: forward(*inputs) * float("nan"))
    with pytest.raises(FlawsmithError, match=r"ddpm-train\.learning_rate"):
        train_denoiser(images, SETTINGS, ResumePoint(tmp_path, "a"), CPU)


def test_crops_larger_than_images_are_refused(images: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ddpm-train\.crop"):
        train_denoiser(images, replace(SETTINGS, crop=64), ResumePoint(tmp_path, "a"), CPU)


def test_the_denoiser_takes_any_size_and_survives_saving(tmp_path: Path) -> None:
    denoiser = Denoiser(SETTINGS).eval()
    save_denoiser(denoiser, SETTINGS, FLOAT32, tmp_path)
    loaded, settings = load_denoiser(tmp_path)
    assert settings == SETTINGS
    for side in (16, 24, 40):
        x = torch.randn(2, 3, side, side + 8)
        t = torch.tensor([3, 900])
        with torch.inference_mode():
            assert torch.equal(denoiser(x, t), loaded(x, t))


@pytest.mark.parametrize("content", [b"", b"garbage", None])
def test_a_wrong_checkpoint_names_the_file(tmp_path: Path, content: bytes | None) -> None:
    save_denoiser(Denoiser(SETTINGS), SETTINGS, FLOAT32, tmp_path)
    if content is None:
        other = replace(SETTINGS, channels=(16, 16))
        save_denoiser(Denoiser(other), other, FLOAT32, tmp_path / "other")
        content = (tmp_path / "other" / "unet.safetensors").read_bytes()
    (tmp_path / "unet.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"unet\.safetensors"):
        load_denoiser(tmp_path)


def test_crops_are_images_scaled_to_plus_minus_one(images: np.ndarray) -> None:
    crops = random_crops(images, 16, 20, np.random.default_rng(3), flip=True)
    assert crops.shape == (20, 3, 16, 16)
    assert crops.min() >= images.min() / 127.5 - 1 - 1e-6
    assert crops.max() <= images.max() / 127.5 - 1 + 1e-6


def features(seed: int, shift: float = 0.0, count: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 1, (count, 6))


def test_energy_distance_is_near_zero_for_equal_distributions_and_grows_with_the_shift() -> None:
    values = [energy_distance(features(0), features(1, shift)) for shift in (0.0, 0.5, 1.0, 2.0)]
    assert abs(values[0]) < 0.2
    assert values == sorted(values)


@pytest.mark.parametrize(
    ("samples", "ready", "word"),
    [
        (features(5), True, "Ready"),
        (features(5, 3.0), False, "raise ddpm-train.steps"),
        (features(2, count=256)[:64] + 1e-3, False, "repeats its training images"),
    ],
)
def test_readiness_says_what_is_wrong(samples: np.ndarray, ready: bool, word: str) -> None:
    verdict = judge_readiness(samples, features(1, count=128), features(2, count=256), features(3, 4.0))
    assert verdict.ready is ready
    assert word in verdict.verdict


def test_a_surface_that_looks_like_noise_is_judged_by_its_own_spread() -> None:
    good = judge_readiness(features(5), features(1, count=128), features(2, count=256), features(3))
    assert good.ready
    bad = judge_readiness(features(5, 3.0), features(1, count=128), features(2, count=256), features(3))
    assert not bad.ready
    assert 1 < bad.relative_distance < 100  # a share that says something, not a division by nothing


def test_colour_noise_keeps_mean_and_covariance() -> None:
    crops = np.random.default_rng(0).uniform(0.3, 0.6, (8, 3, 32, 32)).astype(np.float32)
    crops[:, 1] = 0.5 * crops[:, 0] + 0.2
    noise = colour_noise(crops, np.random.default_rng(1))
    flat = [part.transpose(1, 0, 2, 3).reshape(3, -1) for part in (crops, noise)]
    np.testing.assert_allclose(flat[0].mean(axis=1), flat[1].mean(axis=1), atol=0.01)
    np.testing.assert_allclose(np.cov(flat[0]), np.cov(flat[1]), atol=1e-3)
