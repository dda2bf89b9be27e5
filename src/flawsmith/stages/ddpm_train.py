"""Stage ddpm-train: normal images → a denoiser of the surface, its loss curve, samples, and whether it is ready."""

from contextlib import ExitStack

import numpy as np
import torch
from numpy.typing import NDArray

from flawsmith.data.dataset import load_tiles, plan_tiles, tell_losses
from flawsmith.data.images import to_uint8, write_png
from flawsmith.detector.teacher import Teacher, build_teacher, pooled_features
from flawsmith.devices import Compute
from flawsmith.diffusion.config import SAMPLE_STEPS, DdpmTrainSettings
from flawsmith.diffusion.readiness import Readiness, colour_noise, judge_readiness
from flawsmith.diffusion.sampler import SamplingPlan, sample_disturbed
from flawsmith.diffusion.train import LOSS_COLUMNS, random_crops, to_unit_range, train_denoiser
from flawsmith.diffusion.unet import Denoiser, build_scheduler, save_denoiser
from flawsmith.files import atomic_folder, digest_json, digest_path, sole_writer, write_csv, write_json
from flawsmith.layout import Layout
from flawsmith.processes import is_main_process
from flawsmith.randomness import numpy_generator, torch_generator
from flawsmith.sections import section_values, settings_digest
from flawsmith.tracking import stage_run
from flawsmith.training import ResumePoint

STAGE = "ddpm-train"
SHEET_SAMPLES = 16
RIM = 8  # pixels sampled around each crop and cut off, as synthesis uses the inside of its windows alone


def run(layout: Layout) -> None:
    """Train, sample, judge, write `unet.safetensors`, `config.json`, `losses.csv`, `samples.png`, `readiness.json`."""
    settings, data = layout.settings.ddpm_train, layout.data
    train_folder = layout.surface().folder / "train"
    compute = Compute.choose(layout.settings.compute)
    params = {STAGE: section_values(settings), "data": section_values(data), "compute": compute.describe()}
    with ExitStack() as stack:
        tracked = stack.enter_context(stage_run(layout, STAGE, params))
        if is_main_process():
            stack.enter_context(sole_writer(layout.stage(STAGE)))
        stack.enter_context(compute.fast_math())
        split = layout.split()
        if is_main_process():
            print(f"{layout.category}: train/good: {layout.surface().find_normals()}")
            tell_losses(layout.surface().normals(), data, layout.category)
        fit, heldout = (load_tiles(plan_tiles(part, data), data) for part in (split.fit, split.calibration))
        identity = digest_json(
            {
                "settings": settings_digest(settings, data),
                "data": digest_path(train_folder),
                "precision": compute.precision,
            }
        )
        resume = ResumePoint(layout.resume(STAGE), identity)
        denoiser, rows = train_denoiser(
            fit, settings, resume, compute, lambda step, metrics: tracked.log_metrics(metrics, step=step)
        )
        if not is_main_process():
            return
        samples = plain_samples(denoiser, settings, compute)
        readiness = _judge(samples, fit, heldout, settings, build_teacher(layout.settings.teacher, layout.root))
        with atomic_folder(layout.stage(STAGE)) as out:
            save_denoiser(denoiser, settings, compute.precision, out)
            write_csv(out / "losses.csv", LOSS_COLUMNS, rows)
            write_png(out / "samples.png", _sheet(samples, fit, settings))
            write_json(out / "readiness.json", {**readiness.as_json(), "precision": compute.precision})
        resume.clear()
        print(f"{layout.category}: {readiness.verdict}")
        tracked.log_metrics(
            {"relative_distance": readiness.relative_distance, "neighbour_ratio": readiness.neighbour_ratio}
        )
        for name in ("samples.png", "losses.csv", "readiness.json"):
            tracked.log_artifact(layout.stage(STAGE) / name)
        tracked.set_output(layout.stage(STAGE) / "unet.safetensors")


def plain_samples(denoiser: Denoiser, settings: DdpmTrainSettings, compute: Compute) -> NDArray[np.float32]:
    """(N, 3, crop, crop) in [0, 1]: fixed-seed samples of strength 0 from pure noise."""
    count, rim = settings.readiness_samples, -(-RIM // settings.multiple) * settings.multiple
    side = settings.crop + 2 * rim
    sampled = sample_disturbed(
        denoiser.to(compute.device, memory_format=torch.channels_last),  # type: ignore[call-overload]
        build_scheduler(settings),
        torch.zeros(count, 3, side, side),
        [1.0] * count,
        [0.0] * count,
        SamplingPlan(SAMPLE_STEPS, compute=compute),
        [torch_generator(settings.seed, "samples", index) for index in range(count)],
    )
    denoiser.cpu()
    return to_unit_range(sampled[:, :, rim : side - rim, rim : side - rim].numpy())


def _judge(
    samples: NDArray[np.float32],
    fit: NDArray[np.uint8],
    heldout: NDArray[np.uint8],
    settings: DdpmTrainSettings,
    teacher: Teacher,
) -> Readiness:
    """Pooled teacher features of samples, held-out and training crops and coloured noise, compared."""

    def crops(images: NDArray[np.uint8], name: str, count: int) -> NDArray[np.float32]:
        generator = numpy_generator(settings.seed, "readiness", name)
        return to_unit_range(random_crops(images, settings.crop, count, generator).numpy())

    def features(images: NDArray[np.float32]) -> NDArray[np.float64]:
        return pooled_features(teacher, images).astype(np.float64)

    count = settings.readiness_samples
    held = crops(heldout, "heldout", 2 * count)
    noise = colour_noise(held[:count], numpy_generator(settings.seed, "readiness", "noise"))
    return judge_readiness(features(samples), features(held), features(crops(fit, "fit", 4 * count)), features(noise))


def _sheet(samples: NDArray[np.float32], fit: NDArray[np.uint8], settings: DdpmTrainSettings) -> NDArray[np.uint8]:
    """Two rows of real crops above two rows of plain samples."""
    generator = numpy_generator(settings.seed, "readiness", "sheet")
    real = to_unit_range(random_crops(fit, settings.crop, SHEET_SAMPLES, generator).numpy())
    width = min(SHEET_SAMPLES // 2, len(samples))
    shown = min(SHEET_SAMPLES, len(samples)) // width * width  # whole rows
    tiles = [to_uint8(tile) for tile in (*real[: 2 * width], *samples[:shown])]
    return np.concatenate([np.concatenate(tiles[i : i + width], axis=1) for i in range(0, len(tiles), width)], axis=0)
