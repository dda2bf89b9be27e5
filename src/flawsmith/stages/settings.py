"""Stage settings: write what params.yaml says for one category, with its `overrides`.

All later stages depend on that file, so DVC runs those of a category alone whose values have changed.
"""

from flawsmith.files import write_json
from flawsmith.layout import Layout


def run(layout: Layout) -> None:
    """Write the category's settings; the file is itself a params.yaml for this category alone."""
    write_json(layout.effective_settings, {"categories": [layout.category], **layout.settings.to_json()})
