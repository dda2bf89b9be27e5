"""The contact sheet: the order of the worst by its stated rule, and a picture that shows them."""

from dataclasses import replace
from pathlib import Path

from triplet_sets import SIDE, Report, make_set, settings

from flawsmith.data.triplets import part_path
from flawsmith.quality.measures import Measures
from flawsmith.quality.sheet import CAPTION, MISSING, OUTLINE, TILE, draw_sheet, rank_worst
from flawsmith.quality.verdict import Outcome, decide, rules

RULES = {rule.name: rule for rule in rules(settings().validate)}


def row(triplet_id: str, change: float = 0.1) -> Measures:
    return Measures(triplet_id, True, True, True, change_inside=change, mask_area=0.3)


def verdict(**failing: tuple[str, ...]):  # type: ignore[no-untyped-def]
    return decide([Outcome(RULES[name], False, ids, None) for name, ids in failing.items()], 5)


def test_worst_first() -> None:
    rows = [row("faint", 0.01), row("b"), row("a"), row("warned"), row("twice"), row("once", float("nan"))]
    judged = verdict(ssim=("warned", "twice"), mask_area=("twice", "once"))
    assert [item.triplet_id for item, _ in rank_worst(rows, judged, 9)] == [
        "twice",
        "once",
        "warned",
        "faint",
        "a",
        "b",
    ]
    assert len(rank_worst(rows, judged, 2)) == 2


def test_order_does_not_depend_on_the_order_of_rows() -> None:
    rows = [row(str(index), change) for index, change in enumerate((0.3, 0.1, 0.2, 0.1))]
    judged = verdict(mask_area=("0",))
    assert rank_worst(rows, judged, 4) == rank_worst(rows[::-1], judged, 4)


def test_reason_gives_value_and_bound() -> None:
    ((_, reason),) = rank_worst([row("a")], verdict(ssim=("a",), mask_area=("a",)), 1)
    assert reason == "critical: mask_area 0.3 > 0.2 (+1 more)"
    ((_, reason),) = rank_worst([replace(row("a"), ssim=0.25)], verdict(ssim=("a",)), 1)
    assert reason == "warning: ssim 0.25 < 0.5"
    ((_, reason),) = rank_worst([row("a")], verdict(decodable=("a",)), 1)
    assert reason == "critical: decodable"
    few = decide([Outcome(RULES["ssim"], True, ("a",), None)], 50)
    ((_, reason),) = rank_worst([replace(row("a"), ssim=0.25)], few, 1)
    assert reason == "tolerated: ssim 0.25 < 0.5"
    ((_, reason),) = rank_worst([row("a", 0.0456)], decide([], 1), 1)
    assert reason == "no rule broken; change inside 0.046"


def test_sheet_shows_normal_defect_and_outline(tmp_path: Path) -> None:
    ids = make_set(tmp_path, 5)
    sheet = draw_sheet(tmp_path, [(row(triplet_id), "why") for triplet_id in ids])
    assert sheet.shape[0] > 2 * (TILE + CAPTION)
    assert ((sheet == OUTLINE).all(axis=2)).sum() > 5 * 20
    assert (draw_sheet(tmp_path, [(row(triplet_id), "why") for triplet_id in ids]) == sheet).all()


def test_unreadable_parts_are_gray_tiles(tmp_path: Path) -> None:
    (triplet_id,) = make_set(tmp_path, 1)
    part_path(tmp_path, "defect", triplet_id).write_bytes(b"broken")
    part_path(tmp_path, "mask", triplet_id).unlink()
    sheet = draw_sheet(tmp_path, [(row(triplet_id), "x" * 500)])
    assert (sheet == MISSING).all(axis=2).sum() >= 2 * TILE * TILE


def test_no_triplets_is_a_sheet_too(tmp_path: Path) -> None:
    assert (draw_sheet(tmp_path, []) != 255).any()


def test_stage_draws_the_worst_first(broken: Report) -> None:
    assert (broken.folder / "worst.png").stat().st_size > 10 * SIDE
