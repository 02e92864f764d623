"""From the name of a corpus to its documents, in three splits."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from .corpora import corpus_of, load_corpus
from .files import (
    HELD_OUT,
    TABLES,
    lost_path,
    read_text,
    split_documents,
    split_files,
    split_text,
    split_texts,
    text_files,
)
from .progress import progress_bar
from .python_docs import PYTHON_DOCS, python_documentation

BINARY_SUFFIXES = {".arrow", ".parquet"}
DATA_SUFFIXES = {".txt", *TABLES, *BINARY_SUFFIXES}
LONGEST_REASON = 500  # characters of an error of another library
MAX_HELD_OUT_DOCUMENTS = 1000  # of a dataset without these splits; the number taken from a stream


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
            - the path of a file of documents, `*.json`, `*.jsonl`, `*.csv`, `*.tsv` or `*.parquet`, each
              row a document: see `split_texts`; of a stream, see the next;
            - a dataset on the Hub, or a folder of other data files. Its own splits are used; where it has
              no "validation" or no "test", these are its first rows (5%, at most 1,000; of a stream
              1,000), and "train" is the rest.
        text_column: Column of a dataset, or of a file of documents, that holds the text.
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
    if _is_table(source) and not streaming:
        return split_texts(_documents_of(source, text_column))
    if Path(source).is_file() and not _is_table(source):
        return split_text(read_text(source))
    if source and (files := text_files(Path(source))):
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

    _check_column(splits["train"], source, text_column)
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


def held_out_documents(source: str, text_column: str = "text") -> Iterable[str]:
    """The text to evaluate a model on.

    A file, of text or of documents, counts as a whole. Anything else that `load_splits` takes has a
    test split.

    Raises:
        ImportError, ValueError: see `load_splits` and `read_text`.
    """
    if _is_table(source):
        return _documents_of(source, text_column)
    if Path(source).is_file():
        return [read_text(source)]

    return load_splits(source, text_column=text_column)["test"]


def _is_table(source: str) -> bool:
    """True of a file of documents."""
    path = Path(source)
    return path.suffix.lower() in TABLES and path.is_file()


def _documents_of(source: str, text_column: str) -> list[str]:
    """The texts of all rows of a file of documents."""
    rows = _load_dataset(source, None, streaming=False)["train"]
    _check_column(rows, source, text_column)
    return list(_Rows(rows, source, "train", text_column, 0))


def _check_column(rows: Any, source: str, text_column: str) -> None:
    """Raises ValueError if a dataset has no such column; the message says which it has."""
    with _naming_files(source):  # a stream may not know them
        columns = rows.column_names or next(iter(rows), {})

    if text_column not in columns:
        names = ", ".join(map(repr, columns))
        is_mixed = any(Path(source).glob("*.txt"))
        hint = " Its text files are read if it has no data files beside them." if is_mixed else ""
        raise ValueError(
            f"the dataset {source!r} has no column {text_column!r}; choose its text column among {names}.{hint}"
        )


def _load_dataset(source: str, dataset_config: str | None, streaming: bool) -> dict[str, Any]:
    """The splits of a dataset; of a file of documents, "train".

    The error about a file that can't be read names it.
    """
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
        if _is_table(source):
            options = TABLES[Path(source).suffix.lower()]
            return dict(load_dataset(**options, data_files=source, streaming=streaming))
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
    files = sorted(folder.rglob("*")) if is_folder else [folder] if folder.is_file() else []
    files = [path for path in files if path.suffix.lower() in DATA_SUFFIXES]

    for path in files:
        if path.suffix.lower() not in BINARY_SUFFIXES:
            text = read_text(path)
            if path.suffix.lower() == ".jsonl":
                _check_lines(path, text)

    if files:
        what = str(files[0]) if len(files) == 1 else f"A file in {source}"
        raise ValueError(f"{what} can't be read: {reason}. Mend it, or leave it out.") from None

    raise ValueError(
        f"{source!r} is neither {PYTHON_DOCS!r}, nor a file or folder here, nor a dataset that loads: {reason}"
    ) from None


@contextmanager
def _naming_files(source: str) -> Iterator[None]:
    """Makes whatever is raised in reading local files an error that names the file."""
    try:
        yield
    except Exception as error:  # each kind of file has its own
        if not Path(source).exists():
            raise
        _raise_fault(source, error)


def _check_lines(path: Path, text: str) -> None:
    """Raises ValueError for the first line that is no JSON."""
    for number, line in enumerate(text.split("\n"), 1):
        try:
            json.loads(line or "null")
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number}, can't be read as JSON: {error}. Mend the line, or leave it out."
            ) from None


class _Rows:
    """The texts of a split, in their order, as often as one likes.

    Raises:
        TypeError: In an iteration, at a row without a text. The message names the row.
        ValueError: In an iteration, if all rows are held out for other splits, or if a file can't be
            read. The message names it.
    """

    def __init__(self, rows: Any, source: str, split: str, column: str, first: int):
        self.rows = rows.select_columns([column])
        self.source = source
        self.split = split
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
        bar = progress_bar(f"reading {self.split}", "row", total)
        with bar, _naming_files(self.source):
            for row in self.rows:
                yield row
                bar.update()
