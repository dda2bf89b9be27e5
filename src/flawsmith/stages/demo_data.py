"""Stage demo-data: render one embedded surface into data/<surface>, in MVTec AD layout."""

from pathlib import Path

from flawsmith.demo.render import kind_of, write_category
from flawsmith.files import atomic_folder
from flawsmith.settings import Settings


def run(settings: Settings, root: Path, surface: str) -> None:
    """Render `surface` below `root` (where params.yaml lies); the folder appears whole or not at all.

    Raises:
        UserError: there is no such surface.
    """
    kind_of(surface)  # before a folder of a user's own of that name could be touched
    with atomic_folder(root / settings.data.root / surface) as folder:
        write_category(folder, surface, settings.demo_data)
