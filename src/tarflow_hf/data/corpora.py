"""Benchmark corpora in a folder here, under the protocol of their published numbers.

splits = load_corpus("ptb:FOLDER")                # {"train": sentences, "validation": ..., "test": ...}
tokenizer = penn_treebank_tokenizer()
splits = load_corpus("wikitext2:FOLDER")          # each split is one text
tokenizer = word_tokenizer(splits["train"])       # 33,278 words, the end of a line among them

No text comes with this package: the folder holds the files as they are published.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .characters import END
from .files import read_text

PENN_TREEBANK_SYMBOLS = " #$&'*-./0123456789<>N\\abcdefghijklmnopqrstuvwxyz"
LONGEST_SENTENCE = 288  # characters of Penn Treebank, the end not counted
END_OF_LINE = "<eos>"
UNKNOWN_WORD = "<unk>"


@dataclass(frozen=True)
class Corpus:
    """A corpus of three files.

    Attributes:
        name: For messages.
        files: The names that the file of each split may have.
        origin: Says where the text is from, for the error where it is missing.
        is_of_sentences: True if each line is a sequence of its own.
    """

    name: str
    files: dict[str, tuple[str, ...]]
    origin: str
    is_of_sentences: bool


CORPORA = {
    "ptb": Corpus(
        "Penn Treebank",
        {
            "train": ("ptb.train.txt",),
            "validation": ("ptb.valid.txt",),
            "test": ("ptb.test.txt",),
        },
        "Mikolov's preparation of the Penn Treebank is in data/ptb.zip of github.com/timbmg/RNNLM, and in "
        "simple-examples.tgz, data/ptb.*.txt. The text is the Linguistic Data Consortium's: it may be measured on, and "
        "is not passed on here.",
        is_of_sentences=True,
    ),
    "wikitext2": Corpus(
        "WikiText-2",
        {
            "train": ("wiki.train.tokens", "wikitext2-train.txt"),
            "validation": ("wiki.valid.tokens", "wikitext2-valid.txt"),
            "test": ("wiki.test.tokens", "wikitext2-test.txt"),
        },
        "WikiText-2 by words (Merity et al. 2016, CC BY-SA) is wikitext-2-v1.zip, or the configuration "
        "wikitext-2-v1 of the Hub's dataset Salesforce/wikitext, a line of its column text in a line.",
        is_of_sentences=False,
    ),
}


def corpus_of(source: str) -> tuple[Corpus, Path] | None:
    """The corpus and the folder that a source such as "ptb:FOLDER" names; None of other sources."""
    name, colon, folder = source.partition(":")
    return (CORPORA[name], Path(folder)) if colon and name in CORPORA else None


def is_of_sentences(source: str) -> bool:
    """True if each line of the source is a sequence of its own: "ptb:FOLDER"."""
    corpus = corpus_of(source)
    return corpus is not None and corpus[0].is_of_sentences


def load_corpus(source: str) -> dict[str, list[str]]:
    """The texts of the three splits: the sentences of "ptb:FOLDER", a text of "wikitext2:FOLDER".

    Sentences are those of Ziegler and Rush: each line stripped, kept if 1 to 288 characters are
    left. In the published files these are 41,740, 3,356 and 3,735.

    Raises:
        FileNotFoundError: If a file is not there. The message says where the text is from.
        ValueError: If the source names no corpus.

    References:
        Ziegler and Rush, Latent Normalizing Flows for Discrete Sequences, ICML 2019
        (arXiv:1901.10548).
    """
    found = corpus_of(source)
    if found is None:
        names = " or ".join(f"{name}:FOLDER" for name in CORPORA)
        raise ValueError(f"a corpus is {names}, not {source!r}.")

    corpus, folder = found
    splits = {}

    for split, names in corpus.files.items():
        paths = [folder / name for name in names if (folder / name).is_file()]
        if not paths:
            raise FileNotFoundError(
                f"{folder} has no {' or '.join(names)}, the {split} text of {corpus.name}. {corpus.origin}"
            )

        text = read_text(paths[0])
        splits[split] = sentences(text) if corpus.is_of_sentences else [text]

    return splits


def sentences(text: str) -> list[str]:
    """The lines of a text, stripped; empty ones and those of over 288 characters are left out.

    Example:
        >>> sentences(" no it was n't black monday \\n\\n" + "a" * 289)
        ["no it was n't black monday"]
    """
    lines = [line.strip() for line in text.split("\n")]
    return [line for line in lines if 1 <= len(line) <= LONGEST_SENTENCE]


def penn_treebank_tokenizer() -> PreTrainedTokenizerFast:
    """The 49 characters of Mikolov's Penn Treebank, and the end of a sentence: 50 symbols.

    Example:
        >>> tokenizer = penn_treebank_tokenizer()
        >>> len(tokenizer), tokenizer.eos_token_id, tokenizer("<unk> N").input_ids
        (50, 49, [19, 43, 36, 33, 20, 0, 21])
    """
    return symbol_tokenizer(PENN_TREEBANK_SYMBOLS)


def symbol_tokenizer(
    symbols: str, normalizer: normalizers.Normalizer | None = None, with_end: bool = True
) -> PreTrainedTokenizerFast:
    """The tokenizer of some characters, in their order, and an end, which is padding too.

    Args:
        symbols: Other characters are left out.
        normalizer: Changes a text before that.
        with_end: False leaves out the end.

    Example:
        >>> tokenizer = symbol_tokenizer("ab")
        >>> tokenizer("abba").input_ids, tokenizer.eos_token_id
        ([0, 1, 1, 0], 2)
    """
    # BPE without merges, not WordLevel: it splits a text into characters by itself, faster than a
    # pre-tokenizer would.
    vocabulary = {character: index for index, character in enumerate(symbols)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    if normalizer is not None:
        tokenizer.normalizer = normalizer

    special = {"eos_token": END, "pad_token": END} if with_end else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **special,
    )


def word_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """The words of some texts, in the order in which they come; a line ends in "<eos>".

    A word is what stands between spaces. Other words become "<unk>", which is a word of WikiText-2.

    Example:
        >>> tokenizer = word_tokenizer(["the cat\\nthe dog\\n"])
        >>> tokenizer("the dog runs\\n").input_ids, len(tokenizer)
        ([0, 3, 4, 2], 5)
    """
    words = dict.fromkeys(
        word for text in texts for line in text.split("\n") for word in [*line.split(), END_OF_LINE]
    )
    words.setdefault(UNKNOWN_WORD)
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=UNKNOWN_WORD)
    )
    tokenizer.normalizer = normalizers.Replace("\n", f" {END_OF_LINE} ")
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_LINE,
        unk_token=UNKNOWN_WORD,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
