"""Who is believed: the newest verdict of each person, and only where all agree."""

import json
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flawsmith.errors import UserError
from flawsmith.review.verdicts import VERDICTS, Verdict, append, opinions, read_verdicts


@st.composite
def said(draw: st.DrawFn) -> Verdict:
    verdict = draw(st.sampled_from(VERDICTS))
    boxes = draw(st.lists(st.tuples(*[st.integers(1, 9)] * 4), max_size=2)) if verdict == "defective" else []
    return Verdict(
        who=draw(st.sampled_from(["ann", "bob", "cyd"])),
        when=f"2026-01-01T00:00:{draw(st.integers(0, 3)):02}+00:00",
        model="",
        image=draw(st.sampled_from(["a" * 64, "b" * 64])),
        path=draw(st.sampled_from(["/line/1.png", "/line/2.png"])),
        verdict=verdict,
        boxes=tuple(boxes),
    )


def one(who: str, second: int, verdict: str, **changes: object) -> Verdict:
    given = {
        "who": who,
        "when": f"2026-01-01T00:00:{second:02}+00:00",
        "model": "",
        "image": "a" * 64,
        "path": "/1.png",
    }
    return Verdict(**{**given, "verdict": verdict, **changes})


@given(st.lists(said(), max_size=12), st.randoms(use_true_random=False))
def test_the_order_of_lines_does_not_matter(lines: list[Verdict], chance: random.Random) -> None:
    mixed = list(lines)
    chance.shuffle(mixed)
    assert opinions(mixed) == opinions(lines)


@given(st.lists(said(), max_size=12))
def test_agreed_is_what_all_people_say_at_last(lines: list[Verdict]) -> None:
    for opinion in opinions(lines):
        about = [line for line in lines if line.image == opinion.image]
        last = []
        for who in {line.who for line in about}:
            own = [line for line in about if line.who == who]
            last.append({line.verdict for line in own if line.when == max(line.when for line in own)})
        if opinion.verdict:
            assert opinion.verdict != "unsure"
            assert all(opinion.verdict in kinds for kinds in last)
        elif all(len(kinds) == 1 for kinds in last):
            assert len(set.union(*last)) > 1 or {"unsure"} in last


@pytest.mark.parametrize(
    ("lines", "agreed"),
    [
        ([one("ann", 1, "good")], "good"),
        ([one("ann", 1, "good"), one("ann", 2, "defective")], "defective"),
        ([one("ann", 1, "good"), one("bob", 2, "defective")], ""),
        ([one("ann", 1, "good"), one("bob", 2, "unsure")], ""),
        ([one("ann", 1, "unsure"), one("ann", 2, "good")], "good"),
        ([one("ann", 1, "good"), one("bob", 1, "good")], "good"),
        ([one("ann", 1, "unsure")], ""),
        ([one("ann", 1, "good", when="2026-01-01T01:00:00+02:00"), one("ann", 0, "defective")], "defective"),
    ],
)
def test_the_newest_counts_and_doubt_blocks(lines: list[Verdict], agreed: str) -> None:
    (opinion,) = opinions(lines)
    assert opinion.verdict == agreed


def test_lines_are_only_added_and_come_back(tmp_path: Path) -> None:
    path = tmp_path / "new/verdicts.jsonl"
    first, second = one("ann", 1, "defective", boxes=((1, 2, 3, 4),)), one("bób\n", 2, "good", path="/a\udcff.png")
    append(path, first)
    before = path.read_bytes()
    append(path, second)
    assert path.read_bytes().startswith(before)
    assert read_verdicts(path) == [first, second]


def test_a_torn_line_is_passed_over_and_taken_back(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.jsonl"
    append(path, one("ann", 1, "good"))
    with path.open("ab") as stream:
        stream.write(b'{"who": "bo')
    assert read_verdicts(path) == [one("ann", 1, "good")]
    append(path, one("bob", 2, "good"))
    assert read_verdicts(path) == [one("ann", 1, "good"), one("bob", 2, "good")]


def test_many_writers_lose_no_line(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.jsonl"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: append(path, one(f"p{n}", 1, "good")), range(40)))
    assert {verdict.who for verdict in read_verdicts(path)} == {f"p{n}" for n in range(40)}


@pytest.mark.parametrize(
    "change",
    [
        {"verdict": "bad"}, {"who": " "}, {"when": "yesterday"}, {"when": "2026-01-01T00:00:00"}, {"image": 1},
        {"boxes": [[0, 0, 0, 1]]}, {"boxes": [[0, 0, 1]]}, {"boxes": [[0, 0, 1.5, 1]]}, {"boxes": "x"},
        {"verdict": "good", "boxes": [[0, 0, 1, 1]]}, {"more": 1},
    ],
)  # fmt: skip
def test_a_damaged_line_is_named(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "verdicts.jsonl"
    append(path, one("ann", 1, "good"))
    with path.open("a") as stream:
        print(json.dumps(asdict(one("ann", 1, "defective")) | change), file=stream)
    with pytest.raises(UserError, match="line 2"):
        read_verdicts(path)
