import numpy as np

from pcagpt.losses.deciles import frequency_deciles, means_by_decile


def test_each_decile_covers_a_tenth_of_the_text():
    frequency = np.random.default_rng(0).permutation(np.full(1000, 0.001))
    counts = np.bincount(frequency_deciles(frequency), minlength=10)
    assert counts.min() >= 99
    assert list(frequency_deciles(np.array([0.05, 0.9, 0.05]))) == [9, 0, 9]


def test_deciles_of_shares_are_those_of_counts_also_at_ties():
    assert sorted(frequency_deciles(np.full(10, 0.1))) == list(range(10))
    random = np.random.default_rng(0)
    for size in (10, 20, 100, 5000):
        for most in (1, 2, 3, 1000):
            counts = random.integers(0, most, size, endpoint=True)
            counts[0] += -counts.sum() % 10 + 10
            expected = frequency_deciles(counts)
            found = frequency_deciles(counts / counts.sum())
            np.testing.assert_array_equal(found, expected)


def test_a_mean_is_over_the_targets_of_a_decile():
    frequency = np.array([5, 50, 40, 5, 0])  # deciles 9, 0, 5, 9, 9
    pairs = np.array([[2.0, 1], [6, 4], [0, 0], [7, 2]])
    assert means_by_decile(pairs, frequency) == [1.5, *8 * [None], (2 + 7) / 3]
