"""Commands of the pipeline: demo data, and one a stage."""

from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from flawsmith.cli.common import (
    DEFAULT_PARAMS,
    STAGE_PANEL,
    STUDY_PANEL,
    CategoryOption,
    ParamsOption,
    SetOption,
    app,
    parse_overrides,
    read_layouts,
    read_settings,
)
from flawsmith.errors import UserError
from flawsmith.processes import is_main_process, world_size

STAGES: dict[str, str] = {
    "ddpm-train": "Learn how the normal surface looks: a diffusion model of train/good.",
    "synthesize": "Make triplets (normal, defect, mask) with the disturbed reverse process.",
    "validate": "The quality gate: measure every triplet, write Data Docs, stop if a critical bound is broken.",
    "distill": "Train the student against the frozen teacher, then the heads that read where the two disagree.",
    "evaluate": "Score the labelled test set, set the threshold, write metrics, figures and report.html.",
    "export": "Write model.onnx and prove that it decides as the trained detector does.",
}


@app.command("demo-data", rich_help_panel=STAGE_PANEL)
def demo_data(
    surface: Annotated[
        list[str] | None,
        typer.Option("--surface", metavar="NAME", help="brushed_metal or woven_fabric. Default: those in params."),
    ] = None,
    if_category: Annotated[
        bool,
        typer.Option("--if-category", help="Only if it is one of `categories`, else an empty folder (as DVC asks)."),
    ] = False,
    params: ParamsOption = DEFAULT_PARAMS,
    overrides: SetOption = None,
) -> None:
    """Render the embedded surfaces into data/SURFACE: normal images and a labelled test set."""
    from flawsmith.demo.render import KINDS

    settings = read_settings(params, overrides)
    names = surface or [name for name in settings.categories if name in KINDS]
    if not names:
        raise UserError(
            f"{params}: `categories` names no embedded surface ({', '.join(KINDS)}); name one with --surface."
        )
    run = import_module("flawsmith.stages.demo_data").run
    for name in dict.fromkeys(names):
        run(settings, params.parent, name, if_category)


@app.command("settings", rich_help_panel=STAGE_PANEL)
def write_settings(
    category: CategoryOption = None, params: ParamsOption = DEFAULT_PARAMS, overrides: SetOption = None
) -> None:
    """Write what params.yaml says for each category, with its overrides: what the stages depend on in dvc.yaml."""
    from flawsmith.stages.settings import run

    for layout in read_layouts(params, category, overrides):
        run(layout)


@app.command(rich_help_panel=STUDY_PANEL)
def quick(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Good images, or a category with train/good and perhaps test.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="DIR", help="Replaced as a whole. Default: artifacts/NAME/quick."),
    ] = None,
    params: ParamsOption = DEFAULT_PARAMS,
    overrides: SetOption = None,
) -> None:
    """A first look, in minutes: good images to model.onnx and report.html, with memories alone and no training.

    Without params.yaml here all settings have their defaults. On a slow machine choose from fewer patches: --set
    distill.memory_candidates=60000.

    Example: flawsmith quick photos/of/good/parts --out first
    """
    from flawsmith.config import default_settings
    from flawsmith.data.bare import name_folder
    from flawsmith.progress import stage as shown

    is_default = params == DEFAULT_PARAMS and not params.exists()
    settings = default_settings(parse_overrides(overrides or [])) if is_default else read_settings(params, overrides)
    run = import_module("flawsmith.stages.quick").run
    with shown("quick", name_folder(folder), (1, 1)):
        place = run(settings, params.parent, folder, out)
    print(f"Quick look, nothing was trained. Report: {place / 'report.html'}; model: {place / 'model.onnx'}")


def _add_stage(name: str, meaning: str) -> None:
    def stage(
        category: CategoryOption = None, params: ParamsOption = DEFAULT_PARAMS, overrides: SetOption = None
    ) -> None:
        layouts = read_layouts(params, category, overrides)
        if world_size() > 1 and name != "ddpm-train":
            raise UserError(f"Several processes can share ddpm-train alone; run `flawsmith {name}` without a launcher.")
        run = import_module(f"flawsmith.stages.{name.replace('-', '_')}").run
        from flawsmith.progress import stage as shown

        place = list(STAGES).index(name) + 1, len(STAGES)
        for layout in layouts:
            with shown(name, layout.category, place, is_main_process()):
                run(layout.as_recorded())

    app.command(name, help=meaning, rich_help_panel=STAGE_PANEL)(stage)


for _name, _meaning in STAGES.items():
    _add_stage(_name, _meaning)
