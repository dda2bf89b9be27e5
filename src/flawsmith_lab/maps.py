"""What each map of a trained detector is worth: its labelled images judged again under other weights of the maps.

    python -m flawsmith_lab.maps --category bottle --weights 1,1,0,0,2:1,1,0,2,0 --weights 0,0,0,0,1

Weights only decide how the network's raw maps are summed, so one pass over an image answers for all of them. Maps and
scores are normalised anew for each on the calibration normals, as training does. What is chosen by looking at the table
is chosen on the research half of the test images.
"""

import argparse
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
from flawsmith.errors import UserError
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


@dataclass(frozen=True)
class Weighing:
    """Weights of the anomaly map and of the image score, one a map in the order of `Detector.raw_maps`."""

    text: str
    map_weights: tuple[float, ...]
    score_weights: tuple[float, ...]

    @classmethod
    def parse(cls, text: str) -> "Weighing":
        """Read `W,W,...` for both, or `W,W,...:W,W,...`.

        Raises:
            UserError: it is neither.
        """
        try:
            given = [tuple(float(part) for part in side.split(",")) for side in text.split(":")]
            map_weights, score_weights = given * 2 if len(given) == 1 else given
        except ValueError as error:
            raise UserError(
                f"--weights {text}: write numbers with commas between them, e.g. --weights 1,1,0,0,2, or with a colon "
                "those of the map and those of the score."
            ) from error
        return cls(text, map_weights, score_weights)


def scorers_of(
    detector: Detector, weighings: Sequence[Weighing], calibration: Sequence[Tensor]
) -> list[Callable[[NDArray[np.float32]], Any]]:
    """Make a scorer for each of the weights; all share the network's pass over a batch that is handed to them in turn.

    `calibration` holds batches (B, 3, H, W) of the calibration normals.

    Raises:
        UserError: the weights are not as many as the maps, or add up to nothing.
    """
    with torch.inference_mode():
        normal = [detector.raw_maps(batch) for batch in calibration]
    last: dict[str, Any] = {"images": None}

    def scorer(weighing: Weighing) -> Scorer:
        own = copy.deepcopy(detector)
        for weights, kept in ((weighing.map_weights, own.map_weights), (weighing.score_weights, own.score_weights)):
            if len(weights) != len(kept) or sum(weights) <= 0 or min(weights) < 0:
                raise UserError(
                    f"--weights {weighing.text}: this detector has {len(kept)} maps; give as many weights of 0 or "
                    "more, not all 0."
                )
            kept.copy_(torch.tensor(weights) / sum(weights))
        own.normalise(normal)

        def score(images: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
            with torch.inference_mode():
                if last["images"] is not images:
                    last.update(images=images, raw=detector.raw_maps(torch.from_numpy(images)))
                maps, scores = own.answer(last["raw"], torch.Size(images.shape[-2:]))
            return maps[:, 0].numpy(), scores.numpy()

        return score

    return [scorer(weighing) for weighing in weighings]


def weigh_maps(layout: Layout, folder: Path, weighings: Sequence[Weighing]) -> list[dict[str, Any]]:
    """Judge the detector in `folder` under each of the weights; return rows of `weights` and each of KEYS.

    Raises:
        UserError: there is no such detector, or weights do not fit it; as `evaluation_set`.
    """
    data, settings, split = layout.data, layout.settings.evaluate, layout.split()
    judged = evaluation_set(layout)
    tiling, tiles = Tiling.of(data), plan_tiles(split.calibration, data)
    batches = [as_batch(load_tiles(part, data), torch.device("cpu")) for part in batched(tiles, 8)]
    scorers = [tiled_scorer(scorer, tiling) for scorer in scorers_of(load_detector(folder), weighings, batches)]
    found = measure(
        scorers,
        judged.samples,
        normal_samples(split.calibration, tiling, data.reading),
        numpy_generator(settings.seed, "bootstrap"),
        replace(settings, bootstrap=10),  # only the values are wanted
    )
    return [
        {"weights": weighing.text, **{key: round(performance.values[key].value, 5) for key in KEYS}}
        for weighing, performance in zip(weighings, found, strict=True)
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, and write the rows where asked."""
    parser = argparse.ArgumentParser(prog="flawsmith_lab.maps", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--category", required=True)
    parser.add_argument("--data", type=Path, help="folder of the categories; default: data.root")
    parser.add_argument("--detector", type=Path, help="folder of a trained detector; default: the pipeline's own")
    parser.add_argument("--part", default="research", choices=PARTS)
    parser.add_argument("--seed", type=int, default=0, help="the study's seed, which splits the normals")
    parser.add_argument("--weights", action="append", required=True, metavar="W,W,...[:W,W,...]",
                        help="of map and score, or of the map:of the score; repeatable")  # fmt: skip
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    given = parser.parse_args(arguments)
    weighings = [Weighing.parse(text) for text in given.weights]
    replaced: dict[str, Any] = {"categories": [given.category], "evaluate.part": given.part, "seed": given.seed}
    if given.data is not None:
        replaced["data.root"] = str(given.data.resolve())
    layout = Layout(load_settings(given.params, replaced), given.category, given.params.parent)
    detector = given.detector or layout.input("distill", "detector.safetensors").parent
    rows = weigh_maps(layout, detector, weighings)
    print(markdown(("weights", *SHOWN), [(row["weights"], *(f"{row[key]:.3f}" for key in SHOWN)) for row in rows]))
    if given.out is not None:
        write_json(given.out, {"category": layout.category, "rows": rows})


if __name__ == "__main__":
    guarded(main, "flawsmith")
