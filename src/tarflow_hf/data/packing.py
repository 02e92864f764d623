"""Packing: the tokens of all documents, cut into blocks of equal length."""

import random
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from .characters import (
    CharacterCount,
    is_of_characters,
    is_text8_with_end,
    token_ids_of_all,
    vocabulary_size,
)
from .progress import progress_bar

FINGERPRINT = 64  # sequences of a stream that tell it from another one
PIECE = 100_000  # characters: longer documents are tokenized in pieces, which bounds the memory this takes
BATCH = 1_000_000  # characters of one call of the tokenizer, which spreads them over the cores


class PackedTokens(Dataset):
    """The tokens of all documents, one after the other, cut into blocks of equal length.

    Blocks follow each other without gap or overlap; what is left behind the last whole block is
    dropped. Between two documents stands the tokenizer's `eos_token`, or one space where it has
    none, and in that of characters.

    Args:
        documents: Strings, read once.
        tokenizer: Any tokenizer of the `transformers` library.
        sequence_length: T, the number of tokens in a block.

    Attributes:
        tokens (Tensor): All tokens (N,), in the smallest integer type that holds them.
        num_characters (int): Characters that the N tokens stand for: those of the documents, or for
            a tokenizer of single characters those that it makes of them, so that there each token
            is a character.
        characters (CharacterCount): The characters of the documents, and those that the tokenizer
            drops.
        num_words (int): Words that the N tokens stand for, of the same text: what stands between
            spaces.

    Raises:
        ValueError: if there are fewer than T tokens.

    Example:
        >>> from tarflow_hf.data import character_tokenizer
        >>> blocks = PackedTokens(["To be, or not", "to be."], character_tokenizer(), sequence_length=8)
        >>> [character_tokenizer().decode(block["input_ids"]) for block in blocks]
        ['to be or', ' not to ']
        >>> blocks.characters_per_token
        1.0
    """

    def __init__(
        self, documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, sequence_length: int
    ):
        self.characters = CharacterCount(tokenizer)
        encoded = []
        is_list = isinstance(documents, list | tuple) and all(isinstance(x, str) for x in documents)
        total = sum(map(len, documents)) if is_list else None

        # Of rows, the reader has a bar.
        with progress_bar("tokenizing", "character", total) as bar:
            for part in _encode(documents, tokenizer, self.characters):
                encoded.append(part)
                bar.update(self.characters.num_characters - bar.n)

        # An empty array in front, for a text without tokens; NumPy's promotion leaves the type to
        # the others.
        tokens = np.concatenate([np.empty(0, np.uint8), *(tokens for tokens, *_ in encoded)])
        _check_length(len(tokens), sequence_length, self.characters)
        self.tokens = torch.from_numpy(tokens)
        self.num_characters = sum(characters for _, characters, _ in encoded)
        self.num_words = sum(words for *_, words in encoded)

        vocabulary = tokenizer.get_vocab()
        self.is_of_characters = is_of_characters(tokenizer)
        if " " in vocabulary and self.is_of_characters:
            is_space = tokens == vocabulary[" "]
            self.num_words = int((~is_space[1:] & is_space[:-1]).sum() + (not is_space[0]))

        self.sequence_length = sequence_length

    @property
    def characters_per_token(self) -> float:
        """The mean number of characters in a token: bits per token / this = bits per character."""
        return self.num_characters / len(self.tokens)

    def note(self, what: str = "the text") -> str | None:
        """A sentence on the characters that were dropped, and on those that are counted."""
        note = self.characters.note(what)
        if note is None or not self.is_of_characters:
            return note

        return (
            f"{note} Bits per character are those of the {self.num_characters:,} characters that it makes of "
            "the text."
        )

    @property
    def tokens_per_word(self) -> float | None:
        """The mean number of tokens in a word; None if there is no word.

        Perplexity per word = perplexity per token to the power of this.
        """
        return len(self.tokens) / self.num_words if self.num_words else None

    def __len__(self) -> int:
        return len(self.tokens) // self.sequence_length

    def first(self, num_sequences: int) -> list[dict[str, torch.Tensor]]:
        """The first blocks, at most all."""
        return [self[index] for index in range(min(num_sequences, len(self)))]

    def fingerprint(self) -> dict[str, int]:
        """Numbers that another text, tokenizer or length changes."""
        return {
            "number of sequences": len(self),
            "sequence length": self.sequence_length,
            "checksum of the data": zlib.crc32(self.tokens.numpy()),
        }

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """`{"input_ids": (T,)}`, int64."""
        start = (
            range(len(self))[index] * self.sequence_length
        )  # the range raises IndexError, which ends a for loop
        return {"input_ids": self.tokens[start : start + self.sequence_length].long()}


class StreamingPackedTokens(IterableDataset):
    """The blocks of `PackedTokens` in the same order, tokenized while the documents are read.

    Each process that iterates reads all documents: let accelerate's main process read and dispatch,
    its default.

    Exact resume: load `{"epoch": epoch, "blocks": number of blocks used}` (and tell accelerate's
    loader: it calls `set_epoch` with its own count). The next iteration tokenizes these blocks
    again, to the same tokens in the same shuffled order, and skips them. `state_dict` counts the
    blocks handed out; a DataLoader asks ahead of the training, so save `{"epoch": epoch, "blocks":
    steps * blocks_per_step}` instead.

    A stream has no total to divide by: bits per character need the `characters_per_token` of a
    held-out `PackedTokens`.

    Args:
        documents: Strings, read once in each iteration.
        tokenizer: Any tokenizer of the `transformers` library.
        sequence_length: T, the number of tokens in a block.
        shuffle_buffer: Number of blocks kept back, from which the next one is drawn at random; 0
            keeps the order.
        seed: Decides, together with the epoch, what is drawn.

    Raises:
        ValueError: at the end of an iteration, if there were fewer than T tokens.
        RuntimeError: in a DataLoader with more than one worker, which would all read the same
            documents.
    """

    def __init__(
        self,
        documents: Iterable[str],
        tokenizer: PreTrainedTokenizerBase,
        sequence_length: int,
        *,
        shuffle_buffer: int = 0,
        seed: int = 0,
    ):
        self.documents = documents
        self.tokenizer = tokenizer
        self.sequence_length = sequence_length
        self.shuffle_buffer = shuffle_buffer
        self.seed = seed
        self.load_state_dict({"epoch": 0, "blocks": 0})

    def set_epoch(self, epoch: int) -> None:
        """Chooses another shuffled order. `accelerate` calls it."""
        self.epoch = epoch

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "blocks": self._handed_out}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch = state["epoch"]
        self._handed_out = self._skip = state["blocks"]

    def has_blocks(self, num_blocks: int) -> bool:
        """True if there are this many blocks. Reads that many from the beginning."""
        return sum(1 for _ in islice(self._blocks(), num_blocks)) == num_blocks

    def fingerprint(self) -> dict[str, int]:
        """Numbers that another text, tokenizer, length or order changes.

        They are those of the first sequences: a stream has no end that one could wait for.
        """
        checksum = 0
        for block in islice(self._blocks(), FINGERPRINT):
            checksum = zlib.crc32(block.tobytes(), checksum)

        return {
            "sequence length": self.sequence_length,
            "shuffle buffer": self.shuffle_buffer,
            "seed of the order": self.seed,
            f"checksum of the stream's first {FINGERPRINT} sequences": checksum,
        }

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise RuntimeError(
                f"StreamingPackedTokens needs num_workers <= 1 in its DataLoader: {worker.num_workers}"
            )

        self._handed_out = self._skip
        self._skip = 0
        for block in islice(self._shuffled(self._blocks()), self._handed_out, None):
            self._handed_out += 1
            yield {"input_ids": torch.from_numpy(block.astype(np.int64))}  # (T,)

    def _blocks(self) -> Iterator[np.ndarray]:
        length = self.sequence_length
        total = 0
        rest = np.empty(0, np.uint8)
        characters = CharacterCount(self.tokenizer)
        for tokens, *_ in _encode(self.documents, self.tokenizer, characters):
            total += len(tokens)
            rest = np.concatenate([rest, tokens])
            while len(rest) >= length > 0:
                yield rest[
                    :length
                ].copy()  # a view in the shuffle buffer would keep the whole batch alive
                rest = rest[length:]

        _check_length(total, length, characters)

    def _shuffled(self, blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        draw = random.Random(f"{self.seed} {self.epoch}")
        buffer = list(islice(blocks, self.shuffle_buffer))

        for block in blocks:
            if buffer:
                index = draw.randrange(len(buffer))
                buffer[index], block = block, buffer[index]
            yield block

        draw.shuffle(buffer)
        yield from buffer


def _check_length(num_tokens: int, sequence_length: int, characters: CharacterCount) -> None:
    if 1 <= sequence_length <= num_tokens:
        return

    reason = " Give more text, or ask for shorter sequences."
    if characters.num_characters:
        reason = f" The text has {characters.num_characters:,} characters.{reason}"
    if note := characters.note():
        reason = f" {note} Choose a tokenizer that knows these characters."

    raise ValueError(
        f"no sequence of {sequence_length} tokens can be cut from a text of {num_tokens} tokens.{reason}"
    )


def _encode(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, count: CharacterCount
) -> Iterator[tuple[np.ndarray, int, int]]:
    """Yields the tokens of all documents in order, a batch at a time.

    With them come the numbers of characters and words that they stand for. `count` is told of every
    text.
    """
    highest = vocabulary_size(tokenizer) - 1
    kinds = (np.uint8, np.int16, np.int32)
    dtype = next(kind for kind in kinds if highest <= np.iinfo(kind).max)
    each_a_character = is_of_characters(tokenizer)

    def encode(texts: list[str]) -> list[list[int]]:
        return token_ids_of_all(tokenizer, texts)

    eos = None if is_text8_with_end(tokenizer) else tokenizer.eos_token_id
    between = [eos] if eos is not None else encode([" "])[0]
    last = None

    for batch in _batches(_pieces(documents, encode)):
        texts, begins = zip(*batch, strict=True)
        chunks = [np.empty(0, dtype)]

        for ids, new_document in zip(encode(list(texts)), begins, strict=True):
            if not ids:
                continue

            if new_document and last is not None:
                if eos is None and [last] == ids[:1] == between:
                    ids = ids[1:]  # both documents bring a space of their own, and one is enough
                elif eos is not None or between not in ([last], ids[:1]):
                    chunks.append(np.array(between, dtype))

            chunks.append(np.array(ids, dtype))
            last = (ids or between)[-1]

        tokens = np.concatenate(chunks)
        for text in texts:
            count.add(text)

        num_words = sum(len(text.split()) for text in texts)
        yield tokens, len(tokens) if each_a_character else sum(map(len, texts)), num_words


def _batches(pieces: Iterable[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    batch = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[0])
        if size >= BATCH:
            yield batch
            batch = []
            size = 0

    if batch:
        yield batch


def _pieces(documents: Iterable[str], encode: Callable) -> Iterator[tuple[str, bool]]:
    """Yields (text, True if a document begins with it).

    The tokens of the pieces are those of the documents.
    """
    if isinstance(documents, str):
        # Else each character is a document.
        raise TypeError("documents is one string; give a list of strings.")

    for number, document in enumerate(documents):
        if not isinstance(document, str):
            raise TypeError(
                f"a document is a string, not {type(document).__name__}: {document!r:.80}, document number {number} "
                "(the first one is 0)."
            )

        start = 0
        while start < len(document):
            end = _piece_end(document, start, encode)
            yield document[start:end], start == 0
            start = end


def _piece_end(text: str, start: int, encode: Callable) -> int:
    """The end of the piece of `text` that begins at `start`, chosen so that no token changes.

    Most tokenizers split before a space anyway. But text8's rules merge it with a full stop before
    it, and some SentencePiece tokenizers add a space to the front of each piece. So the tokenizer
    is asked about each place, with 64 characters around it: more than it looks at. If it rejects
    100 places it will reject all: then the piece is the rest of the text.
    """
    if len(text) - start <= PIECE:
        return len(text)

    for space in islice(re.compile(r"(?<=\S)\s(?=\S)").finditer(text, start + PIECE), 100):
        cut = space.start()
        left, right = text[max(start, cut - 64) : cut], text[cut : cut + 64]
        parts = encode([left, right, left + right])
        if parts[0] + parts[1] == parts[2]:
            return cut

    return len(text)


def pack_split(
    name: str,
    documents: Iterable[str],
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
) -> PackedTokens:
    """Returns a split of some data, packed.

    Raises:
        ValueError: If there is not a single sequence in it. The message names the split and its
            source.
    """
    try:
        return PackedTokens(documents, tokenizer, sequence_length)
    except ValueError as error:
        raise ValueError(f"The {name} split of {source} is too short: {error}") from None
