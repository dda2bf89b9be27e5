"""Stage demo-data: render one embedded surface into data/<surface>, in MVTec AD layout."""

from pathlib import Path

from flawsmith.demo.render import kind_of, write_category
from flawsmith.files import atomic_folder
from flawsmith.layout import Layout
from flawsmith.settings import Settings, section_values
from flawsmith.tracking import stage_run

STAGE = "demo-data"


def run(settings: Settings, root: Path, surface: str) -> None:
    """Render `surface` below `root` (where params.yaml lies); the folder appears whole or not at all.

    Raises:
        UserError: there is no such surface.
    """
    kind_of(surface)  # before a folder of a user's own of that name could be touched
    target = root / settings.data.root / surface
    with stage_run(Layout(settings, surface, root), STAGE, {}, {STAGE: section_values(settings.demo_data)}) as tracked:
        with atomic_folder(target) as folder:
            write_category(folder, surface, settings.demo_data)
        tracked.set_outputs({"data": target})
