"""Sentences as sequences of their own, each with its end: no text reaches from one to the next.

train = SentenceTokens(sentences, tokenizer)       # a sequence is a sentence and the eos_token behind it
train.first(100)                                   # the first ones, the short before the long: for scoring
train.collate([train[0], train[1]])                # a batch, padded on the right
"""

import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from .characters import CharacterCount, token_ids_of_all

BATCHES_SORTED = 32  # batches whose sentences are sorted by length together


class SentenceTokens(Dataset):
    """The tokens of sentences, each followed by the tokenizer's `eos_token`.

    The end is predicted as every token is, so it counts: bits per character are those of the
    characters and of the end, divided by length + 1.

    So a model that runs left to right is a distribution over sentences of all lengths: it does not
    know where the end will be. A flow that runs right to left begins there. Its stack is a
    distribution over the sentences of each length, so the length costs nats of its own, those of
    `length_nats`, which `score` adds.

    Args:
        sentences: Strings, read once.
        tokenizer: Any tokenizer with an `eos_token`.
        patch_size: P. A sequence whose length is no multiple of it ends in further end tokens.
            Since p(text and more) <= p(text), a bound on the longer text bounds the shorter one.
        train: The training sentences, whose lengths say how likely a length is.

    Attributes:
        sequence_length (int): Tokens of the longest sequence.
        num_tokens (Tensor): Tokens of each sequence, (n,); those that only fill a patch don't
            count.
        length_nats (Tensor): -log p(length) of each sequence, (n,): how often the training
            sentences have it, and one more of each length up to twice the longest. None without
            `train`.
        num_characters (int): Characters, an end counted as one.
        characters (CharacterCount): The characters, and those that the tokenizer drops.

    Raises:
        ValueError: If there is no sentence, or the tokenizer has no `eos_token`.

    Example:
        >>> from tarflow_hf.data import penn_treebank_tokenizer
        >>> sentences = SentenceTokens(["a cat", "it"], penn_treebank_tokenizer())
        >>> sentences[1]["input_ids"].tolist(), sentences.num_tokens.tolist()
        ([31, 42, 49], [6, 3])
    """

    tokens_per_word = None  # words are not what is counted here

    def __init__(
        self,
        sentences: Iterable[str],
        tokenizer: PreTrainedTokenizerBase,
        patch_size: int = 1,
        train: "SentenceTokens | None" = None,
    ):
        end = tokenizer.eos_token_id
        if end is None:
            raise ValueError("Sentences need a tokenizer with an eos_token, which ends them.")

        texts = list(sentences)
        if not texts:
            raise ValueError("There is no sentence.")

        self.characters = CharacterCount(tokenizer)
        for text in texts:
            self.characters.add(text)

        self.end = end
        self.num_characters = self.characters.num_characters + len(texts)
        rows = [[*ids, end] for ids in token_ids_of_all(tokenizer, texts)]
        self.num_tokens = torch.tensor([len(row) for row in rows])
        rows = [row + [end] * (-len(row) % patch_size) for row in rows]

        self.lengths = torch.tensor([len(row) for row in rows])
        self.sequence_length = int(self.lengths.max())
        self.length_nats = None if train is None else train.nats_of_lengths(self.lengths)
        self.tokens = torch.tensor([token for row in rows for token in row], dtype=torch.int32)
        self._starts = self.lengths.cumsum(0) - self.lengths

    @property
    def characters_per_token(self) -> float:
        """The mean number of characters in a token, an end counted as one: 1.0 of characters."""
        return self.num_characters / int(self.num_tokens.sum())

    @property
    def mean_length(self) -> float:
        """The mean number of tokens in a sequence."""
        return self.lengths.double().mean().item()

    def nats_of_lengths(self, lengths: Tensor) -> Tensor:
        """-log p(length) of each of some lengths (n,), (n,); infinite beyond twice the longest."""
        longest = 2 * self.sequence_length
        counts = torch.bincount(self.lengths, minlength=longest + 1).double()
        counts[1:] += 1
        nats = (counts.sum() - counts[0]).log() - counts[1:].log()
        is_known = lengths <= longest
        return nats[lengths.clamp(max=longest) - 1].masked_fill(~is_known, torch.inf)

    def note(self, what: str = "the text") -> str | None:
        """A sentence on the characters that were dropped; None if none was."""
        return self.characters.note(what)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`{"input_ids": (T,), "num_tokens": int, "ends": True}`, with `train` `length_nats`, too."""
        index = range(len(self))[index]  # raises IndexError, which ends a for loop
        start, length = int(self._starts[index]), int(self.lengths[index])
        ids = self.tokens[start : start + length].long()
        row = {"input_ids": ids, "num_tokens": int(self.num_tokens[index]), "ends": True}
        if self.length_nats is not None:
            row["length_nats"] = float(self.length_nats[index])

        return row

    def first(self, num_sequences: int | None = None) -> list[dict[str, Any]]:
        """The first sequences, in the order of their lengths, so that equal ones share a batch."""
        number = len(self) if num_sequences is None else min(num_sequences, len(self))
        order = self.lengths[:number].sort(stable=True).indices
        return [self[index] for index in order.tolist()]

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """`{"input_ids": (B, T), "attention_mask": (B, T)}`, padded on the right with ends."""
        ids = [row["input_ids"] for row in rows]
        mask = [torch.ones_like(each) for each in ids]
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad(ids, batch_first=True, padding_value=self.end),
            "attention_mask": pad(mask, batch_first=True),
        }

    def sampler(self, batch_size: int, seed: int) -> "SimilarLengths":
        """The order of an epoch of training, in which a batch has sentences of similar length."""
        return SimilarLengths(self.lengths.numpy(), batch_size, seed)

    def fingerprint(self) -> dict[str, int]:
        """Numbers that another text or tokenizer changes."""
        return {
            "number of sequences": len(self),
            "sequence length": self.sequence_length,
            "checksum of the data": zlib.crc32(self.tokens.numpy()),
        }


def sentence_splits(
    splits: Mapping[str, Iterable[str]], tokenizer: PreTrainedTokenizerBase, patch_size: int = 1
) -> dict[str, SentenceTokens]:
    """The `SentenceTokens` of each split; lengths are as likely as in "train"."""
    train = SentenceTokens(splits["train"], tokenizer, patch_size)
    made = {"train": train}
    for name, sentences in splits.items():
        if name != "train":
            made[name] = SentenceTokens(sentences, tokenizer, patch_size, train)

    return made


class SimilarLengths(Sampler[int]):
    """A random order, in which sequences of similar length share a batch: little of it is padding.

    The sequences are shuffled, those of every `BATCHES_SORTED` batches are sorted by length, and
    the batches are shuffled. The rest, too small for a batch, comes last.

    The library's `LengthGroupedSampler` keeps the order inside a group from long to short, and draws
    from a generator. This order follows from seed and epoch only, so that a resumed run has the same.

    Args:
        lengths: The lengths of the sequences, (n,).
        batch_size: Sequences in a batch.
        seed: Decides the order, together with the epoch.

    Example:
        >>> order = list(SimilarLengths(np.array([9, 1, 8, 2]), batch_size=2, seed=0))
        >>> sorted(order) == [0, 1, 2, 3] and {1, 3} in ({*order[:2]}, {*order[2:]})
        True
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int):
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses another order. `accelerate` calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        draw = np.random.default_rng([self.seed, self.epoch])
        order = draw.permutation(len(self.lengths))
        whole = len(order) - len(order) % self.batch_size
        group = BATCHES_SORTED * self.batch_size

        for start in range(0, whole, group):
            part = order[start : min(start + group, whole)]
            order[start : start + len(part)] = part[np.argsort(self.lengths[part], kind="stable")]

        batches = draw.permutation(order[:whole].reshape(-1, self.batch_size))
        yield from batches.ravel().tolist()
        yield from order[whole:].tolist()
