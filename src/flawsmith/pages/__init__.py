"""What all reports share: the look of their figures and of their HTML, which holds every picture inside itself.

Nothing here tells of the time, the machine or a version: equal content gives equal bytes.
"""

import base64
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image


@dataclass(frozen=True)
class Theme:
    """Colours of one appearance; detector and baseline differ in line style too, for readers who see no hue."""

    ink: str
    soft: str
    paper: str
    detector: str
    baseline: str
    good: str
    bad: str


LIGHT = Theme("#1d2733", "#8a96a3", "#ffffff", "#0b6bcb", "#8a96a3", "#4f8f6b", "#cf4a36")
DARK = Theme("#e6edf3", "#7d8894", "#161c24", "#58a6ff", "#7d8894", "#6fbf92", "#ff7b66")


def dress(axes: Axes, theme: Theme, title: str, x: str, y: str = "", *, grid: bool = False) -> None:
    """Title, labels and colours of one panel."""
    axes.set_title(title, color=theme.ink, fontsize=10, loc="left")
    axes.set_xlabel(x, color=theme.soft, fontsize=9)
    axes.set_ylabel(y, color=theme.soft, fontsize=9)
    axes.set_facecolor(theme.paper)
    axes.tick_params(colors=theme.soft, labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(theme.soft)
    if grid:
        axes.grid(color=theme.soft, alpha=0.2, lw=0.6)


def figure_png(figure: Figure) -> bytes:
    """The figure as PNG."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def jpeg_uri(pixels: NDArray[np.uint8], side: int) -> str:
    """Pixels (H, W, 3), shrunk to `side` at most, as a data URI: for the eye only."""
    image = Image.fromarray(pixels)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, format="JPEG", quality=88)
    return data_uri(stream.getvalue(), "jpeg")


def data_uri(content: bytes, kind: str = "png") -> str:
    """An encoded picture as an address that holds it."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def render(template: Path, filters: Mapping[str, Callable[..., Any]], **values: Any) -> str:
    """The HTML of a template that extends base.html; a value it lacks is an error, and text is escaped."""
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        loader=jinja2.FileSystemLoader([template.parent, Path(__file__).parent]),
    )
    environment.filters |= filters
    return environment.get_template(template.name).render(**values)
