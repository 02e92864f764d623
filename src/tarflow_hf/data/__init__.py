"""Corpora, the character tokenizer, and packing: from a name to blocks of token ids.

    splits = load_splits("python-docs")                    # {"train": documents, "validation": ..., "test": ...}
    tokenizer = character_tokenizer()                      # or any AutoTokenizer
    train = PackedTokens(splits["train"], tokenizer, 256)  # or StreamingPackedTokens

A document is a string. Only a dataset of the Hub needs a network, and only it or a folder the
`datasets` library.
"""

import ast
import json
import os
import random
import re
import sysconfig
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from tokenizers import Regex, normalizers
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .characters import (
    SYMBOLS,
    CharacterCount,
    checked_ids,
    is_of_characters,
    is_text8_with_end,
    say_what_is_lost,
    token_ids,
    token_ids_of_all,
    token_with_highest_id,
    vocabulary_size,
)
from .corpora import (
    corpus_of,
    is_of_sentences,
    load_corpus,
    penn_treebank_tokenizer,
    symbol_tokenizer,
    word_tokenizer,
)
from .sentences import SentenceTokens, sentence_splits

__all__ = [
    "PYTHON_DOCS",
    "CharacterCount",
    "PackedTokens",
    "SentenceTokens",
    "StreamingPackedTokens",
    "character_tokenizer",
    "checked_ids",
    "corpus_of",
    "held_out_documents",
    "is_of_characters",
    "is_of_sentences",
    "load_corpus",
    "load_splits",
    "lost_path",
    "make_tokenizer",
    "penn_treebank_tokenizer",
    "python_documentation",
    "read_json",
    "read_text",
    "say_what_is_lost",
    "sentence_splits",
    "split_documents",
    "split_text",
    "symbol_tokenizer",
    "token_ids",
    "token_with_highest_id",
    "vocabulary_size",
    "word_tokenizer",
]

PYTHON_DOCS = "python-docs"
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

BINARY_SUFFIXES = {".arrow", ".parquet"}
DATA_SUFFIXES = {".txt", ".json", ".jsonl", ".csv", ".tsv", *BINARY_SUFFIXES}
BAR_DELAY = 5  # seconds before a bar appears
HELD_OUT = 0.05  # of the text, for each of validation and test
FINGERPRINT = 64  # sequences of a stream that tell it from another one
LONGEST_REASON = 500  # characters of an error of another library
MAX_HELD_OUT_DOCUMENTS = 1000  # of a dataset without these splits; the number taken from a stream

PIECE = 100_000  # characters: longer documents are tokenized in pieces, which bounds the memory this takes
BATCH = (
    1_000_000  # characters given to the tokenizer in one call, which spreads them over the cores
)


def python_documentation() -> list[str]:
    """The documentation in Python's own standard library: English text on every machine.

    A document is a topic of `pydoc_data.topics` (what `help("while")` prints) or all docstrings of
    one module. Files are parsed, never imported; tests are left out. A docstring that occurs twice
    is kept once, so that held-out text is no copy of training text. The order depends on the files
    alone; they differ from one Python to the next.

    Returns:
        About 700 documents, 2.2 million characters (2.1 million in the 27 symbols of text8).

    Raises:
        FileNotFoundError: if this Python was installed without `pydoc_data` or without the
            library's sources.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    topics = library / "pydoc_data" / "topics.py"
    if not topics.is_file():
        raise FileNotFoundError(
            f"{topics} does not exist: this Python was installed without its documentation or its sources. "
            f"Install the full standard library, or train on a text file instead of {PYTHON_DOCS!r}."
        )

    table = next(
        node.value for node in ast.parse(topics.read_bytes()).body if isinstance(node, ast.Assign)
    )
    documents = list(
        dict.fromkeys(ast.literal_eval(table).values())
    )  # a dict is a set that keeps its order
    seen = set()

    for folder, subfolders, files in os.walk(library):
        excluded = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
        subfolders[:] = sorted(
            set(subfolders) - excluded
        )  # in place: tells os.walk where to go, and in which order

        for path in (Path(folder, name) for name in sorted(files) if name.endswith(".py")):
            docstrings = [text for text in dict.fromkeys(_docstrings(path)) if text not in seen]
            seen.update(docstrings)
            if docstrings:
                documents.append("\n\n".join(docstrings))

    return documents


def _docstrings(path: Path) -> list[str]:
    try:
        with warnings.catch_warnings(
            action="ignore"
        ):  # old escape sequences in the library concern nobody here
            nodes = list(ast.walk(ast.parse(path.read_bytes())))
    except (
        SyntaxError,
        ValueError,
    ):  # ValueError: null bytes, or not in the encoding that the file declares
        return []

    nodes = [
        n
        for n in nodes
        if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    nodes.sort(
        key=lambda node: getattr(node, "lineno", 0)
    )  # ast.walk goes breadth first; the module has no line

    return [docstring for node in nodes if (docstring := ast.get_docstring(node))]


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


def make_tokenizer(name: str | None, source: str = PYTHON_DOCS) -> PreTrainedTokenizerBase:
    """The tokenizer of a name, or by default that of a corpus.

    Args:
        name: "text8" (27 characters), "ptb" (the 50 symbols of Penn Treebank), "words" (those of
            the source's training text), or any `AutoTokenizer`. None is that of the source: "ptb"
            of "ptb:FOLDER", "words" of "wikitext2:FOLDER", else "text8".
        source: As of `load_splits`.

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
        return word_tokenizer(load_splits(source)["train"])

    advice = "Give a folder with a tokenizer, text8, ptb, words, or a repository of the Hub."
    if reason := lost_path(name, advice):
        raise FileNotFoundError(reason)

    return AutoTokenizer.from_pretrained(name)


def load_splits(
    source: str = PYTHON_DOCS,
    *,
    text_column: str = "text",
    dataset_config: str | None = None,
    streaming: bool = False,
) -> Mapping[str, Iterable[str]]:
    """The documents of a corpus, in three splits that share nothing and depend on no seed.

    Args:
        source: One of

            - `"python-docs"`: see `python_documentation` and `split_documents`;
            - `"ptb:FOLDER"` or `"wikitext2:FOLDER"`: a benchmark's corpus, see `load_corpus`;
            - the path of a UTF-8 text file, read without the `datasets` library: see `split_text`;
            - a folder of such files, `*.txt`, each of them a document: see `split_files`;
            - a dataset on the Hub, or a folder of other data files. Its own splits are used; where it has
              no "validation" or no "test", these are its first rows (5%, at most 1,000; of a stream
              1,000), and "train" is the rest.
        text_column: Column of a dataset that holds the text.
        dataset_config: Configuration of a dataset, as in `datasets.load_dataset(source,
            dataset_config)`.
        streaming: Read a dataset while it is downloaded, keeping nothing on disk.

    Returns:
        `{"train": documents, "validation": documents, "test": documents}`, each iterable as often
        as needed.

    Raises:
        ImportError: if `source` needs the `datasets` library and it is not installed.
        FileNotFoundError: if the folder of a benchmark's corpus lacks a file.
        ValueError: if the file is empty, binary or not UTF-8, if `source` is neither a file nor a
            dataset, if the dataset has no such column or no "train" split, or if it is too short to
            hold anything out.
    """
    if source == PYTHON_DOCS:
        return split_documents(python_documentation())
    if corpus_of(source) is not None:
        return load_corpus(source)
    if Path(source).is_file():
        return split_text(read_text(source))
    if source and (files := _text_files(Path(source))):
        return split_files(Path(source), files)

    advice = f"Give a UTF-8 text file, a folder of them, {PYTHON_DOCS!r}, or a dataset of the Hub."
    if reason := lost_path(source, advice, DATA_SUFFIXES):
        raise ValueError(
            f"{source!r} is neither {PYTHON_DOCS!r}, nor a file or folder here, nor a dataset: {reason}"
        )

    splits = _load_dataset(source, dataset_config, streaming)
    if "train" not in splits:
        raise ValueError(
            f"the dataset {source!r} has no split 'train', only {', '.join(map(repr, splits))}. Give one that has, or "
            "rename one of these."
        )

    with _naming_files(source):  # a stream may not know them
        columns = splits["train"].column_names or next(iter(splits["train"]), {})

    if text_column not in columns:
        names = ", ".join(map(repr, columns))
        raise ValueError(
            f"the dataset {source!r} has no column {text_column!r}; choose its text column among {names}."
        )

    missing = [name for name in ("validation", "test") if name not in splits]
    num_rows = MAX_HELD_OUT_DOCUMENTS

    if missing and not streaming:
        num_rows = min(num_rows, int(HELD_OUT * len(splits["train"])))
        if num_rows == 0:
            raise ValueError(
                f"the dataset {source!r} has no split {missing[0]!r}, and its {len(splits['train'])} training rows "
                f"are too few to hold out {HELD_OUT:.0%} of them. Give it such a split, or more rows."
            )

    first = dict.fromkeys(splits, 0)
    for name in missing:
        splits[name], splits["train"] = (
            splits["train"].take(num_rows),
            splits["train"].skip(num_rows),
        )
        first[name], first["train"] = first["train"], first["train"] + num_rows

    return {
        name: _Rows(
            splits[name], source, "train" if name in missing else name, text_column, first[name]
        )
        for name in ("train", "validation", "test")
    }


def lost_path(name: str, advice: str, suffixes: Iterable[str] = ()) -> str | None:
    """Returns what to say of a path that leads nowhere, which the Hub would be asked for in vain.

    None if it leads somewhere, or if it may be a name of the Hub.

    Args:
        name: The path.
        advice: A sentence on what to give.
        suffixes: Those of files: no name of the Hub ends with them.

    Example:
        >>> lost_path("no/such/folder", "Give another.").partition(": ")[0]
        'There is no file or folder no/such/folder'
    """
    path = Path(name)
    is_path = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if path.exists() or not (is_path or path.suffix in suffixes):
        return None

    there = next(each for each in path.absolute().parents if each.is_dir())
    part = path.absolute().relative_to(there).parts[0]
    near = get_close_matches(part, [each.name for each in there.iterdir()], n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else "."
    return f"There is no file or folder {name}: {there} has no {part}{hint} {advice}"


def _load_dataset(source: str, dataset_config: str | None, streaming: bool) -> dict[str, Any]:
    """The splits of a dataset; of a folder whose files can't be read, an error that names one."""
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise ImportError(
            f"{source!r} is not a text file here. To load it as a dataset, `pip install datasets` ({error})."
        ) from None

    try:
        if not source:
            raise ValueError("the name is empty")
        return dict(load_dataset(source, dataset_config, streaming=streaming))
    except (OSError, ValueError, DatasetsError) as error:
        # DatasetNotFoundError and ConnectionError are OSErrors.
        _raise_fault(source, error)


def _raise_fault(source: str, error: Exception) -> NoReturn:
    """Raises a ValueError that names the file and line at which the `datasets` library gave up.

    A file that can't be read is the cause of its error, which names neither.
    """
    reason = str(error.__cause__ or error)[:LONGEST_REASON]
    folder = Path(source)
    is_folder = source not in ("", ".") and folder.is_dir()
    files = [x for x in sorted(folder.rglob("*")) if x.suffix in DATA_SUFFIXES] if is_folder else []

    for path in files:
        if path.suffix not in BINARY_SUFFIXES:
            text = read_text(path)
            if path.suffix == ".jsonl":
                _check_lines(path, text)

    if files:
        what = str(files[0]) if len(files) == 1 else f"A file in {source}"
        raise ValueError(f"{what} can't be read: {reason}. Mend it, or leave it out.") from None

    raise ValueError(
        f"{source!r} is neither {PYTHON_DOCS!r}, nor a file or folder here, nor a dataset that loads: {reason}"
    ) from None


@contextmanager
def _naming_files(source: str) -> Iterator[None]:
    """Makes whatever is raised in reading files of a folder an error that names the file."""
    try:
        yield
    except Exception as error:  # each kind of file has its own
        if not Path(source).is_dir():
            raise
        _raise_fault(source, error)


def _check_lines(path: Path, text: str) -> None:
    """Raises ValueError for the first line that is no JSON."""
    for number, line in enumerate(text.splitlines(), 1):
        try:
            json.loads(line or "null")
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number}, can't be read as JSON: {error}. Mend the line, or leave it out."
            ) from None


def _bar(title: str, unit: str, total: int | None) -> tqdm:
    """A bar that appears if it takes longer; none where the total is not known."""
    options: dict[str, Any] = {"desc": title, "unit": unit, "unit_scale": True, "leave": False}
    return tqdm(total=total, delay=BAR_DELAY, disable=total is None, **options)


class _Rows:
    """The texts of a split, in their order, as often as one likes.

    Raises:
        TypeError: In an iteration, at a row without a text. The message names the row.
        ValueError: In an iteration, if all rows are held out for other splits, or if a file can't be
            read. The message names it.
    """

    def __init__(self, rows: Any, source: str, split: str, column: str, first: int):
        self.rows, self.source, self.split = rows.select_columns([column]), source, split
        self.column, self.first = column, first

    def __iter__(self) -> Iterator[str]:
        number = self.first - 1
        for number, row in enumerate(self._read(), self.first):
            text = row[self.column]
            if not isinstance(text, str):
                raise TypeError(
                    f"{self.source}, split {self.split!r}, row {number} (the first one is 0): {self.column!r} is "
                    f"{text!r:.80}, not a text. Leave the row out, or choose another text column."
                )
            yield text

        if number < self.first and self.first:
            raise ValueError(
                f"{self.source}, split {self.split!r}, has no row behind the first {self.first:,}, which are held out "
                "for validation and test. Give it splits of these names, or read it without streaming."
            )

    def _read(self) -> Iterator[dict[str, Any]]:
        total = len(self.rows) if hasattr(self.rows, "__len__") else None
        bar = _bar(f"reading {self.split}", "row", total)
        with bar, _naming_files(self.source):
            for row in self.rows:
                yield row
                bar.update()


TEXT_FILE_SPLITS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}


def _text_files(folder: Path) -> list[Path]:
    """The text files of a folder and its subfolders; none if it has data files of another kind."""
    if not folder.is_dir():
        return []

    hidden = re.compile(r"(^|/)[._]")
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files = [path for path in files if not hidden.search(path.relative_to(folder).as_posix())]
    others = {".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".zip", ".zst", ".py"}
    if any(path.suffix in others for path in files):
        return []

    return [path for path in files if path.suffix == ".txt"]


def split_files(folder: Path, files: list[Path]) -> dict[str, list[str]]:
    """The texts of UTF-8 files in three splits. Each file is a document.

    A file belongs to the split that its name, or that of a folder over it, says ("train",
    "validation", "test" and the like). Where there is no file for validation or test, whole files
    are held out by `split_documents`. Where those are too few, each file is cut by `split_text`.

    Raises:
        ValueError: If a file is empty, binary or not UTF-8, or if files are named for some splits
            but none for training. The message names it.
    """
    named: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    unnamed = []

    for path in files:
        words = set(
            re.split(r"[^a-z]+", path.relative_to(folder).with_suffix("").as_posix().lower())
        )
        split = next((name for name, keys in TEXT_FILE_SPLITS.items() if words & keys), None)
        (named[split] if split else unnamed).append(read_text(path))

    if not named["train"]:
        named["train"] = unnamed
    if not named["train"]:
        raise ValueError(
            f"{folder} has text files for held-out text only, and none to train on. Add one, such as train.txt."
        )

    missing = [name for name in ("validation", "test") if not named[name]]
    if not missing:
        return named

    held_out = split_documents(named["train"])
    if not all(held_out.values()):
        pieces = [split_text(text) for text in named["train"]]
        held_out = {name: [text for piece in pieces for text in piece[name]] for name in named}

    return {name: held_out[name] if name in ("train", *missing) else named[name] for name in named}


def held_out_documents(source: str) -> Iterable[str]:
    """The text to evaluate a model on.

    A UTF-8 text file counts as a whole. Anything else that `load_splits` takes has a test split.

    Raises:
        ImportError, ValueError: see `load_splits` and `read_text`.
    """
    return [read_text(source)] if Path(source).is_file() else load_splits(source)["test"]


def read_text(path: str | os.PathLike) -> str:
    """The content of a UTF-8 text file.

    Raises:
        ValueError: if the file is empty, binary (contains a null byte), or not UTF-8; says at which
            byte.
    """
    content = Path(path).read_bytes()
    if (position := content.find(b"\0")) >= 0:
        raise ValueError(
            f"{path} is a binary file, not text: there is a null byte at position {position}. Give a UTF-8 text file."
        )

    try:
        text = content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        byte = content[error.start]
        raise ValueError(
            f"{path} is not UTF-8 text: byte 0x{byte:02x} at position {error.start}. Save it as UTF-8, or convert it, "
            "for example by `iconv -f ISO-8859-1 -t UTF-8`."
        ) from None

    if not text.strip():
        raise ValueError(f"{path} is empty: there is no text in it. Give a file with text.")

    return text


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: If there is no such file, or something else in it. The message names the place.
    """
    try:
        content = json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} can't be read as JSON: {error}") from None

    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold an object, {{...}}, not {type(content).__name__}.")

    return content


def split_documents(documents: Iterable[str]) -> dict[str, list[str]]:
    """Shuffles documents, always in the same way, and holds out 5% of their characters twice.

    Example:
        >>> splits = split_documents(f"document {i:02}" for i in range(100))
        >>> {name: len(documents) for name, documents in splits.items()}
        {'train': 90, 'validation': 5, 'test': 5}
    """
    documents = list(documents)
    random.Random(0).shuffle(documents)
    target = HELD_OUT * sum(map(len, documents))
    splits = {"train": [], "validation": [], "test": []}
    before = 0  # characters in the documents up to here

    for document in documents:
        name = "validation" if before < target else "test" if before < 2 * target else "train"
        splits[name].append(document)
        before += len(document)

    return splits


def split_text(text: str) -> dict[str, list[str]]:
    """Cuts a text into 90%, 5% and 5% of its characters.

    Each cut moves back behind a line break, or else a space.

    Example:
        >>> split_text("one two three four five six seven eight nine ten " * 2)["test"]
        ['nine ten ']
    """
    cuts = []
    for end in (round(len(text) * (1 - 2 * HELD_OUT)), round(len(text) * (1 - HELD_OUT))):
        begin = max(0, end - 1000)  # no break this near: cut where it should be
        cuts.append((text.rfind("\n", begin, end) + 1) or (text.rfind(" ", begin, end) + 1) or end)

    parts = {
        "train": text[: cuts[0]],
        "validation": text[cuts[0] : cuts[1]],
        "test": text[cuts[1] :],
    }

    return {name: [part] if part else [] for name, part in parts.items()}


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
        with _bar("tokenizing", "character", total) as bar:
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

        self._handed_out, self._skip = self._skip, 0
        for block in islice(self._shuffled(self._blocks()), self._handed_out, None):
            self._handed_out += 1
            yield {"input_ids": torch.from_numpy(block.astype(np.int64))}  # (T,)

    def _blocks(self) -> Iterator[np.ndarray]:
        length, total, rest = self.sequence_length, 0, np.empty(0, np.uint8)
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
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[0])
        if size >= BATCH:
            yield batch
            batch, size = [], 0

    if batch:
        yield batch


def _pieces(documents: Iterable[str], encode: Callable) -> Iterator[tuple[str, bool]]:
    """Yields (text, True if a document begins with it).

    The tokens of the pieces are those of the documents.
    """
    if isinstance(documents, str):
        raise TypeError(
            "documents is one string; give a list of strings."
        )  # else each character is a document

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
