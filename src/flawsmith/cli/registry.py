"""Commands of the registry: register, promote, rollback, history."""

import dataclasses
from typing import Annotated

import typer

from flawsmith.cli.common import (
    DEFAULT_PARAMS,
    REGISTRY_PANEL,
    DryRunOption,
    JsonOption,
    OneCategoryOption,
    ParamsOption,
    SetOption,
    app,
    print_answer,
    read_layout,
)

RefusalReason = Annotated[str, typer.Option("--reason", metavar="TEXT", help="Your words for the audit trail.")]


@app.command(rich_help_panel=REGISTRY_PANEL)
def register(
    category: OneCategoryOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    params: ParamsOption = DEFAULT_PARAMS,
    overrides: SetOption = None,
) -> None:
    """Put the exported model into the MLflow registry with all that speaks for it. Twice the same adds nothing."""
    from flawsmith.registry.registration import register as act

    done = act(read_layout(params, category, overrides), dry_run=dry_run)
    state = "would be registered" if dry_run and done.created else "registered" if done.created else "was there already"
    print_answer(dataclasses.asdict(done), as_json, f"{done.model} version {done.version}: {state}.")


@app.command(rich_help_panel=REGISTRY_PANEL)
def promote(
    category: OneCategoryOption = None,
    version: Annotated[
        str, typer.Option("--version", metavar="N", help="The version to judge. Default: the newest.")
    ] = "",
    reason: RefusalReason = "",
    readmit: Annotated[bool, typer.Option("--readmit", help="Let a model that was rolled back stand again.")] = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    params: ParamsOption = DEFAULT_PARAMS,
    overrides: SetOption = None,
) -> None:
    """Judge a version beside the champion on the same images of today; make it the champion if every check passes.

    Exit 1 if it is refused.
    """
    layout = read_layout(params, category, overrides)
    from flawsmith.stages.promote import run

    done = run(layout, version=version, reason=reason, readmit=readmit, dry_run=dry_run)
    lines = [f"  {'ok  ' if check.passed else 'FAIL'}  {check.name}: {check.detail}" for check in done.checks]
    title = f"{done.model} version {done.version}: {'would be ' if dry_run else ''}{done.outcome}. {done.reason}"
    print_answer(done.to_json(), as_json, "\n".join([*lines, title]))
    if done.outcome == "refused":
        raise typer.Exit(1)


@app.command(rich_help_panel=REGISTRY_PANEL)
def rollback(
    reason: RefusalReason,
    category: OneCategoryOption = None,
    to: Annotated[str, typer.Option("--to", metavar="N", help="Version. Default: the champion before this one.")] = "",
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    params: ParamsOption = DEFAULT_PARAMS,
    overrides: SetOption = None,
) -> None:
    """Make the champion before the present one the champion again, and bar the present one."""
    from flawsmith.registry.promotion import rollback as act

    done = act(read_layout(params, category, overrides), reason=reason, to=to, dry_run=dry_run)
    verb = "would be champion" if dry_run else "is champion"
    print_answer(done.to_json(), as_json, f"{done.model} version {done.version} {verb} again instead of "
            f"{done.previous_champion}: {reason}")  # fmt: skip


@app.command(rich_help_panel=REGISTRY_PANEL)
def history(
    category: OneCategoryOption = None,
    _dry_run: Annotated[bool, typer.Option("--dry-run", help="Nothing to leave out: history only reads.")] = False,
    as_json: JsonOption = False,
    params: ParamsOption = DEFAULT_PARAMS,
    overrides: SetOption = None,
) -> None:
    """Every decision on a category's models, newest last: what, when, who, why."""
    from flawsmith.registry.history import history as read
    from flawsmith.registry.history import render_history

    found = read(read_layout(params, category, overrides))
    print_answer(found, as_json, render_history(found))
