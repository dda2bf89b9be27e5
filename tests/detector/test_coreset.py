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
    for place in range(1, 120):
        distance = torch.cdist(points, points[indices[:place]]).amin(dim=1)
        assert distance[indices[place]] == pytest.approx(float(distance.amax()), abs=1e-4)


def test_fewer_are_the_first_of_more():
    points, steps = rows(3000, channels=100), []  # more channels than are compared without a projection
    more = k_center(points, 1500, torch_generator(0, "coreset"), steps.append)
    assert sum(steps) == len(more) == 1500
    for count in (0, 1, 700):
        assert torch.equal(chosen(points, count), more[:count])
    with torch.autocast("cpu", torch.bfloat16):  # which changes nothing
        assert torch.equal(chosen(points, 4000)[:1500], more)


def test_no_row_is_chosen_twice_even_where_rows_are_alike():
    points = rows(40).repeat(30, 1)
    indices = chosen(points, 1300)
    assert len(indices.unique()) == len(indices) == 1200
    assert len(points[indices[:40]].unique(dim=0)) == 40
    thinned = chosen(points, 40, candidates=40)  # at random, so some of the 40 are missing
    assert len(points[thinned].unique(dim=0)) < len(thinned) == 40
