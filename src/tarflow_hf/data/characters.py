"""From text to tokens, and what a tokenizer loses on the way.

token_ids(tokenizer, text)          # the tokens of a text: the same in training, scoring and sampling
characters = CharacterCount(tokenizer)
characters.add(text)
characters.note()                   # None, or a sentence on what was lost
"""

import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from tokenizers import models
from transformers import PreTrainedTokenizerBase

SAMPLE_SIZE = 8  # characters that a note shows

SYMBOLS = " abcdefghijklmnopqrstuvwxyz"  # those of text8, in the order of their ids
END = "<|endoftext|>"  # the token behind them, for padding and ends


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Returns the tokens of a text, without a special token in front or behind.

    Training packs these, so scores, prompts and gaps are made of these.

    Example:
        >>> from tarflow_hf.data import character_tokenizer
        >>> token_ids(character_tokenizer(), "Ab c")
        [1, 2, 0, 3]
    """
    return token_ids_of_all(tokenizer, [text])[0] if text else []


def token_ids_of_all(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Returns `token_ids` of each text, in one call of the tokenizer."""
    if not texts:
        return []

    options = OPTIONS
    if is_text8_with_end(tokenizer):  # no text has its end token, even where one spells its name
        options = OPTIONS | {"split_special_tokens": True}

    return tokenizer(texts, **options)["input_ids"]


OPTIONS = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}


def continued_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Returns the tokens of a text that stands behind other text.

    Tokenizers of SentencePiece's kind put a space, "▁", in front of a text. Behind other text there
    is none.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> backend = Tokenizer(models.BPE({"▁": 0, "a": 1, "b": 2}, []))
        >>> backend.pre_tokenizer = pre_tokenizers.Metaspace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
        >>> token_ids(tokenizer, "ab"), continued_ids(tokenizer, "ab"), continued_ids(tokenizer, " ab")
        ([0, 1, 2], [1, 2], [0, 1, 2])
    """
    ids = token_ids(tokenizer, text)
    is_space_put = ids and tokenizer.convert_ids_to_tokens(ids[0]).startswith("▁")
    if not is_space_put or text[0].isspace():
        return ids

    for before in "a0,\n":  # one that does not merge with the text
        head, both = token_ids_of_all(tokenizer, [before, before + text])
        if both[: len(head)] == head:
            return both[len(head) :]

    return ids


def checked_ids(tokenizer: PreTrainedTokenizerBase, text: str, name: str = "the text") -> list[int]:
    """Returns the tokens of a text of which something is left.

    Args:
        name: Says in the error which text it is, such as "text 3".

    Raises:
        ValueError: If the text has no tokens, or only white space is left of it.
    """
    ids = token_ids(tokenizer, text)
    known = [token for token in ids if token != tokenizer.unk_token_id]
    is_lost = not known or (text.strip() and not tokenizer.decode(known).strip())
    if is_lost:
        raise ValueError(
            f"Nothing is left of {name}: the tokenizer knows none of its {len(text):,} characters ({text[:40]!r}). "
            "Give other text, or a model with a tokenizer for it."
        )

    return ids


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the smallest vocabulary that has all ids of a tokenizer's texts: the highest one + 1.

    It is more than `len(tokenizer)` where ids are left out, and less for `character_tokenizer`,
    whose token for ends and padding no text has.

    Example:
        >>> from tarflow_hf.data import character_tokenizer
        >>> vocabulary_size(character_tokenizer())
        27
    """
    if is_text8_with_end(tokenizer):
        return len(SYMBOLS)

    return max(len(tokenizer), max(tokenizer.get_vocab().values(), default=-1) + 1)


def token_with_highest_id(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the token of the highest id that texts have: `vocabulary_size` - 1."""
    vocabulary = tokenizer.get_vocab()
    if is_text8_with_end(tokenizer):
        del vocabulary[END]

    return max(vocabulary, key=vocabulary.__getitem__)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int, advice: str) -> None:
    """Checks that a model of `vocab_size` knows all tokens of a tokenizer's texts.

    Args:
        advice: The end of the error's message.

    Raises:
        ValueError: If it does not.

    Example:
        >>> from tarflow_hf.data import character_tokenizer
        >>> check_vocabulary(character_tokenizer(), 26, "Give 27.")
        Traceback (most recent call last):
        ValueError: The tokenizer has 27 tokens, more than the model's vocab_size, 26: 'z' has id 26. Give 27.
    """
    needed = vocabulary_size(tokenizer)
    if needed > vocab_size:
        raise ValueError(
            f"The tokenizer has {min(len(tokenizer), needed)} tokens, more than the model's vocab_size, {vocab_size}: "
            f"{token_with_highest_id(tokenizer)!r} has id {needed - 1}. {advice}"
        )


def special_token_ids(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> dict[str, int]:
    """Returns the `eos_token_id` and `pad_token_id` of a configuration: those that the model knows.

    Example:
        >>> from tarflow_hf.data import character_tokenizer
        >>> tokenizer = character_tokenizer(with_end=True)
        >>> special_token_ids(tokenizer, 27), special_token_ids(tokenizer, 28)
        ({}, {'eos_token_id': 27, 'pad_token_id': 27})
    """
    ids = {name: getattr(tokenizer, name) for name in ("eos_token_id", "pad_token_id")}
    return {name: token for name, token in ids.items() if token is not None and token < vocab_size}


def is_of_characters(tokenizer: PreTrainedTokenizerBase) -> bool:
    """True if each token of a text is a single character."""
    return is_text8_with_end(tokenizer) or all(len(token) == 1 for token in tokenizer.get_vocab())


def is_of_words(tokenizer: PreTrainedTokenizerBase) -> bool:
    """True if tokens are whole words, so that a character says nothing on its own.

    Example:
        >>> from tarflow_hf.data import character_tokenizer
        >>> is_of_words(character_tokenizer())
        False
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not isinstance(backend.model, models.WordLevel):
        return False

    special = set(tokenizer.all_special_tokens)
    return any(len(token) > 1 for token in tokenizer.get_vocab() if token not in special)


def is_text8_with_end(tokenizer: PreTrainedTokenizerBase) -> bool:
    """True for `character_tokenizer(with_end=True)`, if nobody has added another token."""
    is_small = len(tokenizer) == len(SYMBOLS) + 1
    return is_small and set(tokenizer.get_vocab()) == {*SYMBOLS, END}


def say_what_is_lost(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], what: str = "the text"
) -> None:
    """Writes to stderr how many characters of the texts the tokenizer drops, if any."""
    characters = CharacterCount(tokenizer)
    for text in texts:
        characters.add(text)

    if note := characters.note(what):
        print(note, file=sys.stderr)


@dataclass
class CharacterCount:
    """Counts the characters of texts, and those of them that a tokenizer drops.

    A character is dropped if it has no tokens, an unknown one, or only white space comes back.
    One that comes back otherwise (in small letters, spelled out) is not. White space does not
    count as dropped. A tokenizer of whole words drops words: the characters of unknown ones count.

    Attributes:
        num_characters: The number of characters in all.
        lost: The number of times that each dropped character occurred.

    Example:
        >>> from tarflow_hf.data import character_tokenizer
        >>> characters = CharacterCount(character_tokenizer())
        >>> characters.add("Größe 7")
        >>> characters.note()
        "2 of 7 characters of the text (28.6%) are dropped by the tokenizer, such as 'ö', 'ß'."
    """

    tokenizer: PreTrainedTokenizerBase
    num_characters: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    _is_lost: dict[str, bool] = field(default_factory=dict)

    @property
    def num_lost(self) -> int:
        return self.lost.total()

    def __post_init__(self):
        self._is_of_words = is_of_words(self.tokenizer)

    def add(self, text: str) -> None:
        if self._is_of_words:
            self.num_characters += len(text)
            self.lost.update("".join(self._unknown_words(text)))
            return

        counts = Counter(text)
        self._learn([character for character in counts if character not in self._is_lost])
        self.num_characters += len(text)
        self.lost.update({c: n for c, n in counts.items() if self._is_lost[c]})

    def _unknown_words(self, text: str) -> list[str]:
        """The words that became the unknown token, but for those that spell its name."""
        found = self.tokenizer(text, return_offsets_mapping=True, **OPTIONS)
        pairs = zip(found["input_ids"], found["offset_mapping"], strict=True)
        words = [text[a:b] for token, (a, b) in pairs if token == self.tokenizer.unk_token_id]
        return [word for word in words if word != self.tokenizer.unk_token]

    def _learn(self, characters: list[str]) -> None:
        unknown, decode = self.tokenizer.unk_token_id, self.tokenizer.decode
        for character, ids in zip(
            characters, token_ids_of_all(self.tokenizer, characters), strict=True
        ):
            is_known = bool(ids) and (unknown is None or unknown not in ids)
            is_kept = character.isspace() or (is_known and decode(ids).strip() != "")
            self._is_lost[character] = not is_kept

    def note(self, what: str = "the text") -> str | None:
        """A sentence on what was dropped, with a sample; None if nothing was."""
        if not self.num_lost:
            return None

        sample = ", ".join(repr(character) for character, _ in self.lost.most_common(SAMPLE_SIZE))
        share = self.num_lost / self.num_characters
        return (
            f"{self.num_lost:,} of {self.num_characters:,} characters of {what} ({share:.1%}) are dropped by the "
            f"tokenizer, such as {sample}."
        )
