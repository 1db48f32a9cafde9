"""The permutation: a bijection for every size, well mixed, and fixed for all time."""

import numpy as np
import pytest

from dovetail_data import Permutation

POWERS = [2**k + d for k in range(1, 15) for d in (-1, 0, 1)]
PRIMES = [2, 3, 5, 7, 11, 101, 997, 10007]


@pytest.mark.parametrize("size", sorted({1, *POWERS, *PRIMES, 40_000}))
def test_it_is_a_bijection(size):
    """A value twice is a document twice in an epoch, and another one never."""
    for seed in (0, 2**64 - 1):
        values = Permutation(size, seed=seed, stream=3)(np.arange(size))
        assert values.dtype == np.int64
        assert np.array_equal(np.sort(values), np.arange(size))


def test_any_subset_and_order_of_indices_gives_the_same_values():
    """Random access must agree with the whole, whatever else is asked in the same call."""
    permutation = Permutation(1000, seed=5)
    whole = permutation(np.arange(1000))
    some = np.random.default_rng(0).integers(0, 1000, 300)
    assert np.array_equal(permutation(some), whole[some])
    assert permutation(np.zeros(0, np.int64)).shape == (0,)


def test_sizes_beyond_memory_work():
    """2**40 documents: constant memory, and int64 all the way."""
    size = 2**40 + 7
    indices = np.random.default_rng(0).integers(0, size, 1000)
    values = Permutation(size, seed=1)(indices)
    assert values.min() >= 0
    assert values.max() < size
    assert len(np.unique(values)) == len(np.unique(indices))
    assert np.median(values) / size == pytest.approx(0.5, abs=0.1)


def test_the_order_never_changes_between_releases():
    """Golden values: a change would break the resumption of every run."""
    assert Permutation(10, seed=0)(np.arange(10)).tolist() == GOLDEN_10
    assert Permutation(1000, seed=7, stream=2)(np.arange(6)).tolist() == GOLDEN_1000


GOLDEN_10 = [8, 3, 7, 5, 0, 1, 9, 4, 2, 6]
GOLDEN_1000 = [756, 890, 921, 881, 517, 201]


def chi_squared_limit(freedom):
    return freedom + 4.0 * np.sqrt(2 * freedom)  # p < 1e-4


@pytest.mark.parametrize("size", [3, 5, 8, 17, 60])
def test_every_element_is_equally_likely_at_every_place(size, soak):
    """Over many seeds; a bias would show some documents early in most runs."""
    draws = 20_000 if soak else 1_000
    counts = np.zeros((size, size))
    for seed in range(draws):
        counts[np.arange(size), Permutation(size, seed=seed)(np.arange(size))] += 1
    statistic = ((counts - draws / size) ** 2 / (draws / size)).sum()
    assert statistic < chi_squared_limit((size - 1) ** 2)


def test_all_orders_of_few_documents_occur_about_equally(soak):
    """Small Feistel networks reach only some permutations; with 4 elements all 24 must come."""
    draws = 24_000 if soak else 1_200
    seen = {}
    for seed in range(draws):
        order = tuple(Permutation(4, seed=seed)(np.arange(4)))
        seen[order] = seen.get(order, 0) + 1
    assert len(seen) == 24
    assert sum((n - draws / 24) ** 2 / (draws / 24) for n in seen.values()) < chi_squared_limit(23)


def test_neighbours_and_epochs_are_unrelated():
    """Documents that follow each other in the corpus must not stay together, nor epochs repeat each other."""
    size = 50_000
    one, two = (Permutation(size, seed=0, stream=epoch)(np.arange(size)) for epoch in (0, 1))
    assert abs(np.corrcoef(one, np.arange(size))[0, 1]) < 0.02
    assert abs(np.corrcoef(one[1:], one[:-1])[0, 1]) < 0.02
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.02
    assert (np.abs(np.diff(one)) == 1).mean() < 0.001
    assert (one == two).sum() < 12  # 1 is expected
    gaps = np.histogram(np.abs(np.diff(one)) / size, bins=20, range=(0, 1))[0]
    middles = (np.arange(20) + 0.5) / 20
    expected = 2 * (1 - middles) / 20 * (size - 1)
    assert ((gaps - expected) ** 2 / expected).sum() < chi_squared_limit(19)


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [(0, {"seed": 0}, "size=0"), (2**63, {"seed": 0}, "size="), (5, {"seed": -1}, "seed=-1"),
     (5, {"seed": 2**64}, "seed="), (5, {"seed": 0, "stream": -1}, "stream=-1")],
)  # fmt: skip
def test_wrong_arguments_are_refused(size, options, message):
    """A negative seed would otherwise fail deep inside."""
    with pytest.raises(ValueError, match=message):
        Permutation(size, **options)


@pytest.mark.parametrize("index", [-1, 5])
def test_indices_out_of_range_are_refused(index):
    """The network would map them to something."""
    with pytest.raises(IndexError, match="expected 0 to 4"):
        Permutation(5, seed=0)(np.array([index]))
