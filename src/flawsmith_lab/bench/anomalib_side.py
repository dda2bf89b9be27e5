"""anomalib's PatchCore and STFPM beside flawsmith's PatchCore: same folders, split, teacher weights and metric code.

    python -m flawsmith_lab.bench.anomalib_side [--category C] [--data DIR]
        [--weights FILE --backbone resnet18]                                              (make bench-anomalib)

anomalib lives in an environment of its own: images go there as arrays, anomaly maps come back, and the evaluation's own
code judges all of them on the same resamples.
"""

import json
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
from flawsmith.errors import UserError
from flawsmith.evaluation.baseline import fit_baseline
from flawsmith.evaluation.measure import Performance, measure, paired_difference
from flawsmith.evaluation.metrics import KEYS
from flawsmith.evaluation.samples import Sample, labelled_samples, normal_samples
from flawsmith.evaluation.scoring import Scorer, torch_scorer
from flawsmith.layout import Layout
from flawsmith.randomness import numpy_generator
from flawsmith_lab.bench import anomalib_runner
from flawsmith_lab.bench.measure import (
    bench_settings,
    describe,
    finish,
    first_category,
    guarded,
    machine,
    parser,
    run_script,
)
from flawsmith_lab.markdown import markdown

MODELS = ("patchcore", "stfpm")
SHOWN = ("image_auroc", "pixel_auroc", "pixel_ap", "aupro")


def exchange(layout: Layout, items: Sequence[Sample], folder: Path, request: dict[str, Any]) -> None:
    """Write what anomalib's side needs: images as bytes, the teacher's weights, the request."""
    data, split = layout.data, layout.split()
    for name, part in (("fit", split.fit[: request["limit"]]), ("calibration", split.calibration)):
        np.save(folder / f"{name}.npy", load_tiles(plan_tiles(part, data), data))
    np.save(folder / "test.npy", np.stack([to_uint8(item.load()[0]).transpose(2, 0, 1) for item in items]))
    teacher = build_teacher(layout.settings.teacher, layout.root)
    state = {key: value.contiguous() for key, value in teacher.body.state_dict().items()}
    save_file(state, folder / "teacher.safetensors")
    content = request | {
        "backbone": layout.settings.teacher.backbone,
        "out_indices": list(layout.settings.teacher.out_indices),
        "mean": teacher.mean.flatten().tolist(),
        "std": teacher.std.flatten().tolist(),
        "batch": layout.settings.evaluate.batch,
    }
    (folder / "request.json").write_text(json.dumps(content))


def replay(folder: Path, name: str) -> Scorer:
    """Answer as another program did on the calibration and then the test images, asked in that order."""
    scores = np.load(folder / f"{name}.scores.npz", allow_pickle=False)

    def answers() -> Iterator[tuple[NDArray[np.float32], np.float32]]:
        for part in ("calibration", "test"):
            yield from zip(np.load(folder / f"{name}.{part}.npy", mmap_mode="r"), scores[part], strict=True)

    waiting = answers()

    def score(images: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        found = [next(waiting) for _ in images]
        return np.stack([item[0] for item in found]), np.asarray([item[1] for item in found], np.float32)

    return score


def compare(layout: Layout, python: Path, request: dict[str, Any]) -> list[dict[str, Any]]:
    """Fit and judge all methods; return one row each: accuracy, its difference to ours, seconds to fit and an image.

    `request` names `models`, the `limit` of images to fit on (None: all), and what anomalib's side asks for.

    Raises:
        UserError: the category has no labelled test set, or images are cut into tiles.
        FlawsmithError: anomalib's side failed.
    """
    data, settings, split = layout.data, layout.settings.evaluate, layout.split()
    tiling = Tiling.of(data)
    if tiling.is_tiled:
        raise UserError("anomalib's side sees whole images alone; set data.scale to 0 to compare with it.")
    items = labelled_samples(layout.surface().labelled_test(), tiling, data.reading)
    if not items:
        raise UserError(f"{layout.surface().folder} has no labelled test set, so nothing can be compared.")
    fit, names = split.fit[: request["limit"]], request["models"]
    with tempfile.TemporaryDirectory(prefix="flawsmith-anomalib-") as scratch:
        folder = Path(scratch)
        exchange(layout, items, folder, request)
        run_script(python, anomalib_runner.__file__, [folder], "anomalib's side")
        answer = json.loads((folder / "answer.json").read_text())
        start = time.perf_counter()
        device = Compute.choose(layout.settings.compute).device
        baseline = torch_scorer(fit_baseline(layout, fit, device), device)
        ours = {"fit_seconds": time.perf_counter() - start, "seconds_an_image": 0.0}
        seen = len(items) + len(split.calibration)

        def timed(images: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
            start = time.perf_counter()
            found = baseline(images)
            ours["seconds_an_image"] += (time.perf_counter() - start) / seen
            return found

        performances = measure(
            (timed, *(replay(folder, name) for name in names)),
            items,
            normal_samples(split.calibration, tiling, data.reading),
            numpy_generator(settings.seed, "bootstrap"),
            settings,
        )
    common = {"category": layout.category, "teacher": layout.settings.teacher.backbone, "fit_images": len(fit),
              "anomalib": answer["anomalib"], "anomalib_torch": answer["torch"]}  # fmt: skip
    methods = {"patchcore": ours, **{f"anomalib-{name}": answer[name] for name in names}}
    return [
        common | {"method": method, **costs, **_accuracy(performance, performances[0])}
        for (method, costs), performance in zip(methods.items(), performances, strict=True)
    ]


def _accuracy(performance: Performance, ours: Performance) -> dict[str, Any]:
    values: dict[str, Any] = {key: performance.values[key].value for key in KEYS}
    for key in SHOWN:
        difference = paired_difference(performance, ours, key)
        values[f"{key}_minus_patchcore"] = [difference.value, difference.low, difference.high]
    return values


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare on one category, print the table, and end with the JSON line.

    Raises:
        UserError: an option makes no sense; as `compare`.
    """
    options = parser("anomalib_side", __doc__)
    options.add_argument("--python", type=Path, default=Path(".venv-anomalib/bin/python"), help="that has anomalib")
    options.add_argument("--weights", type=Path, help="the teacher's weights; default: those of params.yaml")
    options.add_argument("--backbone", help="timm name of the network that --weights belongs to")
    options.add_argument("--models", default=",".join(MODELS), help="default: %(default)s")
    options.add_argument("--coreset", type=float, default=0.01, help="share of patches PatchCore keeps (%(default)s)")
    options.add_argument("--stfpm-epochs", type=int, default=100)
    options.add_argument("--stfpm-batch", type=int, default=32)
    options.add_argument("--stfpm-seconds", type=float, default=900.0, help="training stops then (%(default)s)")
    options.add_argument("--limit", type=int, help="fit on the first so many images only; default: all")
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args(arguments)
    chosen.models = chosen.models.split(",")
    for name in chosen.models:
        if name not in MODELS:
            raise UserError(f"--models `{name}` is unknown; it may name {', '.join(MODELS)}.")
    if bool(chosen.weights) != bool(chosen.backbone):
        raise UserError("--weights and --backbone belong together; give both or neither.")
    if chosen.stfpm_seconds <= 0 or chosen.stfpm_epochs < 1:
        raise UserError("--stfpm-seconds and --stfpm-epochs must be above 0.")
    if not chosen.python.is_file():
        raise UserError(
            f"{chosen.python} does not exist; `make bench-anomalib` sets that environment up, or name --python."
        )
    replaced = {}
    if chosen.weights:
        replaced = {"teacher.backbone": chosen.backbone, "teacher.weights": str(chosen.weights.resolve())}
    named = bench_settings(chosen.params, None, chosen.data).categories[0]
    category = chosen.category or first_category(chosen.data, named)
    settings = bench_settings(chosen.params, category, chosen.data, replaced)
    asked = ("models", "limit", "seed", "coreset", "stfpm_epochs", "stfpm_batch", "stfpm_seconds")
    request = {name: getattr(chosen, name) for name in asked}
    found = machine(Compute.choose())
    rows = compare(Layout(settings, category, chosen.params.parent), chosen.python, request)
    print(f"{category} ({rows[0]['fit_images']} images to fit), teacher {rows[0]['teacher']}; {describe(found)}")
    shown = [[row["method"], *(f"{row[key]:.3f}" for key in SHOWN), f"{row['fit_seconds']:.0f}",
              f"{1000 * row['seconds_an_image']:.0f}"] for row in rows]  # fmt: skip
    print(markdown(("method", *SHOWN, "fit, s", "image, ms"), shown))
    finish({"benchmark": "anomalib", "machine": found, "rows": rows})


if __name__ == "__main__":
    guarded(main, "bench-anomalib")
