"""Commands around the pipeline: study, check, doctor, fetch, params."""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flawsmith.cli.common import (
    DEFAULT_PARAMS,
    HOUSE_PANEL,
    STUDY_PANEL,
    JsonOption,
    ParamsOption,
    SetOption,
    app,
    parse_overrides,
    print_answer,
    read_settings,
)
from flawsmith.errors import UserError

if TYPE_CHECKING:
    from flawsmith.config import Settings

if find_spec("flawsmith_lab"):  # in a checkout; the wheel leaves the laboratory out
    from flawsmith_lab.study.command import study

    app.command(rich_help_panel=STUDY_PANEL)(study)


@app.command(rich_help_panel=HOUSE_PANEL)
def check(
    categories: Annotated[
        list[str] | None, typer.Argument(metavar="[CATEGORY...]", help="Folders under data.root. Default: all.")
    ] = None,
    as_json: JsonOption = False,
    params: ParamsOption = DEFAULT_PARAMS,
    overrides: SetOption = None,
) -> None:
    """Look at params.yaml and every image before anything is computed: all that would fail later, each with its remedy.

    Exit 2 if anything would fail; warnings alone exit 0. `make repro` begins with it.
    """
    from flawsmith.check import check as look

    report = look(params, categories or [], parse_overrides(overrides or []))
    print_answer(report.to_json(), as_json, str(report))
    if report.errors:
        raise typer.Exit(UserError.exit_code)


@app.command(rich_help_panel=HOUSE_PANEL)
def doctor(params: ParamsOption = DEFAULT_PARAMS, overrides: SetOption = None) -> None:
    """Check what breaks silently: versions, stores, teacher weights, device. Exit 1 if something is wrong."""
    from flawsmith.doctor import render_checks, run_checks, worst_status

    checks = run_checks(read_settings(params, overrides), params.parent)
    print(render_checks(checks))
    if worst_status(checks) == "fail":
        raise typer.Exit(1)


@app.command(rich_help_panel=HOUSE_PANEL)
def fetch(
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="mvtec-ad")],
    category: Annotated[str, typer.Option("--category", "-c", metavar="NAME", help="E.g. bottle.")],
    mirror: Annotated[
        str | None, typer.Option("--mirror", metavar="URL", help="A folder on the web that holds CATEGORY.tar.xz.")
    ] = None,
    url: Annotated[
        str | None, typer.Option("--url", metavar="URL", help="The archive's own address, where it has moved.")
    ] = None,
    sha256: Annotated[
        str | None, typer.Option("--sha256", metavar="HEX", help="Demand this checksum instead of the known one.")
    ] = None,
    params: ParamsOption = DEFAULT_PARAMS,
    overrides: SetOption = None,
) -> None:
    """Download one category of a public dataset into data/CATEGORY, with checksum and resume.

    Example: flawsmith fetch mvtec-ad --category bottle
    """
    from flawsmith.fetch import fetch_mvtec_ad

    if dataset != "mvtec-ad":
        raise UserError(f"`{dataset}` is no dataset that can be fetched; use mvtec-ad.")
    settings = read_settings(params, overrides)
    folder = fetch_mvtec_ad(category, params.parent / settings.data.root, base_url=mirror, url=url, sha256=sha256)
    print(f"{folder} is ready: run `dvc add {folder}`, add `{category}` to `categories` in {params}, then `dvc repro`.")


@app.command("params", rich_help_panel=HOUSE_PANEL)
def show_params(
    section: Annotated[str | None, typer.Argument(metavar="[SECTION]", help="Only this section, e.g. distill.")] = None,
    params: ParamsOption = DEFAULT_PARAMS,
    overrides: SetOption = None,
) -> None:
    """Print every key of params.yaml: its value, meaning and bounds."""
    from flawsmith.config import SECTIONS

    settings = read_settings(params, overrides)
    if section is not None and section not in SECTIONS:
        raise UserError(f"`{section}` is no section of params.yaml; known are {', '.join(SECTIONS)}.")
    if section is None:
        print(f"categories: {_plain(list(settings.categories))}: folders under data.root")
        print(f"seed: {settings.seed}: of all that is drawn at random")
        print(f"overrides: {_plain(list(settings.overrides))}: categories with values of their own\n")
    print("\n\n".join(describe_section(settings, name) for name in SECTIONS if section in (None, name)))


def describe_section(settings: "Settings", name: str) -> str:
    """Write a section as aligned lines: key, value, meaning, what it may be, default."""
    from flawsmith.config import FOLLOWS, SECTIONS
    from flawsmith.sections import describe, rule, section_values

    values = {key: _plain(value) for key, value in section_values(getattr(settings, name.replace("-", "_"))).items()}
    key_width, value_width = (max(map(len, texts)) for texts in (values, values.values()))
    lines = [" ".join((SECTIONS[name].__doc__ or name).split()).replace("`", "")]
    for key, item in describe(SECTIONS[name]).items():
        followed = FOLLOWS.get(f"{name}.{key}")
        default = f"follows {followed}" if followed else _plain(item["default"])
        what = f"{item['description']} ({rule(item)}; default: {default})"
        lines.append(f"  {key:{key_width}}  {values[key]:{value_width}}  {what}")
    return "\n".join(lines)


def _plain(value: Any) -> str:
    """Write a value as it stands in params.yaml."""
    if isinstance(value, list):
        return f"[{', '.join(map(_plain, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)
