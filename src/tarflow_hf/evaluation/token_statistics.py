"""Statistics of token sequences that need no judge: entropy, distinct n-grams, repetition."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


def unigram_entropy(tokens: Sequence[int]) -> float:
    """Nats of the distribution of the tokens within one sequence.

    Example:
        >>> round(unigram_entropy([1, 1, 2, 2]), 4), unigram_entropy([7, 7, 7])
        (0.6931, 0.0)
    """
    if len(tokens) == 0:
        raise ValueError("A sequence without tokens has no entropy.")
    _, counts = np.unique(np.asarray(tokens), return_counts=True)
    share = counts / len(tokens)
    return abs(float(-(share * np.log(share)).sum()))  # abs: no -0.0


def ngrams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    """All runs of n tokens.

    Example:
        >>> ngrams([1, 2, 3], 2)
        [(1, 2), (2, 3)]
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, not {n}.")
    return list(zip(*(tokens[start:] for start in range(n)), strict=False))


def distinct_n(sequences: Iterable[Sequence[int]], n: int) -> float:
    """Share of different n-grams among all n-grams of all sequences (Li et al., 2016).

    It falls with their number.

    Raises:
        ValueError: No sequence has n tokens.

    Example:
        >>> distinct_n([[1, 2, 1], [1, 2, 3]], 2)  # 12, 21, 12, 23
        0.75
    """
    found = set()
    total = 0
    for tokens in sequences:
        grams = ngrams(tokens, n)
        found.update(grams)
        total += len(grams)

    if not total:
        raise ValueError(f"There is no sequence of at least n = {n} tokens.")

    return len(found) / total


def repetition(tokens: Sequence[int], n: int = 4) -> float:
    """Share of a sequence's n-grams that have occurred in it before (Welleck et al., 2020).

    It is 0 if there are no n-grams.

    Example:
        >>> repetition([1, 2, 1, 2, 1], n=2)  # 12, 21, 12, 21
        0.5
    """
    grams = ngrams(tokens, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@dataclass(frozen=True)
class TokenStatistics:
    """Statistics of token sequences, samples or text, that need no judge."""

    num_sequences: int
    entropy: float  # nats, the mean of `unigram_entropy`
    entropy_std: float  # over the sequences
    distinct_1: float
    distinct_2: float
    distinct_3: float
    repetition_4: float  # the mean of `repetition`


def token_statistics(sequences: Sequence[Sequence[int]]) -> TokenStatistics:
    """Computes the statistics of token sequences.

    Raises:
        ValueError: If there is no sequence, if one is empty, or if all have less than three tokens.
    """
    if not sequences:
        raise ValueError("There is no sequence to describe.")

    entropy = np.array([unigram_entropy(tokens) for tokens in sequences])
    return TokenStatistics(
        num_sequences=len(sequences),
        entropy=entropy.mean().item(),
        entropy_std=entropy.std().item(),
        distinct_1=distinct_n(sequences, 1),
        distinct_2=distinct_n(sequences, 2),
        distinct_3=distinct_n(sequences, 3),
        repetition_4=float(np.mean([repetition(tokens, 4) for tokens in sequences])),
    )
