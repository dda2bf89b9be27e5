"""Who is champion by the trail, whatever happened and whoever was slow."""

from collections.abc import Callable
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flawsmith.registry.ledger import Entry, Kind, Trail, replay


def entry(number: int, kind: Kind, version: str, previous: int, before: str = "", reason: str = "why") -> Entry:
    return Entry(
        number,
        kind,
        version,
        digest=digest(version),
        previous=previous,
        previous_champion=before,
        previous_digest=digest(before) if before else "",
        at="2026-01-02T03:04:05+00:00",
        actor="somebody",
        reason=reason,
    )


def digest(version: str) -> str:
    return f"digest of {version}"


def after(trail: Trail, kind: Kind, version: str, reason: str = "why") -> Trail:
    """The trail with one more decision by somebody who knows all of it."""
    last = trail.last_change
    number = len(trail.entries) + 1
    made = entry(number, kind, version, last.number if last else 0, trail.champion, reason)
    return replay([*trail.entries, made])


def story(*steps: tuple[Kind, str]) -> Trail:
    trail = replay([])
    for kind, version in steps:
        trail = after(trail, kind, version)
    return trail


def test_an_empty_trail_has_no_champion() -> None:
    trail = replay([])
    assert trail.champion == ""
    assert trail.last_change is None
    assert trail.barred == {}


def test_promotions_in_order_all_count_and_the_last_is_champion() -> None:
    trail = story(("promotion", "1"), ("promotion", "2"), ("promotion", "5"))
    assert trail.champions == ("1", "2", "5")
    assert trail.champion == "5"
    assert trail.lost == frozenset()
    assert trail.last_change == trail.entries[-1]


@pytest.mark.parametrize("kind", ["promotion", "rollback"])
def test_of_two_changes_that_knew_the_same_the_lower_number_wins(kind: Kind) -> None:
    start = story(("promotion", "1"), ("promotion", "2")).entries
    trail = replay([*start, entry(3, "promotion", "3", 2, "2"), entry(4, kind, "1", 2, "2")])
    assert trail.lost == {4}
    assert trail.champion == "3"
    assert trail.barred == {}, "a rollback that came too late bars nothing"
    assert not trail.counts(trail.entries[3])


def test_of_two_first_promotions_at_once_the_loser_and_who_builds_on_it_lose_until_it_looks_again() -> None:
    both = [entry(1, "promotion", "1", 0), entry(2, "promotion", "2", 0)]
    trail = replay(both)
    assert (trail.champions, trail.lost) == (("1",), {2})
    built = replay([*both, entry(3, "promotion", "3", 2, "2")])
    assert (built.champion, built.lost) == ("1", {2, 3})
    assert after(trail, "promotion", "2").champion == "2"


def test_a_change_that_names_an_entry_to_come_is_lost() -> None:
    assert replay([entry(1, "promotion", "1", 1), entry(2, "promotion", "2", 7)]).lost == {1, 2}


def test_refusals_change_nothing_but_the_trail() -> None:
    plain = story(("promotion", "1"), ("promotion", "2"))
    told = story(("refusal", "1"), ("promotion", "1"), ("refusal", "2"), ("promotion", "2"), ("refusal", "3"))
    assert told.champions == plain.champions
    assert (told.lost, told.barred) == (frozenset(), {})
    assert len(told.entries) == 5
    assert told.last_change == told.entries[3]
    assert not any(told.counts(item) for item in told.entries if item.kind == "refusal")


def test_a_refusal_from_an_old_view_is_no_lost_race() -> None:
    start = story(("promotion", "1"), ("promotion", "2")).entries
    assert replay([*start, entry(3, "refusal", "3", 1, "1")]).lost == frozenset()


def test_rollback_after_rollback_walks_back_through_the_champions() -> None:
    trail = story(("promotion", "1"), ("promotion", "2"), ("promotion", "3"))
    trail = after(trail, "rollback", "2", "misses dents")
    assert trail.champions == ("1", "2")
    assert trail.barred == {digest("3"): "misses dents"}
    trail = after(trail, "rollback", "1", "misses scratches")
    assert trail.champions == ("1",)
    assert trail.barred == {digest("3"): "misses dents", digest("2"): "misses scratches"}


def test_a_rollback_over_several_champions_forgets_those_between_and_bars_only_the_last() -> None:
    trail = after(story(("promotion", "1"), ("promotion", "2"), ("promotion", "3")), "rollback", "1")
    assert trail.champions == ("1",)
    assert set(trail.barred) == {digest("3")}


def test_a_rollback_to_a_version_that_never_was_champion_leads_on_from_the_present_one() -> None:
    trail = after(story(("promotion", "2")), "rollback", "1")
    assert trail.champion == "1"
    assert set(trail.barred) == {digest("2")}


def test_a_rollback_to_a_version_that_was_champion_twice_goes_back_to_the_latter_time() -> None:
    trail = story(("promotion", "1"), ("promotion", "2"), ("promotion", "1"), ("promotion", "3"))
    trail = after(trail, "rollback", "1")
    assert trail.champions == ("1", "2", "1"), "the champion before version 1 was version 2"


def test_promoting_again_after_a_rollback_readmits_the_content() -> None:
    trail = after(story(("promotion", "1"), ("promotion", "2")), "rollback", "1")
    assert digest("2") in trail.barred
    again = after(trail, "promotion", "2")
    assert again.barred == {}
    assert again.champions == ("1", "2")
    assert set(after(again, "rollback", "1").barred) == {digest("2")}


def test_the_bar_is_of_the_content_not_of_the_version() -> None:
    trail = after(story(("promotion", "1"), ("promotion", "2")), "rollback", "1")
    same_file = replace(entry(4, "promotion", "9", 3, "1"), digest=digest("2"))
    assert replay([*trail.entries, same_file]).barred == {}


def test_a_rollback_without_words_bars_all_the_same() -> None:
    trail = after(story(("promotion", "1"), ("promotion", "2")), "rollback", "1", reason="")
    assert trail.barred.get(digest("2"), ""), "the reader takes an empty reason for `not barred`"


VERSIONS = ("1", "2", "3", "4")
ACTORS = 3
steps = st.lists(
    st.tuples(
        st.integers(0, ACTORS - 1),
        st.sampled_from(["look", "promotion", "rollback", "refusal"]),
        st.sampled_from(VERSIONS),
    ),
    max_size=24,
)


def act(history: list[tuple[int, str, str]], watch: Callable[[Trail, Entry, bool], None]) -> Trail:
    """Actors who decide on what each of them last looked at; the store numbers what they append one by one.

    Nobody promotes, or rolls back to, the champion they see. `watch` sees the trail after each append, the new
    entry, and whether its author knew the last change.
    """
    trail = replay([])
    views = [trail] * ACTORS
    for actor, kind, version in history:
        view = views[actor]
        if kind == "look":
            views[actor] = trail
            continue
        if kind != "refusal" and version == view.champion:
            continue
        known, last = view.last_change, trail.last_change
        made = entry(
            len(trail.entries) + 1,
            kind,  # type: ignore[arg-type]
            version,
            known.number if known else 0,
            view.champion,
            f"{kind} by {actor}",
        )
        trail = replay([*trail.entries, made])
        watch(trail, made, known == last)
    return trail


@given(steps)
def test_exactly_those_changes_count_whose_authors_knew_the_last_one(history: list[tuple[int, str, str]]) -> None:
    def watch(trail: Trail, made: Entry, up_to_date: bool) -> None:
        assert trail.counts(made) == (made.kind != "refusal" and up_to_date)
        assert (made.number in trail.lost) == (made.kind != "refusal" and not up_to_date)

    act(history, watch)


@given(steps)
def test_any_race_leaves_one_chain_and_one_champion(history: list[tuple[int, str, str]]) -> None:
    trail = act(history, lambda *_: None)
    chain = [item for item in trail.entries if trail.counts(item)]
    assert [item.previous for item in chain] == [0, *(item.number for item in chain)][: len(chain)]
    assert trail.champion == (chain[-1].version if chain else "")
    assert trail.last_change == (chain[-1] if chain else None)
    assert [item.previous_champion for item in chain] == ["", *(item.version for item in chain)][: len(chain)]
    if chain:
        assert chain[-1].digest not in trail.barred
    assert set(trail.barred) <= {item.previous_digest for item in chain if item.kind == "rollback"}


@given(steps)
def test_no_later_entry_changes_the_verdict_on_an_earlier_one(history: list[tuple[int, str, str]]) -> None:
    verdicts: dict[int, bool] = {}

    def watch(trail: Trail, made: Entry, up_to_date: bool) -> None:
        verdicts[made.number] = trail.counts(made)
        assert {item.number: trail.counts(item) for item in trail.entries} == verdicts

    act(history, watch)


@given(steps, st.randoms(use_true_random=False))
def test_replay_does_not_depend_on_the_order_in_which_the_store_lists(
    history: list[tuple[int, str, str]], random: Random
) -> None:
    trail = act(history, lambda *_: None)
    shuffled = list(trail.entries)
    random.shuffle(shuffled)
    assert replay(shuffled) == trail


@given(steps)
def test_a_rollback_to_the_champion_before_can_be_repeated_down_to_the_first(
    history: list[tuple[int, str, str]],
) -> None:
    trail = act(history, lambda *_: None)
    while len(trail.champions) > 1:
        expected = trail.champions[:-1]
        trail = after(trail, "rollback", expected[-1])
        assert trail.champions == expected
