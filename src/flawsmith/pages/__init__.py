"""What all reports share: the look of their figures and of their HTML, which holds every picture inside itself.

A report is a template that extends base.html (colours, tables, panels, banners, cards) and imports from parts.html
(`figure`: a picture for light and for dark readers). Nothing here tells of the time, the machine or a version: equal
content gives equal bytes.
"""

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from flawsmith.files import atomic_file

MINUS, NARROW_SPACE = "\N{MINUS SIGN}", "\N{NARROW NO-BREAK SPACE}"


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

Drawing = Callable[[Theme], Figure]
Corner = Literal["lower left", "lower right", "upper right"]  # matplotlib's search for the best place is slow


def new_figure(width: float, height: float, theme: Theme, title: str = "") -> Figure:
    """An empty figure of `width` x `height` inches, with its title on the left."""
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained", facecolor=theme.paper)
    if title:
        figure.suptitle(title, color=theme.ink, fontsize=11, x=0.01, ha="left")
    return figure


def dress(
    axes: Axes, theme: Theme, title: str, x: str, y: str = "", grid: bool = False, legend: Corner | None = None
) -> None:
    """Give one panel its title, labels and colours; `legend` is the corner of its legend, None for no legend."""
    axes.set_title(title, color=theme.ink, fontsize=10, loc="left")
    axes.set_xlabel(x, color=theme.soft, fontsize=9)
    axes.set_ylabel(y, color=theme.soft, fontsize=9)
    axes.set_facecolor(theme.paper)
    axes.tick_params(colors=theme.soft, labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(theme.soft)
    if grid:
        axes.grid(color=theme.soft, alpha=0.2, lw=0.6)
    if legend:
        axes.legend(loc=legend, fontsize=8, frameon=False, labelcolor=theme.ink)


def figure_png(figure: Figure) -> bytes:
    """The figure as PNG."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def themed(drawing: Drawing) -> tuple[str, str]:
    """A figure for light and for dark readers as two data URIs: what the macro `figure` of parts.html takes."""
    light, dark = (data_uri(figure_png(drawing(theme))) for theme in (LIGHT, DARK))
    return light, dark


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


def percent(share: float) -> str:
    """A share in percent with one decimal."""
    return f"{100 * share:.1f}{NARROW_SPACE}%"


def signed(value: float) -> str:
    """Three decimals with a sign; 0.000 has none."""
    text = f"{value:+.3f}"
    return "0.000" if float(text) == 0 else text.replace("-", MINUS)


def significant(value: float) -> str:
    """Three significant digits."""
    return f"{value:.3g}".replace("-", MINUS)


def listed(parts: list[str]) -> str:
    """`a, b and c`."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


FILTERS = {"percent": percent, "signed": signed, "significant": significant}


def render(template: Path, filters: dict[str, Callable[..., Any]] | None = None, **values: Any) -> str:
    """The HTML of a template that extends base.html; a value it lacks is an error, and text is escaped.

    The template may use FILTERS and its own `filters`.
    """
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        loader=jinja2.FileSystemLoader([template.parent, Path(__file__).parent]),
    )
    environment.filters |= FILTERS | (filters or {})
    return environment.get_template(template.name).render(**values)


def write_page(path: Path, template: Path, filters: dict[str, Callable[..., Any]] | None = None, **values: Any) -> None:
    """Write `render`'s page to `path`, whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(render(template, filters, **values), encoding="utf-8")
