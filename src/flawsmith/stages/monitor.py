"""monitor: new images beside those that the category's champion was calibrated on.

flawsmith monitor FOLDER --category C. No stage of dvc.yaml: it looks at production and makes nothing that others read.
"""

from contextlib import ExitStack
from pathlib import Path

from flawsmith.errors import UserError
from flawsmith.inference.predictor import Predictor
from flawsmith.inference.sources import find_images
from flawsmith.layout import Layout
from flawsmith.monitoring.folder import MonitorOutcome, Watcher, monitor_folder
from flawsmith.monitoring.reference import load_reference

MODEL, REFERENCE = "model.onnx", "reference.npz"  # names in a registered version


def run(
    layout: Layout, folder: Path, out: Path, model: Path | None = None, reference: Path | None = None
) -> MonitorOutcome:
    """Watch a folder with the category's champion, or with a model and the reference measured with it.

    Raises:
        UserError: as `monitor_folder`; only one of `model` and `reference` is given; there is no champion.
    """
    if (model is None) != (reference is None):
        raise UserError("--model and --reference belong together; give both, or neither to use the champion.")
    find_images([folder], leave_out=out)  # before anything slow: a wrong path is the commonest mistake
    with ExitStack() as stack:
        if model is None or reference is None:
            from flawsmith.registry.promotion import fetch_champion  # a model of one's own needs no registry

            champion = stack.enter_context(fetch_champion(layout))
            name = f"{champion.model} version {champion.version}"
            model, reference = champion.folder / MODEL, champion.folder / REFERENCE
        else:
            name = model.name
        predictor, known = Predictor(model), load_reference(reference)
        if predictor.metadata.category != layout.category:
            raise UserError(
                f"{model} was made for the category '{predictor.metadata.category}', not '{layout.category}'; "
                "name the model's own with --category."
            )
        from flawsmith.detector.teacher import build_teacher

        teacher = build_teacher(layout.settings.teacher, layout.root)
        settings = layout.settings
        watcher = Watcher(predictor, teacher, known, name)
        return monitor_folder(watcher, folder, out, settings.monitor, settings.data.reading.max_pixels)
