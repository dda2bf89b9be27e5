"""Contact sheet of the worst triplets: normal | defect | outline of the mask, with id and reason below.

Worst first means: more broken critical rules, then more broken warnings, then the smaller change inside the mask (the
fainter a defect, the more it teaches the noise); ties go by id. A set that breaks no rule shows its faintest defects.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from flawsmith.data.images import draw_outline, fitted, read_image, resize_image, resize_mask, to_uint8
from flawsmith.data.masks import read_mask
from flawsmith.data.triplets import PARTS, part_path
from flawsmith.errors import UserError
from flawsmith.quality.measures import Measures
from flawsmith.quality.verdict import Outcome, Verdict

TILE, GAP, CAPTION, COLUMNS = 160, 6, 34, 3  # pixels, pixels, pixels, triplets side by side
OUTLINE = (255, 0, 200)  # no surface has this colour
PAPER, INK, MISSING = (255, 255, 255), (20, 20, 20), (200, 200, 200)


def rank_worst(rows: Sequence[Measures], verdict: Verdict, count: int) -> list[tuple[Measures, str]]:
    """The `count` worst triplets and why each is there, by the order that the module states."""
    broken: dict[str, list[Outcome]] = {row.triplet_id: [] for row in rows}
    for outcome in sorted(verdict.outcomes, key=lambda item: item.rule.severity):  # "critical" before "warning"
        for triplet_id in outcome.failing_ids:
            broken[triplet_id].append(outcome)

    def order(row: Measures) -> tuple[int, int, float, str]:
        critical = sum(item.rule.severity == "critical" for item in broken[row.triplet_id])
        change = -1.0 if math.isnan(row.change_inside) else row.change_inside
        return -critical, critical - len(broken[row.triplet_id]), change, row.triplet_id

    return [(row, _reason(row, broken[row.triplet_id])) for row in sorted(rows, key=order)[:count]]


def draw_sheet(folder: Path, worst: Sequence[tuple[Measures, str]]) -> NDArray[np.uint8]:
    """Draw the ranked triplets of a synthesize folder as `(H, W, 3)` uint8; what cannot be read is a gray tile."""
    width, height = 3 * TILE + 2 * GAP, TILE + CAPTION + GAP
    columns = max(1, min(COLUMNS, len(worst)))
    lines = max(1, math.ceil(len(worst) / columns))
    sheet = Image.new("RGB", (columns * (width + 3 * GAP) + 3 * GAP, lines * height + 2 * GAP), PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    if not worst:
        pen.text((3 * GAP, GAP), "No triplets.", INK, font)
    for index, (row, reason) in enumerate(worst):
        left, top = 3 * GAP + index % columns * (width + 3 * GAP), 2 * GAP + index // columns * height
        for position, tile in enumerate(_tiles(folder, row.triplet_id)):
            sheet.paste(Image.fromarray(tile), (left + position * (TILE + GAP), top))
        pen.text((left, top + TILE + 2), row.triplet_id, INK, font)
        pen.text((left, top + TILE + 17), _fit(reason, font, width), INK, font)
    return np.asarray(sheet)


def _tiles(folder: Path, triplet_id: str) -> list[NDArray[np.uint8]]:
    missing = np.full((TILE, TILE, 3), MISSING, np.uint8)
    tiles = []
    for part in PARTS[:2]:
        try:
            image = read_image(part_path(folder, part, triplet_id))
            tiles.append(to_uint8(resize_image(image, fitted(image.shape[1:], TILE))))
        except UserError:
            tiles.append(missing)
    try:
        mask = read_mask(part_path(folder, "mask", triplet_id))
    except UserError:
        return [*tiles, missing]
    height, width, _ = tiles[1].shape
    return [*tiles, draw_outline(tiles[1], resize_mask(mask, (height, width)), OUTLINE)]


def _reason(row: Measures, broken: Sequence[Outcome]) -> str:
    if not broken:
        return f"no rule broken; change inside {row.change_inside:.3f}"
    # A measure that is missing because the file is broken says less than the broken file.
    rule = broken[0].rule
    severity = "tolerated" if broken[0].passed else rule.severity  # few enough triplets break the rule
    more = f" (+{len(broken) - 1} more)" if len(broken) > 1 else ""
    if rule.kind != "range":
        return f"{severity}: {rule.name}{more}"
    value = float(getattr(row, rule.column))
    bound = f"< {rule.low:g}" if rule.low is not None and value < rule.low else f"> {rule.high:g}"
    return f"{severity}: {rule.name} {value:.4g} {bound}{more}"


def _fit(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    while text and font.getlength(text) > width:
        text = text[:-1]
    return text
