"""The command `flawsmith study`. It imports the laboratory only when it runs, so that `flawsmith --help` stays fast."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from flawsmith.cli.common import DEFAULT_PARAMS, ParamsOption, SetOption, comma_list, parse_overrides
from flawsmith.errors import UserError


def study(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Results, report, and the store of stages.")],
    data: Annotated[
        Path | None, typer.Option("--data", metavar="DIR", help="Folder of the categories. Default: data.root.")
    ] = None,
    categories: Annotated[
        list[str] | None,
        typer.Option("--categories", "-c", metavar="A,B", help="Folders of DIR. Default: all of params."),
    ] = None,
    seeds: Annotated[str, typer.Option(metavar="0,1,2", help="Each seeds the split and every stage at once.")] = "0",
    methods: Annotated[
        list[str] | None,
        typer.Option(
            metavar="A,B",
            help="Of flawsmith, no-diffusion, random-mask, cutpaste, pieces, patchcore. Default: flawsmith,patchcore.",
        ),
    ] = None,
    overrides: SetOption = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SECTION.KEY=V1,V2",
            help="A row for each value, e.g. distill.head_steps=60,120 or synthesize.strength=[0.1,0.1],[0.4,0.4]. "
            "Repeatable: every combination.",
        ),
    ] = None,
    part: Annotated[
        list[str] | None,
        typer.Option(
            "--part", metavar="A,B", help="Judge on all, research or report images, or several. Default: all."
        ),
    ] = None,
    reference: Annotated[
        str, typer.Option(metavar="NAME", help="Method or row to compare with. Default: patchcore, else the first row.")
    ] = "",
    workers: Annotated[
        int, typer.Option(metavar="N", help="Stages run at once; their times then say less.", min=1)
    ] = 1,
    params: ParamsOption = DEFAULT_PARAMS,
) -> None:
    """Run the pipeline for many categories, seeds, methods and settings; compare them in one report.

    Nothing is computed twice: a stage runs once for all cells that agree in what decides it, and a stopped study goes
    on when called again. Exit 1 if a cell failed; its reason is in the report.

    Example: flawsmith study --categories brushed_metal --seeds 0,1,2 --methods flawsmith,patchcore --out study
    """
    from flawsmith_lab.study.plan import Request, parse_grid
    from flawsmith_lab.study.study import run_study

    try:
        numbers = tuple(int(seed) for seed in comma_list([seeds]))
    except ValueError as error:
        raise UserError(
            f"--seeds {seeds}: write whole numbers with commas between them, e.g. --seeds 0,1,2."
        ) from error
    request = Request(
        params=params,
        out=out,
        data=data,
        categories=comma_list(categories),
        seeds=numbers,
        methods=comma_list(methods) or ("flawsmith", "patchcore"),
        parts=comma_list(part) or ("all",),
        replaced=parse_overrides(overrides or []),
        grid=parse_grid(grid or []),
        reference=reference,
    )
    done = run_study(request, workers, shlex.join(["flawsmith", *sys.argv[1:]]))
    print(f"{done.cells - done.failed} of {done.cells} cells have results. Report: {done.report}")
    if done.failed:
        raise typer.Exit(1)
