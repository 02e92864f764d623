"""Text files and paths: reading, errors that name the place, and what is held out of a text."""

import json
import os
import random
import re
from argparse import ArgumentTypeError
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

HELD_OUT = 0.05  # of the text, for each of validation and test

# Files of documents, and how the `datasets` library loads them.
TABLES: dict[str, dict[str, Any]] = {
    ".json": {"path": "json"},
    ".jsonl": {"path": "json"},
    ".csv": {"path": "csv", "keep_default_na": False},  # "None" and "NA" are words
    ".tsv": {"path": "csv", "sep": "\t", "keep_default_na": False},
    ".parquet": {"path": "parquet"},
}
OTHER_DATA = {*TABLES, ".arrow", ".gz", ".zip", ".zst", ".py"}
DESCRIPTIONS = {"meta.json", "metadata.json", "info.json", "dataset_info.json"}  # no documents
TEXT_FILE_SPLITS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}


def read_text(path: str | os.PathLike) -> str:
    """The content of a UTF-8 text file, with "\\n" at the end of each line.

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
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        byte = content[error.start]
        raise ValueError(
            f"{path} is not UTF-8 text: byte 0x{byte:02x} at position {error.start}. Save it as UTF-8, or convert it, "
            "for example by `iconv -f ISO-8859-1 -t UTF-8`."
        ) from None

    if not text.strip():
        raise ValueError(f"{path} is empty: there is no text in it. Give a file with text.")

    return text


def output_file(name: str) -> Path:
    """The path of a file to write, whose folder is made: the `type` of an option of argparse.

    So a path that can't be written to is an error before the work begins.

    Raises:
        ArgumentTypeError: If it can't.
    """
    path = Path(name)
    if path.is_dir():
        raise ArgumentTypeError(f"{name} is a folder: give the name of a file in it.")

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentTypeError(f"{name} can't be written: {error}.") from None

    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ArgumentTypeError(f"{name} can't be written: it is read-only. Choose another place.")

    return path


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: If there is no such file, or something else in it. The message names the place.
    """
    try:
        content = json.loads(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} can't be read as JSON: {error}") from None

    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold an object, {{...}}, not {type(content).__name__}.")

    return content


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
    if path.exists() or not (is_path or path.suffix.lower() in suffixes):
        return None

    there = next(each for each in path.absolute().parents if each.is_dir())
    part = path.absolute().relative_to(there).parts[0]
    near = get_close_matches(part, [each.name for each in there.iterdir()], n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else "."
    return f"There is no file or folder {name}: {there} has no {part}{hint} {advice}"


def text_files(folder: Path) -> list[Path]:
    """The text files of a folder and its subfolders; none if it has data files of another kind."""
    if not folder.is_dir():
        return []

    hidden = re.compile(r"(^|/)[._]")
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files = [path for path in files if not hidden.search(path.relative_to(folder).as_posix())]
    files = [path for path in files if path.name.lower() not in DESCRIPTIONS]
    if any(path.suffix.lower() in OTHER_DATA for path in files):
        return []

    return [path for path in files if path.suffix.lower() == ".txt"]


def split_files(folder: Path, files: list[Path]) -> dict[str, list[str]]:
    """The texts of UTF-8 files in three splits. Each file is a document.

    A file belongs to the split that its name, or that of a folder over it, says ("train",
    "validation", "test" and the like). Without a file for validation or test, it is held out by
    `split_texts`.

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

    held_out = split_texts(named["train"])
    return {name: held_out[name] if name in ("train", *missing) else named[name] for name in named}


def split_texts(texts: list[str]) -> dict[str, list[str]]:
    """Holds out whole texts by `split_documents`; if they are too few or too long, cuts each."""
    splits = split_documents(texts)
    if all(splits.values()):
        return splits

    pieces = [split_text(text) for text in texts]
    return {name: [text for piece in pieces for text in piece[name]] for name in splits}


def split_documents(documents: Iterable[str]) -> dict[str, list[str]]:
    """Shuffles documents, always in the same way, and holds out 5% of their characters twice.

    A document that is longer than these 5% is never held out: training would lose too much.

    Example:
        >>> splits = split_documents(f"document {i:02}" for i in range(100))
        >>> {name: len(documents) for name, documents in splits.items()}
        {'train': 90, 'validation': 5, 'test': 5}
    """
    documents = list(documents)
    random.Random(0).shuffle(documents)
    target = HELD_OUT * sum(map(len, documents))
    splits = {"train": [], "validation": [], "test": []}
    before = 0  # characters in the documents up to here, without those that are too long

    for document in documents:
        if len(document) > target:
            splits["train"].append(document)
            continue

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
