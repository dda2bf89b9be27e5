"""What each part of a trained detector is worth: its labelled images judged again with the part changed or left out.

    python -m flawsmith_lab.ablation --category bottle

Parts are changed in the trained detector, nothing is trained again. Units of maps and score are set anew for each from
the calibration normals, as training does. What is chosen by looking at the table is chosen on the research half of the
test images.
"""

import argparse
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flawsmith.config import load_settings
from flawsmith.data.dataset import PARTS, load_tiles, plan_tiles
from flawsmith.data.tiling import Tiling
from flawsmith.detector.model import Detector, load_detector
from flawsmith.detector.teacher import as_batch
from flawsmith.evaluation.measure import measure
from flawsmith.evaluation.metrics import KEYS
from flawsmith.evaluation.samples import evaluation_set, normal_samples
from flawsmith.evaluation.scoring import Scorer, tiled_scorer
from flawsmith.files import write_json
from flawsmith.layout import Layout
from flawsmith.randomness import numpy_generator
from flawsmith.sequences import batched
from flawsmith_lab.bench.measure import guarded
from flawsmith_lab.markdown import markdown

SHOWN = ("image_auroc", "pixel_auroc", "pixel_ap", "aupro")
BATCH = 8


@torch.no_grad()
def variants(detector: Detector, normals: Sequence[Tensor]) -> Iterator[tuple[str, Detector]]:
    """Yield what was changed, and a detector changed so.

    Args:
        normals: batches (B, 3, H, W) in [0, 1] of the calibration normals.
    """

    def changed(change: Callable[[Detector], object], before_units: Callable[[Detector], object] = id) -> Detector:
        own = copy.deepcopy(detector)
        before_units(own)
        raw = [own.raw_maps(batch) for batch in normals]
        maps = {name: torch.cat([part[name] for part in raw]) for name in own.names}
        own.fit_standard(maps)
        change(own)
        own.calibrate(own.standardise(maps))
        return own

    def one_unit(own: Detector) -> None:  # that of the inside, where most cells are
        own.map_mean.copy_(own.map_mean[:, -1:].expand_as(own.map_mean))
        own.map_deviation.copy_(own.map_deviation[:, -1:].expand_as(own.map_deviation))

    def allow_nothing(own: Detector) -> None:
        for bank in own.banks.values():
            bank.allowance.zero_()

    def weigh(*weights: float) -> Callable[[Detector], object]:
        return lambda own: own.weights.copy_(torch.tensor(weights))

    yield "as trained", changed(id)
    if detector.banks:
        yield "no allowance: plain squared distances", changed(id, allow_nothing)
        yield "memory_fine alone", changed(weigh(1, 0))
        yield "memory_coarse alone", changed(weigh(0, 1))
        yield "both memories alike", changed(weigh(0.5, 0.5))
    yield "one unit a map, whatever the distance from the border", changed(one_unit)
    yield "student not trusted", changed(lambda own: own.trust.zero_())
    yield "student trusted whole", changed(lambda own: own.trust.fill_(1))
    for share, what in ((0.0, "without"), (0.5, "half"), (1.0, "alone")):
        yield f"segmentation head {what}", changed(lambda own, share=share: own.head_share.fill_(share))  # type: ignore[misc]


def scorer_of(detector: Detector) -> Scorer:
    """Score images (B, 3, H, W) in [0, 1]."""

    def score(images: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        with torch.inference_mode():
            maps, scores = detector(torch.from_numpy(images))
        return maps[:, 0].numpy(), scores.numpy()

    return score


def ablate(layout: Layout, folder: Path) -> list[dict[str, Any]]:
    """Judge each of the `variants` of the detector in `folder`; return rows of `part` and each of KEYS.

    Raises:
        UserError: there is no such detector; as `evaluation_set`.
    """
    data, settings, split = layout.data, layout.settings.evaluate, layout.split()
    judged, tiling, tiles = evaluation_set(layout), Tiling.of(data), plan_tiles(split.calibration, data)
    normals = [as_batch(load_tiles(part, data), torch.device("cpu")) for part in batched(tiles, BATCH)]
    names, detectors = zip(*variants(load_detector(folder), normals), strict=True)
    found = measure(
        [tiled_scorer(scorer_of(detector), tiling) for detector in detectors],
        judged.samples,
        normal_samples(split.calibration, tiling, data.reading),
        numpy_generator(settings.seed, "bootstrap"),
        replace(settings, bootstrap=10),  # only the values are wanted
    )
    return [
        {"part": name, **{key: round(performance.values[key].value, 5) for key in KEYS}}
        for name, performance in zip(names, found, strict=True)
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, and write the rows where asked."""
    parser = argparse.ArgumentParser(prog="flawsmith_lab.ablation", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--category", required=True)
    parser.add_argument("--data", type=Path, help="folder of the categories; default: data.root")
    parser.add_argument("--detector", type=Path, help="folder of a trained detector; default: the pipeline's own")
    parser.add_argument("--part", default="research", choices=PARTS)
    parser.add_argument("--seed", type=int, default=0, help="the study's seed, which splits the normals")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    given = parser.parse_args(arguments)
    replaced: dict[str, Any] = {"categories": [given.category], "evaluate.part": given.part, "seed": given.seed}
    if given.data is not None:
        replaced["data.root"] = str(given.data.resolve())
    layout = Layout(load_settings(given.params, replaced), given.category, given.params.parent)
    rows = ablate(layout, given.detector or layout.input("distill", "detector.safetensors").parent)
    print(markdown(("part", *SHOWN), [(row["part"], *(f"{row[key]:.3f}" for key in SHOWN)) for row in rows]))
    if given.out is not None:
        write_json(given.out, {"category": layout.category, "rows": rows})


if __name__ == "__main__":
    guarded(main, "flawsmith")
