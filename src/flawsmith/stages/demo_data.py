"""Stage demo-data: render one embedded surface into data/<surface>, in MVTec AD layout."""

from pathlib import Path

from flawsmith.config import Settings
from flawsmith.demo.render import kind_of, write_category
from flawsmith.files import atomic_folder
from flawsmith.layout import DEMO_DATA, Layout
from flawsmith.sections import section_values
from flawsmith.tracking import stage_run

STAGE = "demo-data"


def run(settings: Settings, root: Path, surface: str, if_category: bool = False) -> None:
    """Render `surface` below `root` (where params.yaml lies); the folder appears whole or not at all.

    It lies in the project, in `data`, also where `data.root` names a user's own place. With `if_category` it is
    rendered if it is a category that is read from there; else its folder is left empty, for DVC wants one.

    Raises:
        UserError: there is no such surface.
    """
    kind_of(surface)  # before a folder of a user's own of that name could be touched
    layout, target = Layout(settings, surface, root), root / DEMO_DATA / surface
    if if_category and not (surface in settings.categories and layout.reads_demo_data):
        target.mkdir(parents=True, exist_ok=True)
        print(f"{surface}: no category that is read from {target.parent}, so nothing is rendered.")
        return
    with stage_run(layout, STAGE, {STAGE: section_values(settings.demo_data)}) as tracked:
        with atomic_folder(target) as folder:
            write_category(folder, surface, settings.demo_data)
        tracked.set_output(target)
