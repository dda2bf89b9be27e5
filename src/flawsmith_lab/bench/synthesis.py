"""How fast defects are made and the denoiser is trained here, beside what the machine could do.

python -m flawsmith_lab.bench.synthesis [--category C] [--data DIR]        (make bench-synthesis)
"""

import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flawsmith.data.dataset import load_tiles, plan_tiles
from flawsmith.data.triplets import FIT, TripletFolder
from flawsmith.devices import Compute
from flawsmith.diffusion.config import DdpmTrainSettings
from flawsmith.diffusion.train import train_denoiser
from flawsmith.files import read_json
from flawsmith.layout import Layout
from flawsmith.sections import section_values
from flawsmith.sequences import evenly
from flawsmith.stages import ddpm_train, synthesize
from flawsmith.synthesis.generate import TripletGenerator
from flawsmith.synthesis.sources.base import Candidate
from flawsmith.training import ResumePoint
from flawsmith_lab.bench import measure

TRIPLETS_PER_SECOND, EFFICIENCY, FLOPS_RATIO = 5.0, 0.5, 10.0  # targets, at 256 px on 2 cores
TRAIN_STEPS = 12  # timed steps of the denoiser's training; the first ones warm up
WARM_UP = 2
COMPARED = 4  # triplets sampled both in their window and in the whole image
OVERRIDES = {"synthesize.mixture": {"diffusion": 1.0}}  # whatever the params say


def training_speed(
    images: NDArray[np.uint8], settings: DdpmTrainSettings, compute: Compute, scratch: Path, steps: int
) -> dict[str, float]:
    """Compare the FLOP/s of the real training loop with those of matrix products taken in turns with its steps.

    Every second is counted: drawing crops and noise, optimiser and moving average too. `efficiency` compares the best
    step with the best product (what the machine allows when nobody disturbs), `efficiency_median` the medians.

    Args:
        images: (N, 3, H, W) uint8.
    """
    alone = replace(settings, checkpoint_every=steps + WARM_UP + 1)
    resume = ResumePoint(scratch / "resume", "bench")
    flops = measure.count_flops(lambda: train_denoiser(images, replace(alone, steps=1), resume, compute))
    product = measure.matmul(compute)
    products: list[float] = []  # FLOP/s
    taken: list[float] = []  # seconds
    started = [time.perf_counter()]

    def between(_step: int, _metrics: Mapping[str, float]) -> None:
        measure.synchronise(compute.device)
        taken.append(time.perf_counter() - started[0])
        products.append(product())
        started[0] = time.perf_counter()

    train_denoiser(images, replace(alone, steps=steps + WARM_UP), resume, compute, between)
    best, middle = min(taken[WARM_UP:]), median(taken[WARM_UP:])
    fastest, usual = max(products), median(products)
    return {
        "step_gflop": flops / 1e9,
        "step_seconds": best,
        "step_seconds_median": middle,
        "achieved_gflops": flops / best / 1e9,
        "matmul_gflops": fastest / 1e9,
        "matmul_gflops_median": usual / 1e9,
        "efficiency": flops / best / fastest,
        "efficiency_median": flops / middle / usual,
    }


def synthesis_speed(maker: TripletGenerator, folder: TripletFolder, chunks: int) -> dict[str, float]:
    """Count triplets a second over whole chunks: drawing masks, sampling, blending and writing PNG files included."""
    maker.make(maker.chunk(FIT, 0)[0][:1])  # the first call starts threads and chooses kernels
    seconds, made, tried = [], [], 0
    for index in range(chunks):
        start = time.perf_counter()
        results = [triplet for batch in maker.chunk(FIT, index) for triplet in maker.make(batch)]
        visible = [triplet for triplet in results if triplet is not None]
        for triplet in visible:
            name = f"{FIT}-{index:02d}-{triplet.candidate.number:05d}"
            folder.write(name, triplet.normal, triplet.defect, triplet.mask)
        seconds.append(time.perf_counter() - start)
        made.append(len(visible))
        tried += len(results)
    return {
        "triplets_per_second": sum(made) / sum(seconds),
        "triplets_per_second_best": max(count / spent for count, spent in zip(made, seconds, strict=True)),
        "accepted": sum(made) / tried,
    }


def in_whole_image(candidate: Candidate) -> Candidate:
    """Make the same candidate (normal, mask, strength, start, opacity) sample its defect in the whole image."""
    outline = candidate.defect.outline
    whole = replace(outline, window=(0, 0, max(outline.mask.shape)))
    return replace(candidate, defect=replace(candidate.defect, outline=whole))


def local_against_whole(maker: TripletGenerator, compared: int) -> dict[str, Any]:
    """Compare what it costs to sample the defects of the first chunk in their windows and in their whole images.

    FLOPs are counted once a window size and summed over the chunk's defects; seconds are taken on `compared` of them,
    spread over the window sizes, each sampled alone.
    """
    drawn = sorted((candidate for batch in maker.chunk(FIT, 0) for candidate in batch), key=_side)
    windows = Counter(map(_side, drawn))
    one_of_side = {_side(item): item for item in drawn}
    flops = {side: measure.count_flops(partial(maker.make, [item])) for side, item in one_of_side.items()}
    whole = measure.count_flops(partial(maker.make, [in_whole_image(drawn[0])]))
    local = sum(flops[side] * count for side, count in windows.items())
    chosen = [drawn[place] for place in evenly(len(drawn), compared, 0.5)]
    local_seconds, whole_seconds = (
        sum(measure.seconds_of(partial(maker.make, [item]), maker.compute.device) for item in items)
        for items in (chosen, [in_whole_image(item) for item in chosen])
    )
    return {
        "defects": len(drawn),
        "windows": {str(side): count for side, count in windows.items()},
        "local_gflop": local / len(drawn) / 1e9,
        "whole_gflop": whole / 1e9,
        "flops_ratio": whole * len(drawn) / local,
        "compared": compared,
        "local_seconds": local_seconds,
        "whole_seconds": whole_seconds,
        "seconds_ratio": whole_seconds / local_seconds,
    }


def _side(candidate: Candidate) -> int:
    return candidate.defect.outline.window[2]


def provide_denoiser(layout: Layout, trained: Path, brief: int) -> str:
    """Put a denoiser where synthesize looks for it: the project's, if it fits the settings, or one trained briefly."""
    settings = layout.settings.ddpm_train
    config = trained / "config.json"
    if config.exists() and read_json(config)["ddpm-train"] == section_values(settings):
        shutil.copytree(trained, layout.stage(ddpm_train.STAGE))
        return "the project's"
    short = replace(layout.settings, ddpm_train=replace(settings, steps=brief, readiness_samples=4))
    ddpm_train.run(replace(layout, settings=short))
    return f"trained for {brief} steps"


def report(found: Mapping[str, Any]) -> str:
    """Write the figures in words."""
    ddpm, local, machine = found["ddpm"], found["local_against_whole"], measure.describe(found["machine"])
    lines = (
        f"{found['category']} at {found['image_size']} px; denoiser: {found['denoiser']}; {machine}",
        f"synthesis: {found['triplets_per_second']:.2f} triplets/s (best chunk "
        f"{found['triplets_per_second_best']:.2f}), {found['accepted']:.0%} of the candidates could be seen",
        f"training step of the denoiser: {ddpm['step_seconds']:.3f} s for {ddpm['step_gflop']:.2f} GFLOP = "
        f"{ddpm['achieved_gflops']:.1f} GFLOP/s, {ddpm['efficiency']:.0%} of a matrix product's "
        f"{ddpm['matmul_gflops']:.1f} (medians: {ddpm['efficiency_median']:.0%})",
        f"sampling in windows {local['windows']}: {local['local_gflop']:.2f} GFLOP a defect, in the whole image "
        f"{local['whole_gflop']:.2f}: {local['flops_ratio']:.1f} times; {local['compared']} of them took "
        f"{local['local_seconds']:.2f} and {local['whole_seconds']:.2f} s",
    )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and end with the JSON line."""
    options = measure.parser("synthesis", __doc__)
    options.add_argument("--steps", type=int, default=TRAIN_STEPS, help="timed training steps of the denoiser")
    options.add_argument("--chunks", type=int, default=2, help="timed chunks of 4 batches of candidates")
    options.add_argument("--compared", type=int, default=COMPARED, help="triplets sampled in the whole image too")
    chosen = options.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="flawsmith-bench-") as scratch:
        layout = measure.prepare(chosen, Path(scratch), OVERRIDES)
        compute = Compute.choose(layout.settings.compute)
        size = layout.settings.data.image_size
        found: dict[str, Any] = {"benchmark": "synthesis", "category": layout.category, "image_size": size}
        found["machine"] = measure.machine(compute)
        with compute.fast_math():
            trained = chosen.params.parent / "artifacts" / layout.category / ddpm_train.STAGE
            found["denoiser"] = provide_denoiser(layout, trained, chosen.steps)
            images = load_tiles(plan_tiles(layout.split().fit, layout.data), layout.data)
            ddpm = training_speed(images, layout.settings.ddpm_train, compute, layout.root, chosen.steps)
            maker = synthesize.build_generator(layout, compute)
            found |= {"ddpm": ddpm, **synthesis_speed(maker, TripletFolder(layout.root / "timed"), chosen.chunks)}
            found["local_against_whole"] = local_against_whole(maker, chosen.compared)
    local = found["local_against_whole"]["flops_ratio"]
    targets = [
        measure.Target("triplets per second", found["triplets_per_second"], TRIPLETS_PER_SECOND),
        measure.Target("training step over matmul speed", found["ddpm"]["efficiency"], EFFICIENCY),
        measure.Target("FLOPs saved by local sampling, times", local, FLOPS_RATIO),
    ]
    print(report(found), *(target.sentence() for target in targets), sep="\n")
    met = {target.name: {"value": target.value, "target": target.least, "met": target.is_met} for target in targets}
    measure.finish(found | {"targets": met})


if __name__ == "__main__":
    measure.guarded(main, "bench-synthesis")
