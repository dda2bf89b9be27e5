import itertools

from hypothesis import given
from hypothesis import strategies as st

from flawsmith.sequences import batched, evenly


@given(st.lists(st.integers()), st.integers(1, 9))
def test_batches_hold_everything_in_order_and_only_the_last_is_shorter(items: list[int], size: int) -> None:
    batches = list(batched(iter(items), size))
    assert [item for batch in batches for item in batch] == items
    assert all(len(batch) == size for batch in batches[:-1])
    assert all(batches)


@given(st.integers(0, 300), st.integers(0, 50), st.none() | st.floats(0, 0.999))
def test_even_picks_are_distinct_in_order_and_as_many_as_wanted(count: int, wanted: int, start: float | None) -> None:
    picked = evenly(count, wanted, start)
    assert picked == sorted(set(picked))
    assert all(0 <= index < count for index in picked)
    assert len(picked) == min(count, wanted)
    gaps = [after - before for before, after in itertools.pairwise(picked)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_even_picks_take_both_ends_or_a_share_of_equal_parts() -> None:
    assert evenly(10, 4) == [0, 3, 6, 9]
    assert evenly(10, 1) == [0]
    assert evenly(10, 5, 0.5) == [1, 3, 5, 7, 9]
