"""The manifest's rows: everything that decides a triplet."""

from typing import Any

from flawsmith.synthesis.generate import DefectSpec, Triplet, TripletGenerator


def manifest_row(maker: TripletGenerator, triplet_id: str, triplet: Triplet) -> dict[str, Any]:
    """One row of the manifest: everything that decides the triplet; None is what its texture has no use for.

    The row describes the first of `defects` defects; `further` holds the same columns of the others.
    """
    item, settings = triplet.candidate, maker.settings
    first, *others = (_defect_columns(maker, defect) for defect in item.defects)
    return {
        "triplet_id": triplet_id,
        "role": item.role,
        "candidate": item.number,
        "seed": settings.seed,
        "source": maker.names[item.source],
        **_place_columns(maker, item.source),
        "defects": len(item.defects),
        **first,
        "mask_area": float(triplet.mask.mean()),
        "further": others,
    }


def _place_columns(maker: TripletGenerator, source: int) -> dict[str, int]:
    """Where in its image a normal lies; nothing of a whole one."""
    place = maker.places[source] if maker.places else None
    return {} if place is None else {"source_top": place[0], "source_left": place[1]}


def _defect_columns(maker: TripletGenerator, defect: DefectSpec) -> dict[str, Any]:
    settings, outline, shade = maker.settings, defect.outline, defect.shade
    top, left, side = outline.window
    diffused, pasted = defect.texture == "diffusion", defect.texture == "cutpaste"
    return {
        "texture": defect.texture,
        "donor": maker.names[defect.donor] if defect.texture in ("own", "cutpaste") else None,
        "window_top": top,
        "window_left": left,
        "window_side": side,
        "rule": settings.rule if diffused else None,
        "strength": defect.strength if diffused else None,
        "start": defect.start if diffused else None,
        "steps": settings.steps if diffused else None,
        "disturb_until": settings.disturb_until if diffused else None,
        "octaves": settings.octaves if diffused else None,
        "opacity": defect.opacity,
        "feather": 0.0 if pasted or shade else settings.feather,
        "mask_kind": outline.kind,
        "mask_period": outline.period,
        "mask_threshold": outline.threshold,
        "mask_angle": outline.angle,
        "shade_change": shade.change if shade else None,
        "shade_gain_share": shade.gain_share if shade else None,
    }
