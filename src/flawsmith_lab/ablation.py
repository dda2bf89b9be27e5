"""What each part of a trained detector is worth: its labelled images judged again with the part changed or left out.

    python -m flawsmith_lab.ablation --category bottle

Parts are changed in the trained detector, nothing is trained again. Units of maps and score are set anew for each from
the calibration normals, as training does. Raw maps are kept in a folder, so that another idea how to fuse them is
judged in seconds. What is chosen by looking at the table is chosen on the research half of the test images.
"""

import argparse
import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from flawsmith.config import load_settings
from flawsmith.data.dataset import PARTS, load_tiles, plan_tiles
from flawsmith.data.tiling import Tiling
from flawsmith.detector.model import Detector, load_detector
from flawsmith.evaluation.measure import measure
from flawsmith.evaluation.metrics import KEYS
from flawsmith.evaluation.samples import evaluation_set, normal_samples
from flawsmith.evaluation.scoring import tiled_scorer
from flawsmith.files import atomic_file, digest_file, write_json
from flawsmith.layout import Layout
from flawsmith.randomness import numpy_generator
from flawsmith_lab.bench.measure import guarded
from flawsmith_lab.markdown import markdown

SHOWN = ("image_auroc", "pixel_auroc", "pixel_ap", "aupro")


class RawMaps:
    """A detector's raw maps by image. Each image is shown to it once, and never if the folder knows the answer."""

    def __init__(self, detector: Detector, folder: Path) -> None:
        self._detector, self._folder = detector, folder
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, images: NDArray[np.float32]) -> dict[str, Tensor]:
        """Images (B, 3, H, W) in [0, 1] → name → (B, 1, h, w)."""
        found = [self._of(image) for image in images]
        return {name: torch.cat([maps[name] for maps in found]) for name in self._detector.names}

    def _of(self, image: NDArray[np.float32]) -> dict[str, Tensor]:
        path = self._folder / f"{hashlib.sha256(image.tobytes()).hexdigest()}.safetensors"
        if not path.exists():
            with torch.inference_mode(), atomic_file(path) as temporary:
                maps = self._detector.raw_maps(torch.from_numpy(image[None]))
                save_file({name: part.contiguous() for name, part in maps.items()}, temporary)
        return load_file(path)


@dataclass(frozen=True)
class Variant:
    """A detector with one part changed, and whose raw maps it reads."""

    part: str
    detector: Detector
    raw: RawMaps

    def __call__(self, images: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Score images (B, 3, H, W) in [0, 1]."""
        with torch.inference_mode():
            maps, scores = self.detector.judge(self.raw(images), images.shape[-2:])
        return maps[:, 0].numpy(), scores.numpy()


@torch.no_grad()
def variants(detector: Detector, normals: NDArray[np.float32], folder: Path) -> list[Variant]:
    """The detector as trained, then with each part changed.

    Args:
        normals: the calibration normals, (N, 3, H, W) in [0, 1].
        folder: keeps the raw maps.
    """
    plain = copy.deepcopy(detector)
    for bank in plain.banks.values():
        bank.allowance.zero_()
    trained, unallowed = RawMaps(detector, folder / "trained"), RawMaps(plain, folder / "plain")

    def changed(part: str, change: Callable[[Detector], object], raw: RawMaps = trained) -> Variant:
        own, maps = copy.deepcopy(detector), raw(normals)
        own.fit_standard(maps)
        change(own)
        own.calibrate(own.standardise(maps))
        return Variant(part, own, raw)

    def one_unit(own: Detector) -> None:  # that of the inside, where most cells are
        own.map_mean.copy_(own.map_mean[:, -1:].expand_as(own.map_mean))
        own.map_deviation.copy_(own.map_deviation[:, -1:].expand_as(own.map_deviation))

    def weigh(*weights: float) -> Callable[[Detector], object]:
        return lambda own: own.weights.copy_(torch.tensor(weights))

    def count_head(share: float) -> Callable[[Detector], object]:
        return lambda own: own.head_share.fill_(share)

    remembering = [
        changed("no allowance: plain squared distances", id, unallowed),
        changed("memory_fine alone", weigh(1, 0)),
        changed("memory_coarse alone", weigh(0, 1)),
        changed("both memories alike", weigh(0.5, 0.5)),
        changed("student not trusted", lambda own: own.trust.zero_()),
        changed("student trusted whole", lambda own: own.trust.fill_(1)),
    ]
    return [
        changed("as trained", id),
        *(remembering if detector.banks else ()),
        changed("one unit a map, whatever the distance from the border", one_unit),
        changed("segmentation head without", count_head(0)),
        changed("segmentation head half", count_head(0.5)),
        changed("segmentation head alone", count_head(1)),
    ]


def ablate(layout: Layout, folder: Path, kept: Path) -> list[dict[str, Any]]:
    """Judge each of the `variants` of the detector in `folder`; return rows of `part` and each of KEYS.

    Args:
        kept: folder for raw maps, of whatever detector.

    Raises:
        UserError: there is no such detector; as `evaluation_set`.
    """
    data, settings, split = layout.data, layout.settings.evaluate, layout.split()
    judged, tiling, tiles = evaluation_set(layout), Tiling.of(data), plan_tiles(split.calibration, data)
    normals = np.divide(load_tiles(tiles, data), 255, dtype=np.float32)
    own = kept / layout.category / digest_file(folder / "detector.safetensors")[:20]
    changed = variants(load_detector(folder), normals, own)
    found = measure(
        [tiled_scorer(variant, tiling) for variant in changed],
        judged.samples,
        normal_samples(split.calibration, tiling, data.reading),
        numpy_generator(settings.seed, "bootstrap"),
        replace(settings, bootstrap=10),  # only the values are wanted
    )
    return [
        {"part": variant.part, **{key: round(performance.values[key].value, 5) for key in KEYS}}
        for variant, performance in zip(changed, found, strict=True)
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
    parser.add_argument("--kept", type=Path, default=Path("artifacts/.raw-maps"), help="folder for the raw maps")
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    given = parser.parse_args(arguments)
    replaced: dict[str, Any] = {"categories": [given.category], "evaluate.part": given.part, "seed": given.seed}
    if given.data is not None:
        replaced["data.root"] = str(given.data.resolve())
    layout = Layout(load_settings(given.params, replaced), given.category, given.params.parent)
    rows = ablate(layout, given.detector or layout.input("distill", "detector.safetensors").parent, given.kept)
    print(markdown(("part", *SHOWN), [(row["part"], *(f"{row[key]:.3f}" for key in SHOWN)) for row in rows]))
    if given.out is not None:
        write_json(given.out, {"category": layout.category, "rows": rows})


if __name__ == "__main__":
    guarded(main, "flawsmith")
