"""anomalib's PatchCore and STFPM beside flawsmith's kNN: same folders, split, teacher weights and metric code.

    python -m flawsmith_lab.bench.anomalib_side --python .venv-anomalib/bin/python [--category C] [--data DIR]
        [--weights FILE --backbone resnet18]                                              (make bench-anomalib)

anomalib lives in an environment of its own: images go there as arrays, anomaly maps come back, and the evaluation's own
code judges all of them on the same resamples. EfficientAD is timed only. The last line of stdout is JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import save_file

from flawsmith.data.dataset import load_tiles, plan_tiles
from flawsmith.data.images import to_uint8
from flawsmith.data.tiling import Tiling
from flawsmith.detector.teacher import build_teacher
from flawsmith.devices import Compute
from flawsmith.errors import FlawsmithError, UserError
from flawsmith.evaluation.assess import KEYS, Performance, measure, paired_difference
from flawsmith.evaluation.scoring import Item, Scorer, labelled_items, normal_items, open_spools, torch_scorer
from flawsmith.layout import Layout
from flawsmith.randomness import numpy_generator
from flawsmith.stages.evaluate import fit_baseline
from flawsmith_lab.bench import anomalib_runner
from flawsmith_lab.bench.measure import bench_settings, describe, finish, first_category, guarded, machine

MODELS = ("patchcore", "stfpm", "efficientad")
SHOWN = ("image_auroc", "pixel_auroc", "pixel_ap", "aupro")


def exchange(layout: Layout, items: Sequence[Item], folder: Path, request: dict[str, Any], limit: int) -> None:
    """Write what anomalib's side needs: images as bytes, the teacher's weights, the request."""
    data, split = layout.data, layout.split()
    fit = split.fit[:limit] if limit else split.fit
    for name, part in (("fit", fit), ("calibration", split.calibration)):
        np.save(folder / f"{name}.npy", load_tiles(plan_tiles(part, data), data))
    np.save(folder / "test.npy", np.stack([to_uint8(item.load()[0]).transpose(2, 0, 1) for item in items]))
    teacher = build_teacher(layout.settings.teacher, layout.root)
    save_file({key: value.contiguous() for key, value in teacher.body.state_dict().items()},
              folder / "teacher.safetensors")  # fmt: skip
    request |= {
        "backbone": layout.settings.teacher.backbone,
        "out_indices": list(layout.settings.teacher.out_indices),
        "mean": teacher.mean.flatten().tolist(),
        "std": teacher.std.flatten().tolist(),
        "batch": layout.settings.evaluate.batch,
    }
    (folder / "request.json").write_text(json.dumps(request))


def run_other_side(python: Path, folder: Path) -> dict[str, Any]:
    """Run anomalib in its own environment.

    Raises:
        UserError: there is no such Python.
        FlawsmithError: it failed; the message holds the last line it wrote.
    """
    if not python.is_file():
        raise UserError(f"{python} does not exist; `make bench-anomalib` sets that environment up, or name --python.")
    # -P: this folder's modules must not hide packages of the same name; no hub may be asked for anything
    done = subprocess.run(
        [python, "-P", str(Path(anomalib_runner.__file__).resolve()), str(folder)],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stdout=sys.stderr,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise FlawsmithError(f"anomalib's side failed with status {done.returncode}: {last}")
    answer: dict[str, Any] = json.loads((folder / "answer.json").read_text())
    return answer


def replay(folder: Path, name: str) -> Scorer:
    """What another program said of the calibration and then of the test images, as a `Scorer` asked in that order."""
    scores = np.load(folder / f"{name}.scores.npz", allow_pickle=False)

    def answers() -> Iterator[tuple[NDArray[np.float32], np.float32]]:
        for part in ("calibration", "test"):
            yield from zip(np.load(folder / f"{name}.{part}.npy", mmap_mode="r"), scores[part], strict=True)

    waiting = answers()

    def score(images: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        found = [next(waiting) for _ in images]
        return np.stack([item[0] for item in found]), np.asarray([item[1] for item in found], np.float32)

    return score


class Timed:
    """A `Scorer` that adds up its seconds."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer, self.seconds, self.images = scorer, 0.0, 0

    def __call__(self, images: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        start = time.perf_counter()
        answer = self._scorer(images)
        self.seconds += time.perf_counter() - start
        self.images += len(images)
        return answer


def compare(layout: Layout, python: Path, request: dict[str, Any], limit: int = 0) -> list[dict[str, Any]]:
    """One row a method: accuracy with its difference to kNN, seconds to fit and an image.

    Args:
        limit: fit on the first so many images only; 0 is all.

    Raises:
        UserError: the category has no labelled test set, images are cut into tiles, or `python` does not exist.
        FlawsmithError: anomalib's side failed.
    """
    everything, data, settings = layout.settings, layout.data, layout.settings.evaluate
    tiling = Tiling.of(data)
    if tiling.is_tiled:
        raise UserError("anomalib's side sees whole images alone; set data.scale to 0 to compare with it.")
    items = labelled_items(layout.surface().labelled_test(), tiling, data.reading)
    if not items:
        raise UserError(f"{layout.surface().folder} has no labelled test set, so nothing can be compared.")
    split = layout.split()
    with tempfile.TemporaryDirectory(prefix="flawsmith-anomalib-") as scratch:
        folder = Path(scratch)
        exchange(layout, items, folder, request, limit)
        answer = run_other_side(python, folder)
        start = time.perf_counter()
        baseline = fit_baseline(layout, list(split.fit[:limit] if limit else split.fit))
        knn = Timed(torch_scorer(baseline, Compute.choose(layout.settings.compute).device))
        fit_seconds = time.perf_counter() - start
        judged = [name for name in request["models"] if (folder / f"{name}.scores.npz").exists()]
        with open_spools(len(judged) + 2) as (masks, *maps):
            performances = measure(
                (knn, *(replay(folder, name) for name in judged)),
                items,
                normal_items(split.calibration, tiling, data.reading),
                numpy_generator(settings.seed, "bootstrap"),
                maps,
                masks,
                false_alarm_rate=settings.false_alarm_rate,
                bootstrap=settings.bootstrap,
                aupro_limit=settings.aupro_limit,
                batch=settings.batch,
            )
    seconds = {"fit_seconds": fit_seconds, "seconds_an_image": knn.seconds / knn.images}
    common = {
        "category": layout.category,
        "teacher": everything.teacher.backbone,
        "fit_images": limit or len(split.fit),
    }
    rows = [common | {"method": "knn", **seconds, **_accuracy(performances[0], performances[0])}]
    for name, performance in zip(judged, performances[1:], strict=True):
        rows.append(common | {"method": f"anomalib-{name}", **answer[name], **_accuracy(performance, performances[0])})
    timed_only = [name for name in request["models"] if name not in judged]
    rows += [common | {"method": f"anomalib-{name}", **answer[name]} for name in timed_only]
    return [row | {"anomalib": answer["anomalib"], "anomalib_torch": answer["torch"]} for row in rows]


def _accuracy(performance: Performance, knn: Performance) -> dict[str, Any]:
    values: dict[str, Any] = {key: performance.values[key].value for key in KEYS}
    for key in SHOWN:
        difference = paired_difference(performance, knn, key)
        values[f"{key}_minus_knn"] = [difference.value, difference.low, difference.high]
    return values


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown; a method that was timed only has no accuracy."""
    head = ("method", *SHOWN, "fit, s", "image, ms")
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for row in rows:
        accuracy = [f"{row[key]:.3f}" if key in row else "not judged" for key in SHOWN]
        cells = (row["method"], *accuracy, f"{row['fit_seconds']:.0f}", f"{1000 * row['seconds_an_image']:.0f}")
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare on one category, print the table, and end with the JSON line."""
    parser = argparse.ArgumentParser(
        prog="flawsmith_lab.bench.anomalib_side", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--python", type=Path, default=Path(".venv-anomalib/bin/python"), help="that has anomalib")
    parser.add_argument("--category", help="default: the first of --data, or of params.yaml")
    parser.add_argument("--data", type=Path, help="folder of categories; default: data.root of params.yaml")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--weights", type=Path, help="the teacher's weights; default: those of params.yaml")
    parser.add_argument("--backbone", help="timm name of the network that --weights belongs to")
    parser.add_argument("--models", default=",".join(MODELS), help="default: %(default)s")
    parser.add_argument("--coreset", type=float, default=0.01, help="share of patches PatchCore keeps (%(default)s)")
    parser.add_argument("--stfpm-epochs", type=int, default=100)
    parser.add_argument("--stfpm-batch", type=int, default=32)
    parser.add_argument("--stfpm-seconds", type=float, default=900.0, help="training stops then (%(default)s)")
    parser.add_argument("--limit", type=int, default=0, help="fit on the first so many images only; 0 is all")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(arguments)
    models = chosen.models.split(",")
    for name in models:
        if name not in MODELS:
            raise UserError(f"--models `{name}` is unknown; it may name {', '.join(MODELS)}.")
    if bool(chosen.weights) != bool(chosen.backbone):
        raise UserError("--weights and --backbone belong together; give both or neither.")
    replaced = (
        {"teacher.backbone": chosen.backbone, "teacher.weights": str(chosen.weights.resolve())}
        if chosen.weights
        else {}
    )
    if chosen.stfpm_seconds <= 0 or chosen.stfpm_epochs < 1:
        raise UserError("--stfpm-seconds and --stfpm-epochs must be above 0.")
    named = bench_settings(chosen.params, None, chosen.data).categories[0]
    category = chosen.category or first_category(chosen.data, named)
    settings = bench_settings(chosen.params, category, chosen.data, replaced)
    layout = Layout(settings, category, chosen.params.parent)
    found = machine(Compute.choose())
    request = {
        "models": models,
        "seed": chosen.seed,
        "coreset": chosen.coreset,
        "stfpm_epochs": chosen.stfpm_epochs,
        "stfpm_batch": chosen.stfpm_batch,
        "stfpm_seconds": chosen.stfpm_seconds,
    }
    rows = compare(layout, chosen.python, request, chosen.limit)
    print(f"{category} ({rows[0]['fit_images']} images to fit), teacher {rows[0]['teacher']}; {describe(found)}")
    print(table(rows))
    finish({"benchmark": "anomalib", "machine": found, "rows": rows})


if __name__ == "__main__":
    guarded(main, "bench-anomalib")
