"""What the commands share: the application, options that several have, and how they load settings and print answers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flawsmith.errors import UserError

if TYPE_CHECKING:
    from flawsmith.config import Settings
    from flawsmith.layout import Layout

STAGE_PANEL = "Pipeline stages, in order (`dvc repro` runs what has changed)"
USE_PANEL = "Use and understand a model"
REGISTRY_PANEL = "Registry: which model is in use, and why"
STUDY_PANEL = "Find out what is worth its cost"
HOUSE_PANEL = "Around it"

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Learn to find surface defects from good parts alone.\n\n"
    "[bold]Whole pipeline[/bold], from the project's folder: [cyan]make repro[/cyan] (or [cyan]dvc repro[/cyan])\n\n"
    "[bold]Your own parts[/bold]: put defect-free images into data/CATEGORY/train/good, "
    "[cyan]dvc add data/CATEGORY[/cyan], name CATEGORY under `categories` in params.yaml, [cyan]dvc repro[/cyan]\n\n"
    "[bold]Use the model[/bold]: "
    "[cyan]flawsmith predict artifacts/CATEGORY/export/model.onnx FOLDER --out results[/cyan]",
)

ParamsOption = Annotated[
    Path, typer.Option("--params", metavar="PATH", help="The parameters; paths are relative to where this file lies.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="SECTION.KEY=VALUE",
        help="Replace a value for this call alone (DVC does not see it), e.g. distill.batch=4. Repeatable.",
    ),
]
CategoryOption = Annotated[
    list[str] | None,
    typer.Option(
        "--category", "-c", metavar="NAME", help="Folder under data.root. Repeatable. Default: all of params."
    ),
]
OneCategoryOption = Annotated[
    str | None,
    typer.Option("--category", "-c", metavar="NAME", help="Folder under data.root. Default: the only one in params."),
]
ProviderOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Where the model computes: auto, cpu, cuda, tensorrt or openvino. Default: FLAWSMITH_PROVIDER, else the "
        "first of cuda, openvino and cpu that loads.",
    ),
]
MqttOption = Annotated[
    str | None, typer.Option("--mqtt", metavar="URL", help="Send results to this broker: mqtt://HOST or mqtts://HOST.")
]
MqttTopicOption = Annotated[str, typer.Option("--mqtt-topic", metavar="NAME", help="Topic of the results.")]
MqttCredentialsOption = Annotated[
    Path | None, typer.Option("--mqtt-credentials", metavar="FILE", help="YAML with login and certificates.")
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Say what would be done; change nothing.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
DEFAULT_PARAMS = Path("params.yaml")


def read_settings(params: Path, overrides: list[str] | None) -> "Settings":
    """Load params.yaml with the values of `--set`."""
    from flawsmith.config import load_settings

    return load_settings(params, parse_overrides(overrides or []))


def read_layouts(params: Path, categories: list[str] | None, overrides: list[str] | None) -> list["Layout"]:
    """Load the settings and return a layout for each wanted category; it need not stand in params.yaml.

    Raises:
        UserError: `--set` names the categories too.
    """
    from flawsmith.config import load_settings
    from flawsmith.layout import Layout

    replaced = parse_overrides(overrides or [])
    if categories and "categories" in replaced:
        raise UserError("--category and --set categories=... both say which; leave one of them out.")
    if categories:
        replaced["categories"] = list(dict.fromkeys(categories))
    settings = load_settings(params, replaced)
    return [Layout(settings, name, params.parent) for name in settings.categories]


def read_layout(params: Path, category: str | None, overrides: list[str] | None) -> "Layout":
    """Load the settings and return the layout of one category.

    Raises:
        UserError: none is named, and params.yaml has several.
    """
    layouts = read_layouts(params, [category] if category else None, overrides)
    if len(layouts) > 1:
        names = ", ".join(layout.category for layout in layouts)
        raise UserError(f"{params} names several categories ({names}); choose one with --category.")
    return layouts[0]


def parse_overrides(pairs: list[str]) -> dict[str, Any]:
    """`section.key=value` texts to a mapping; values are YAML, so `[1, 2]`, `true` and `1e-3` mean what they say.

    Raises:
        UserError: a text has no `=`, or its value is not valid YAML.
    """
    from flawsmith.config import read_yaml

    replaced: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not (equals and key.strip()):
            raise UserError(f"--set {pair}: write it as section.key=value, e.g. --set distill.batch=4.")
        try:
            replaced[key.strip()] = read_yaml(text)
        except ValueError as error:
            raise UserError(f"--set {pair}: the value is not valid YAML ({error}).") from error
    return replaced


def comma_list(texts: list[str] | None) -> tuple[str, ...]:
    """Split texts, each of which may be a comma list, into one list."""
    return tuple(part.strip() for text in texts or [] for part in text.split(",") if part.strip())


def print_answer(content: Mapping[str, Any], as_json: bool, text: str) -> None:
    """Print what a command found, as JSON or in words."""
    print(json.dumps(content, indent=2, default=str) if as_json else text)
