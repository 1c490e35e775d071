"""Every draw is a function of seed, purpose and place."""

from itertools import product

import numpy as np
import pytest
import torch
from scipy import stats

from experiments.randomness import epoch_order, seed_torch, stream


@pytest.mark.parametrize("images", [1, 2, 1437])
def test_an_order_is_a_permutation(images):
    assert sorted(epoch_order(5, 2, images)) == list(range(images))


def test_orders_of_different_epochs_and_seeds_are_unrelated():
    n = 2000
    orders = [epoch_order(seed, epoch, n) for seed, epoch in product(range(3), range(4))]
    for i, first in enumerate(orders):
        for second in orders[:i]:
            # Fixed points of a random permutation are Poisson(1): more than 10 have probability 1e-8.
            assert (first == second).sum() <= 10
            # Rank correlation of independent orders has deviation n^-1/2.
            assert abs(np.corrcoef(np.argsort(first), np.argsort(second))[0, 1]) < 6 / n**0.5


def test_every_position_of_an_order_is_equally_likely():
    places = np.array([np.argsort(epoch_order(seed, 0, 10)) for seed in range(2000)])
    for image in range(10):
        assert stats.chisquare(np.bincount(places[:, image], minlength=10)).pvalue > 1e-7


def test_streams_of_different_purposes_and_places_are_independent():
    keys = [(0, "order", 1), (0, "augment", 1), (1, "order", 1), (0, "order", 2), (1, "order", 0)]
    draws = np.array([stream(*key).random(20_000) for key in keys])
    for row in draws:
        assert stats.kstest(row, "uniform").pvalue > 1e-7
    correlation = np.corrcoef(draws) - np.eye(len(keys))
    assert np.abs(correlation).max() < 6 / 20_000**0.5
    assert np.array_equal(stream(*keys[0]).random(5), stream(*keys[0]).random(5))


def test_seeding_torch_makes_its_draws_a_function_of_the_place():
    def draw(*place):
        seed_torch(4, "step", *place)
        return torch.rand(4)

    first = draw(7, 0)
    torch.rand(100)
    assert torch.equal(draw(7, 0), first)
    assert not torch.equal(draw(7, 1), first)
    assert not torch.equal(draw(8, 0), first)
