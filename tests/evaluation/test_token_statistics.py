"""Statistics of tokens, by hand and against scipy."""

import math

import pytest
import torch
from scipy.stats import entropy

from tarflow_hf.evaluation import (
    distinct_n,
    ngrams,
    repetition,
    token_statistics,
    unigram_entropy,
)


def test_entropy_is_scipys_and_does_not_see_the_order():
    torch.manual_seed(0)
    tokens = torch.randint(9, (50,))
    expected = entropy(torch.bincount(tokens).numpy())
    for order in (tokens, tokens.flip(0), tokens.sort().values):
        assert unigram_entropy(order.tolist()) == pytest.approx(expected)

    assert (
        unigram_entropy(list(range(8))) == pytest.approx(math.log(8)) and unigram_entropy([3]) == 0
    )
    with pytest.raises(ValueError, match="without tokens"):
        unigram_entropy([])


@pytest.mark.parametrize(
    ("sequences", "n", "distinct"),
    [
        ([[1, 1, 1, 1]], 1, 1 / 4),
        ([[1, 2], [1, 2], [3]], 2, 1 / 2),
        ([[1, 2, 3]], 3, 1),
        ([[1, 2], [2, 1]], 1, 1 / 2),
    ],
)
def test_distinct_by_hand(sequences, n, distinct):
    assert distinct_n(sequences, n) == distinct == distinct_n(sequences[::-1], n)


@pytest.mark.parametrize(
    ("tokens", "n", "share"),
    [([1] * 6, 2, 4 / 5), ([1, 2, 3], 2, 0), ([1, 2], 4, 0), ([1, 2, 3, 1, 2, 3], 3, 1 / 4)],
)
def test_repetition_by_hand(tokens, n, share):
    assert repetition(tokens, n) == pytest.approx(share)


def test_statistics_of_bad_sequences():
    statistics = token_statistics([[1, 1, 2, 2], [1, 2, 3, 4]])
    assert statistics.entropy == pytest.approx(1.5 * math.log(2)) and statistics.distinct_1 == 0.5
    assert statistics.entropy_std == pytest.approx(0.5 * math.log(2))

    for sequences, message in (
        ([], "no sequence"),
        ([[1], []], "without tokens"),
        ([[1, 2]], "at least n = 3 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            token_statistics(sequences)

    with pytest.raises(ValueError, match="n must be at least 1"):
        ngrams([1, 2], 0)
