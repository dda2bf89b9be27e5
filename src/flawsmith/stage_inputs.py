"""What a stage depends on must stay as it is while it runs, and DVC must see all of it.

DVC hashes a stage's dependencies after its command has ended. A source file, an image or a parameter that was changed
meanwhile would stand in dvc.lock as what the result was made from. So each stage looks before and after, and fails if
something has changed. And DVC does not look into linked folders inside a dependency: it would miss new images there.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flawsmith.config import read_yaml
from flawsmith.data.walk import FILE, entries, listed
from flawsmith.dvc import read_stages
from flawsmith.errors import FlawsmithError, UserError
from flawsmith.files import digest_file
from flawsmith.layout import DVC_STAGE, Layout

PARAMS = "params.yaml"
UNHASHED = ("__pycache__", ".pyc", ".tmp")  # of .dvcignore, what may come into being while a stage runs


def look_at_inputs(layout: Layout, stage: str) -> dict[str, Any]:
    """Note all that dvc.yaml names as a stage's dependencies, as it is now.

    Returns:
        By name: the digest of a source file, size and time of change of another file, the value of a parameter. Nothing
        where there is no dvc.yaml.

    Raises:
        UserError: a dependency holds a linked folder.
    """
    if not (layout.root / "dvc.yaml").is_file():
        return {}
    entry = read_stages(layout.root).get(stage, {})
    seen: dict[str, Any] = {}
    for text in entry.get("deps", []):
        path = _place(layout, text)
        if path and path.is_file():
            seen[str(path)] = _signature(path)
        elif path and path.is_dir():
            seen |= {f"{path}/{name}": _signature(file) for name, file in _files_below(path)}
    # a study and a call by hand have their values from elsewhere, and may go on while params.yaml is edited
    for item in entry.get("params", []) if DVC_STAGE in os.environ else ():
        for text, keys in (item if isinstance(item, dict) else {PARAMS: [item]}).items():
            if place := _place(layout, text):
                seen |= {f"`{key}` in {text}": _parameter(place, key) for key in keys}
    return seen


def check_inputs(layout: Layout, stage: str, before: Mapping[str, Any]) -> None:
    """Compare a stage's dependencies with what `look_at_inputs` noted before it began.

    Raises:
        FlawsmithError: something has changed; it is named.
    """
    now = look_at_inputs(layout, stage)
    changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if changed:
        target = f"{stage}@{layout.category}"
        raise FlawsmithError(
            f"Changed while stage `{stage}` ran: {listed(changed)}. DVC would record the new content as what the "
            f"result was made from; run `dvc repro {target}` again, or put the old content back and run "
            f"`dvc commit --force {target}`."
        )


def unseen_sentence(link: Path) -> str:
    """Say why a linked folder inside a category is refused, and what to do."""
    return (
        f"{link} is a linked folder, and DVC does not see what lies in such a one: changed images would go unnoticed. "
        "Copy the images there, link the whole folder of the category instead, or set `data.root` in params.yaml to "
        "where they lie."
    )


def _place(layout: Layout, text: str) -> Path | None:
    """Where a dependency of dvc.yaml lies; None for that of a stage which this layout does not know."""
    text = text.replace("${item.category}", layout.category).replace("${item.surface}", layout.category)
    text = text.replace("${data.root}", layout.settings.data.root)
    first, *rest = Path(text).parts
    if first != "artifacts" or len(rest) < 2:
        return layout.root / text
    try:
        return layout.stage(rest[1]).joinpath(*rest[2:])
    except FlawsmithError:  # a study's layout knows those alone that its method runs
        return None


def _files_below(folder: Path) -> list[tuple[str, Path]]:
    linked: list[str] = []
    found = [(entry.name, Path(entry.path)) for entry in entries(folder, linked=linked) if entry.kind == FILE]
    if linked:
        raise UserError(unseen_sentence(folder / linked[0]))
    return [(name, path) for name, path in found if not any(text in name for text in UNHASHED)]


def _signature(path: Path) -> object:
    if path.suffix == ".py":  # an editor's or git's new time alone is no change
        return digest_file(path)
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _parameter(path: Path, key: str) -> Any:
    try:
        value: Any = read_yaml(path.read_text())
    except (OSError, ValueError):
        return None
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value
