"""What each map of a trained detector is worth: its labelled images judged again under other weights of the maps.

    python -m flawsmith_lab.study.maps --category bottle --weights 1,1,0,0,2:1,1,0,2,0 --weights 0,0,0,0,1

One pass of the network answers for all weights, since these decide only how its raw maps are summed; the normalisation
of maps and scores is found anew for each on the calibration normals, as training does. No setting is chosen here, and
what is chosen by looking at it is chosen on the research half.
"""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flawsmith.data.dataset import PARTS, load_tiles, plan_tiles
from flawsmith.data.tiling import Tiling
from flawsmith.detector.distill import as_batch
from flawsmith.detector.model import Detector, load_detector
from flawsmith.errors import UserError
from flawsmith.evaluation.assess import KEYS, measure
from flawsmith.evaluation.scoring import Scorer, normal_items, open_spools, tiled_scorer
from flawsmith.files import write_json
from flawsmith.layout import Layout
from flawsmith.randomness import numpy_generator
from flawsmith.settings import load_settings
from flawsmith.stages.evaluate import judged_images
from flawsmith_lab.bench.measure import guarded

Weights = tuple[float, ...]


@dataclass(frozen=True)
class Weighing:
    """Weights of the anomaly map and of the image score, one a map in the order of `Detector.raw_maps`."""

    map_weights: Weights
    score_weights: Weights

    @classmethod
    def parse(cls, text: str) -> "Weighing":
        """`W,W,...` for both, or `W,W,...:W,W,...`.

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
        return cls(map_weights, score_weights)

    def __str__(self) -> str:
        sides = (
            (self.map_weights,) if self.map_weights == self.score_weights else (self.map_weights, self.score_weights)
        )
        return ":".join(",".join(f"{weight:g}" for weight in side) for side in sides)


class Weighings:
    """One detector under several weights of its maps, as scorers that share the network's pass over a batch."""

    def __init__(self, detector: Detector, calibration: Iterable[Tensor]) -> None:
        """`calibration`: batches (B, 3, S, S) of the calibration normals."""
        self.detector = detector
        with torch.inference_mode():
            self._normal = [detector.raw_maps(batch) for batch in calibration]
        self._seen: NDArray[np.float32] | None = None
        self._raw = torch.empty(0)

    def scorer(self, weighing: Weighing) -> Scorer:
        """The detector with its maps weighed as given.

        Raises:
            UserError: the weights are not as many as the maps, or add up to nothing.
        """
        detector = self.detector
        count = len(detector.map_weights)
        for weights in (weighing.map_weights, weighing.score_weights):
            if len(weights) != count or sum(weights) <= 0 or min(weights) < 0:
                raise UserError(
                    f"--weights {weighing}: this detector has {count} maps; give as many weights of 0 or more, not all "
                    "0."
                )
        chosen = [torch.tensor(weights) / sum(weights) for weights in (weighing.map_weights, weighing.score_weights)]
        decided = (detector.map_weights, detector.score_weights, detector.score_mean, detector.score_std)
        for kept, value in zip(decided, chosen, strict=False):
            kept.copy_(value)
        detector.normalise(self._normal)
        normal = detector.score_mean.clone(), detector.score_std.clone()

        def score(images: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
            with torch.inference_mode():
                for kept, value in zip(decided, (*chosen, *normal), strict=True):
                    kept.copy_(value)
                maps, scores = detector.answer(self._maps(images), torch.Size(images.shape[-2:]))
            return maps[:, 0].numpy(), scores.numpy()

        return score

    def _maps(self, images: NDArray[np.float32]) -> Tensor:
        if images is not self._seen:  # without tiles every scorer is handed the same batch in turn
            self._seen, self._raw = images, self.detector.raw_maps(torch.from_numpy(images))
        return self._raw


@dataclass(frozen=True)
class Request:
    """What to weigh: a trained detector's folder, whose images, and the weights."""

    layout: Layout
    detector: Path
    weighings: tuple[Weighing, ...]


def weigh_maps(request: Request) -> list[dict[str, Any]]:
    """One row for each of the weights: `weights` and each of KEYS.

    Raises:
        UserError: there is no such detector, or weights do not fit it; as `judged_images`.
    """
    layout = request.layout
    data, settings, split = layout.data, layout.settings.evaluate, layout.split()
    judged = judged_images(layout)
    detector = load_detector(request.detector)
    tiles, tiling = plan_tiles(split.calibration, data), Tiling.of(data)
    weighings = Weighings(
        detector,
        (
            as_batch(load_tiles(tiles[first : first + 8], data), torch.device("cpu"))
            for first in range(0, len(tiles), 8)
        ),
    )
    scorers = [tiled_scorer(weighings.scorer(weighing), tiling) for weighing in request.weighings]
    with open_spools(len(scorers) + 1) as (*maps, masks):
        found = measure(
            scorers,
            judged.items,
            normal_items(split.calibration, tiling, data.reading),
            numpy_generator(settings.seed, "bootstrap"),
            maps,
            masks,
            false_alarm_rate=settings.false_alarm_rate,
            bootstrap=2,  # only the values are wanted
            aupro_limit=settings.aupro_limit,
            batch=settings.batch,
        )
    return [
        {"weights": str(weighing), **{key: round(performance.values[key].value, 5) for key in KEYS}}
        for weighing, performance in zip(request.weighings, found, strict=True)
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    keys = ("image_auroc", "pixel_auroc", "pixel_ap", "aupro")
    lines = [f"| weights | {' | '.join(keys)} |", "|---" * (len(keys) + 1) + "|"]
    lines += [f"| {row['weights']} | {' | '.join(f'{row[key]:.3f}' for key in keys)} |" for row in rows]
    return "\n".join(lines)


def parse_request(arguments: Sequence[str] | None = None) -> tuple[Request, Path | None]:
    """The command line's request, and where to write the rows.

    Raises:
        UserError: a value is not usable.
    """
    parser = argparse.ArgumentParser(description="What each map of a trained detector is worth.")
    parser.add_argument("--category", required=True)
    parser.add_argument("--data", type=Path, help="folder of the categories; default: data.root")
    parser.add_argument("--detector", type=Path, help="folder of a trained detector; default: the pipeline's own")
    parser.add_argument("--part", default="research", choices=PARTS)
    parser.add_argument("--seed", type=int, default=0, help="the study's seed, which splits the normals")
    parser.add_argument(
        "--weights",
        action="append",
        required=True,
        metavar="W,W,...[:W,W,...]",
        help="of map and score, or of the map:of the score; repeatable",
    )
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    given = parser.parse_args(arguments)
    replaced: dict[str, Any] = {"categories": [given.category], "evaluate.part": given.part}
    replaced |= {"data.split_seed": given.seed, "evaluate.seed": given.seed}
    if given.data is not None:
        replaced["data.root"] = str(given.data.resolve())
    layout = Layout(load_settings(given.params, replaced), given.category, given.params.parent)
    detector = given.detector or layout.input("distill", "detector.safetensors").parent
    return Request(layout, detector, tuple(map(Weighing.parse, given.weights))), given.out


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, and write the rows where asked."""
    request, out = parse_request(arguments)
    rows = weigh_maps(request)
    print(table(rows))
    if out is not None:
        write_json(out, {"category": request.layout.category, "rows": rows})


if __name__ == "__main__":
    guarded(main, "flawsmith")
