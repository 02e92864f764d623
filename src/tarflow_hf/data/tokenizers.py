"""The tokenizer of text8, and the tokenizer of a name."""

from tokenizers import Regex, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .characters import SYMBOLS
from .corpora import penn_treebank_tokenizer, symbol_tokenizer, word_tokenizer
from .files import lost_path
from .python_docs import PYTHON_DOCS
from .sources import load_splits

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def character_tokenizer(with_end: bool = False) -> PreTrainedTokenizerFast:
    """The tokenizer of text8: 27 symbols, space = 0 and a = 1 to z = 26, and no special tokens.

    Its normalizer applies the rules of text8: digits are spelled out, A-Z become lower case, and
    every run of anything else becomes one space. It is a part of the tokenizer, so a saved one
    needs no code but `AutoTokenizer`.

    Args:
        with_end: Add "<|endoftext|>" = 27 for padding and ends, which the library's batches need.
            No text has it, not even between two documents, where text8 has a space: a model of such
            texts has 27 tokens. One that is to know ends has to learn them, after
            `model.resize_token_embeddings(28)`.

    References:
        Mahoney, About the Test Data: http://mattmahoney.net/dc/textdata

    Example:
        >>> tokenizer = character_tokenizer()
        >>> tokenizer("Ab, z").input_ids
        [1, 2, 0, 26]
        >>> tokenizer.decode(tokenizer("In 1984: (war) is PEACE").input_ids)
        'in one nine eight four war is peace'
    """
    rules = normalizers.Sequence(
        [
            *(normalizers.Replace(str(digit), f" {word} ") for digit, word in enumerate(DIGITS)),
            normalizers.Replace(Regex("[^A-Za-z]+"), " "),
            normalizers.Lowercase(),  # last, where only ASCII is left: the Kelvin sign is no k
        ]
    )
    return symbol_tokenizer(SYMBOLS, rules, with_end)


def make_tokenizer(
    name: str | None, source: str = PYTHON_DOCS, text_column: str = "text"
) -> PreTrainedTokenizerBase:
    """The tokenizer of a name, or by default that of a corpus.

    Args:
        name: "text8" (27 characters), "ptb" (the 50 symbols of Penn Treebank), "words" (those of
            the source's training text), or any `AutoTokenizer`. None is that of the source: "ptb"
            of "ptb:FOLDER", "words" of "wikitext2:FOLDER", else "text8".
        source, text_column: As `load_splits` takes them.

    Raises:
        FileNotFoundError: If the name is a path that leads nowhere.
    """
    if name is None:
        name = {"ptb": "ptb", "wikitext2": "words"}.get(source.partition(":")[0], "text8")
    if name == "text8":
        return character_tokenizer(with_end=True)
    if name == "ptb":
        return penn_treebank_tokenizer()
    if name == "words":
        return word_tokenizer(load_splits(source, text_column=text_column)["train"])

    advice = "Give a folder with a tokenizer, text8, ptb, words, or a repository of the Hub."
    if reason := lost_path(name, advice):
        raise FileNotFoundError(reason)

    return AutoTokenizer.from_pretrained(name)
