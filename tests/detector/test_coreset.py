"""Greedy k-center: what is chosen stands for what is not."""

from itertools import combinations

import pytest
import torch
from torch import Tensor

from flawsmith.detector import coreset
from flawsmith.detector.coreset import k_center
from flawsmith.randomness import torch_generator


def rows(count: int, channels: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(count, channels, generator=torch_generator(seed, "rows"))


def chosen(points: Tensor, count: int, **options: int) -> Tensor:
    return k_center(points, count, torch_generator(0, "coreset"), **options)


def radius(points: Tensor, centres: Tensor) -> float:
    return float(torch.cdist(points, centres).amin(dim=1).amax())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_covering_radius_is_at_most_twice_the_least(seed, count):
    points = rows(12, seed=seed)
    least = min(radius(points, points[list(one)]) for one in combinations(range(len(points)), count))
    assert radius(points, points[chosen(points, count)]) <= 2 * least + 1e-5


@pytest.mark.parametrize("block", [1, 3, 64])
def test_blocks_choose_as_one_pass_a_choice_would(monkeypatch, block):
    monkeypatch.setattr(coreset, "BLOCK", block)
    monkeypatch.setattr(coreset, "CHUNK", 50)
    points = rows(300, channels=5)
    indices = chosen(points, 120)
    distance = torch.full((len(points),), torch.inf)
    for before, index in zip([None, *indices.tolist()], indices.tolist(), strict=False):
        if before is not None:
            distance = torch.minimum(distance, (points - points[before]).norm(dim=1))
            assert distance[index] == pytest.approx(float(distance.amax()), abs=1e-4)


def test_fewer_are_the_first_of_more():
    points = rows(3000, channels=100)  # more than are compared without a projection
    more = chosen(points, 1500)
    for count in (0, 1, 700):
        assert torch.equal(chosen(points, count), more[:count])


def test_no_row_is_chosen_twice_even_where_rows_are_alike():
    points = rows(40).repeat(30, 1)
    indices = chosen(points, 900)
    assert len(indices.unique()) == len(indices) == 900
    assert len(points[indices[:40]].unique(dim=0)) == 40


def test_all_rows_are_chosen_where_they_are_too_few():
    for count in (7, 8):
        assert chosen(rows(7), count).sort().values.tolist() == list(range(7))
    assert len(chosen(rows(0), 3)) == 0


def test_what_is_rare_is_kept():
    points = torch.cat([rows(5000, channels=90), 20 + rows(3, channels=90)])
    assert (chosen(points, 10) >= 5000).any()


def test_too_many_rows_are_thinned_out_at_random_first():
    points = rows(1000)
    indices = chosen(points, 50, candidates=50)
    assert len(indices.unique()) == 50
    assert radius(points, points[indices]) > radius(points, points[chosen(points, 50)])
    assert len(chosen(points, 60, candidates=50)) == 60


def test_each_choice_is_reported_once():
    steps: list[int] = []
    k_center(rows(2000, channels=8), 700, torch_generator(0, "coreset"), steps.append)
    assert sum(steps) == 700


def test_half_precision_around_it_changes_nothing():
    points = rows(500, channels=60)
    with torch.autocast("cpu", torch.bfloat16):
        inside = chosen(points, 100)
    assert torch.equal(inside, chosen(points, 100))
