"""Corpora, the character tokenizer and packing."""

import importlib.util
import json
import os
import random
import subprocess
import sys
import sysconfig
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

from tarflow_hf import data
from tarflow_hf.data import (
    PackedTokens,
    StreamingPackedTokens,
    character_tokenizer,
    held_out_documents,
    load_splits,
    packing,
    python_documentation,
    read_text,
    sources,
    split_documents,
    split_text,
)

SOURCE = Path(data.__file__).parents[1]
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SPLITS = ["train", "validation", "test"]
DOCUMENTS = [
    "To be, or not to be: that is the question.",
    "(Whether 'tis nobler in the mind to suffer)",
    "",
    "!!!",
    "the slings\nand arrows  of 2 outrageous fortune",
    "7",
    "naïve café — 東京",
]
NASTY = {
    "digits": "1984 and 3.14, v2x10 0123456789",
    "letters that lower() turns into ASCII": "\u212a (Kelvin), \u0130stanbul, \u212b, \uff21\uff42",
    "digits that are not ASCII": "\u0661\u0662\u0663 \u00b2 \u00bd \uff11 \u2167",
    "accents, composed and not": "na\u00efve nai\u0308ve \u00c9COLE STRASSE stra\u00dfe \ufb01n \u017f",
    "emoji": "a\U0001f468\u200d\U0001f469\u200d\U0001f467b \u2764\ufe0f \U0001f1eb\U0001f1f7",
    "line breaks": "a\nb\r\nc\rd\u2028e\u2029f\x0bg\x0ch\x85i",
    "control characters": "a\x00b\x01c\x7fd\x1be\ufeff",
    "runs of spaces": "  a   b \t \u00a0 \u3000 c  ",
    "a long run": "a" + "*" * 1000 + "b" + " -" * 1000,
    "only spaces": " \n ",
    "only symbols": "?!",
    "nothing": "",
    "markup": "[[Link|text]] &amp; <ref name='x'/> don't e-mail U.S.A.",
    "random": "".join(
        map(
            chr,
            random.Random(0).choices([*range(0x2200)], [100] * 128 + [1] * (0x2200 - 128), k=2000),
        )
    ),
}


def text8(text: str) -> str:
    """Applies the rules of text8, one character at a time."""
    result = ""
    for character in text:
        if "A" <= character <= "Z":
            result += chr(ord(character) + 32)
        elif "a" <= character <= "z":
            result += character
        elif "0" <= character <= "9":
            result += " " + WORDS[ord(character) - ord("0")] + " "
        else:
            result += " "

    while "  " in result:
        result = result.replace("  ", " ")

    return result


def long_text(seed: int, size: int = 3000) -> str:
    """A text of words, numbers, punctuation and all sorts of gaps."""
    draw = random.Random(seed)
    words = ["the", "Cat", "ran,", "42", "7.", "end.", "(so)", "naïve", "don't", "東京", "x"]
    gaps = [" "] * 20 + ["\n", "\n\n", "  ", "\t", " \n ", ". ", "\u00a0"]
    return "".join(draw.choice(words) + draw.choice(gaps) for _ in range(size))


def byte_level_tokenizer(vocab_size: int = 300) -> PreTrainedTokenizerFast:
    """A tokenizer like GPT-2's: lossless, with an end-of-text token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<eos>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator([long_text(0)], trainer)

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def prefix_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer like Llama 2's.

    It puts a space in front of every text, so that no cut leaves the tokens as they are.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=100, special_tokens=["<unk>", "<eos>"], show_progress=False
    )
    tokenizer.train_from_iterator([long_text(0)], trainer)

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")


TOKENIZERS = {
    "character": character_tokenizer,
    "byte_level": byte_level_tokenizer,
    "prefix": prefix_tokenizer,
}


def run_python(code: str, *arguments: object, **environment: str) -> str:
    """Returns the output of a fresh process."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, **environment},
        check=False,
    )
    assert result.returncode == 0, result.stderr

    return result.stdout


# --- The character tokenizer


@pytest.mark.parametrize("text", NASTY.values(), ids=NASTY.keys())
def test_character_tokenizer_follows_text8(text):
    tokenizer = character_tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert "".join(" abcdefghijklmnopqrstuvwxyz"[i] for i in ids) == text8(text)
    assert tokenizer.decode(ids) == text8(text)


def test_character_tokenizer_has_27_symbols_and_nothing_else():
    tokenizer = character_tokenizer()
    assert tokenizer.get_vocab() == {" ": 0, **{chr(ord("a") + i): i + 1 for i in range(26)}}
    assert len(tokenizer) == tokenizer.vocab_size == 27
    assert tokenizer.all_special_tokens == []
    assert tokenizer("ab") == {"input_ids": [1, 2], "attention_mask": [1, 1]}
    assert tokenizer.model_max_length > 10**9


def test_character_tokenizer_loads_without_this_package(tmp_path):
    character_tokenizer().save_pretrained(tmp_path)
    code = """
import json, sys
sys.modules["tarflow_hf"] = None  # an import raises ImportError
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = [tokenizer(text) for text in json.loads(sys.argv[2])]
print(json.dumps([len(tokenizer), [dict(i) for i in ids], [tokenizer.decode(i["input_ids"]) for i in ids]]))
"""
    texts = [text.replace("\0", "") for text in NASTY.values()]
    size, encodings, decoded = json.loads(run_python(code, tmp_path, json.dumps(texts)))
    assert size == 27
    assert encodings == [dict(character_tokenizer()(text)) for text in texts]
    assert decoded == [text8(text) for text in texts]


# --- The documentation of Python


def test_python_documentation_reads_docstrings_as_text(tmp_path, monkeypatch):
    files = {
        "pydoc_data/topics.py": "topics = {'while': 'A loop.', 'loops': 'A loop.', 'if': 'A choice.'}",
        "b.py": '"""B."""\ndef f():\n    """B.f"""\n    async def g():\n        """g"""\nclass C:\n    """B.C"""\n',
        "a/__init__.py": '"""B."""\nclass A:\n    """A"""\n    def f(self):\n        """B.f"""\nx = """no docstring"""',
        "imported.py": '"""Not run."""\nraise SystemExit',
        "broken.py": '"""Syntax error."""\ndef',
        "site-packages/other.py": '"""Other."""',
        "c/test/test_c.py": '"""Test."""',
        "c/tests/test_c.py": '"""Test."""',
        "c/data.txt": '"""Text."""',
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)

    (tmp_path / "latin.py").write_bytes('# coding: latin-1\n"""é"""'.encode("latin-1"))
    (tmp_path / "undecodable.py").write_bytes('"""é"""'.encode("latin-1"))
    (tmp_path / "null.py").write_bytes(b'"""null"""\0')
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert python_documentation() == [
        "A loop.",
        "A choice.",
        "B.\n\nB.f\n\ng\n\nB.C",
        "Not run.",
        "é",
        "A",
    ]


def test_python_documentation_needs_the_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(FileNotFoundError, match="without its documentation or its sources"):
        python_documentation()


def test_default_corpus():
    splits = load_splits()
    assert list(splits) == SPLITS
    documents = [document for name in SPLITS for document in splits[name]]
    assert Counter(documents) == Counter(python_documentation())  # nothing lost, nothing twice
    assert len(set(documents)) == len(documents)
    assert 1_500_000 < sum(map(len, documents)) < 3_000_000
    assert (
        sum('The "while" statement is used for repeated execution' in text for text in documents)
        >= 1
    )
    assert sum("Text wrapping and filling." in text for text in documents) == 1  # textwrap
    assert "antigravity" not in sys.modules  # which opens a browser when it is imported


# --- Splits


def test_split_documents_shares_out_every_document():
    documents = [f"{i} " * (1 + i % 7) for i in range(1000)]
    splits = split_documents(documents)
    assert Counter(document for name in SPLITS for document in splits[name]) == Counter(documents)
    assert splits == split_documents(iter(documents))
    total = sum(map(len, documents))
    for name in ("validation", "test"):
        assert sum(map(len, splits[name])) == pytest.approx(0.05 * total, rel=0.05)

    held_out = {int(document.split()[0]) for document in splits["validation"] + splits["test"]}
    assert min(held_out) < 100 and max(held_out) > 900  # from everywhere, not from one end


def test_a_document_longer_than_a_held_out_part_is_for_training():
    documents = [f"{i} ".ljust(800, "x") for i in range(8)] + ["long " * 12_800]
    splits = split_documents(documents)
    assert Counter(document for name in SPLITS for document in splits[name]) == Counter(documents)
    assert splits["train"] == documents[-1:] and splits["validation"] and splits["test"]


@pytest.mark.parametrize(
    "text",
    [
        "two words\n" * 1000,
        "word " * 1000,
        "x" * 5000,
        "東京\n" * 1000,
        "ab",
        "a",
        "head\n" + "tail " * 5000,
    ],
)
def test_split_text_cuts_between_lines_or_words(text):
    splits = split_text(text)
    parts = ["".join(splits[name]) for name in SPLITS]
    assert "".join(parts) == text

    if len(text) > 2:
        assert [len(part) / len(text) for part in parts] == pytest.approx(
            [0.9, 0.05, 0.05], abs=0.002
        )

    for part in parts[:2]:
        assert not part or part[-1] in " \n" or not set(text) & set(" \n")
        assert not part or "\n" not in text[-1000:] or part[-1] == "\n"


# --- Files


def test_text_file_needs_no_datasets_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    text = "".join(f"Line {i}: häßlich.\n" for i in range(1000))
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())  # with a byte order mark
    assert read_text(path) == text
    assert load_splits(str(path)) == split_text(text)


def test_missing_datasets_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ImportError, match=r"'user/name' is not a text file here.*pip install datasets"
    ):
        load_splits("user/name")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\t\n", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (b"text\0more", "binary file.* null byte at position 4"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "binary file"),
        ("ab café".encode("latin-1"), "not UTF-8 text: byte 0xe9 at position 6"),
        (b"\xef\xbb\xbfab\xff", "not UTF-8 text: byte 0xff at position 5"),
    ],
)
def test_bad_files_are_refused(tmp_path, content, message):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"bad\.txt.*{message}"):
        load_splits(str(path))


def test_text_is_utf_8_whatever_the_locale(tmp_path):
    """Python takes the locale's encoding for text files: in the C locale without UTF-8 mode, ASCII."""
    path = tmp_path / "größe.txt"
    path.write_bytes("größe und maß\n".encode() * 50)
    code = (
        "import sys, locale; from tarflow_hf.data import load_splits; print(locale.getpreferredencoding(False)); "
        "print(ascii(load_splits(sys.argv[1])['train'][0][:5]))"
    )
    environment = {
        "PYTHONPATH": str(SOURCE),
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
    }
    printed = run_python(code, str(path), **environment).splitlines()
    assert printed[0] != "UTF-8" and printed[1] == ascii("größe")


def test_long_work_has_a_bar(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("tarflow_hf.data.progress.tqdm", partial(tqdm, mininterval=0))
    monkeypatch.setattr("tarflow_hf.data.progress.BAR_DELAY", 0)
    monkeypatch.setattr("tarflow_hf.data.packing.BATCH", 100)
    PackedTokens(["some text " * 50] * 3, character_tokenizer(), 8)
    bars = capsys.readouterr().err.split("\r")
    assert any(bar.startswith("tokenizing: 100%") and "1.50k/1.50k" in bar for bar in bars)
    assert any("<" in bar and "character/s]" in bar for bar in bars)  # time that remains; rate


BROKEN = {
    "train.jsonl": (
        '{"text": "a"}\n{"text": "b"\n',
        r"train\.jsonl, line 2, can't be read as JSON: .* Mend the line",
    ),
    "train_2028.jsonl": (  # which Python takes for the end of a line, and JSON does not
        '{"text": "a\u2028b"}\n' * 205 + '{"text": 3 4}',
        r"train_2028\.jsonl, line 206, can't be read as JSON",
    ),
    "train.csv": ('text\na\n"b\n', r"train\.csv can't be read: .*row 2.* Mend it, or leave it out"),
    "train.parquet": ("no table", r"train\.parquet can't be read: .* Mend it"),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_can_not_be_read_is_named(tmp_path, monkeypatch, name, streaming):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    content, message = BROKEN[name]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        list(load_splits(str(tmp_path / "data"), streaming=streaming)["validation"])
    assert caught.value.__suppress_context__


def test_import_needs_no_optional_library():
    code = "import sys, tarflow_hf.data; print([name for name in ('datasets', 'evaluate') if name in sys.modules])"
    assert run_python(code, PYTHONPATH=str(SOURCE)).strip() == "[]"


# --- Files of documents


def write_json_lines(path, documents):
    path.write_text(
        "".join(json.dumps({"body": each, "text": "other"}) + "\n" for each in documents)
    )


def write_json(path, documents):
    path.write_text(json.dumps([{"body": each, "text": "other"} for each in documents]))


def write_csv(path, documents):
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    lines = [f'"{each}"{separator}other\n' for each in documents]
    path.write_text(f"body{separator}text\n" + "".join(lines))


def write_parquet(path, documents):
    from datasets import Dataset

    Dataset.from_dict({"body": documents, "text": ["other"] * len(documents)}).to_parquet(path)


TABLES = {
    "my.jsonl": write_json_lines,
    "my.json": write_json,
    "my.csv": write_csv,
    "MY.TSV": write_csv,
    "my.parquet": write_parquet,
}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("name", TABLES)
def test_a_file_of_documents_is_read_by_its_column(tmp_path, name):
    documents = [f"document {i:02}, a text" for i in range(38)] + ["None", "NA"]  # words, not gaps
    TABLES[name](tmp_path / name, documents)
    source = str(tmp_path / name)
    assert load_splits(source, text_column="body") == split_documents(documents)
    assert held_out_documents(source, "body") == documents
    assert held_out_documents(source) == ["other"] * 40
    with pytest.raises(
        ValueError, match="no column 'content'; choose its text column among 'body'"
    ):
        load_splits(source, text_column="content")


@pytest.mark.usefixtures("cache")
def test_a_file_of_documents_that_are_few_or_streamed(tmp_path):
    path = tmp_path / "my.jsonl"
    write_json_lines(path, ["one two three four five " * 9, "six seven eight nine ten " * 9])
    splits = load_splits(str(path), text_column="body")
    assert [len(splits[name]) for name in SPLITS] == [2, 2, 2]

    write_json_lines(path, [f"document {i}" for i in range(2050)])
    stream = load_splits(str(path), text_column="body", streaming=True)
    assert next(iter(stream["train"])) == "document 2000"


@pytest.mark.usefixtures("cache")
def test_a_file_of_documents_that_can_not_be_read_is_named(tmp_path):
    path = tmp_path / "my.jsonl"
    path.write_text(BROKEN["train.jsonl"][0])
    with pytest.raises(ValueError, match=r"my\.jsonl, line 2, can't be read as JSON"):
        load_splits(str(path))


# --- Datasets


needs_datasets = pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None, reason="needs datasets"
)


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """Writes a folder of JSON lines, one file per split."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def write(**splits):
        folder = tmp_path / "dataset"
        folder.mkdir()
        for name, rows in splits.items():
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(folder)

    return write


def rows(name, size):
    return [{"id": i, "text": f"{name} {i}"} for i in range(size)]


def texts(rows):
    return [row["text"] for row in rows]


@needs_datasets
@pytest.mark.parametrize("streaming", [False, True])
def test_dataset_keeps_its_own_splits(dataset, streaming):
    source = dataset(train=rows("train", 9), validation=rows("validation", 3), test=rows("test", 2))
    splits = load_splits(source, streaming=streaming)

    for _ in range(2):  # iterable again
        assert list(splits["train"]) == texts(rows("train", 9))
        assert list(splits["validation"]) == texts(rows("validation", 3))
        assert list(splits["test"]) == texts(rows("test", 2))


@needs_datasets
@pytest.mark.parametrize("streaming", [False, True])
def test_dataset_without_held_out_splits_gives_its_first_rows(dataset, streaming, monkeypatch):
    monkeypatch.setattr(sources, "MAX_HELD_OUT_DOCUMENTS", 4)
    splits = load_splits(dataset(train=rows("train", 100)), streaming=streaming)

    for _ in range(2):
        train = list(splits["train"])
        assert list(splits["validation"]) + list(splits["test"]) + train == texts(
            rows("train", 100)
        )
        assert len(train) == 92


@needs_datasets
def test_dataset_holds_out_what_is_missing(dataset):
    splits = load_splits(dataset(train=rows("train", 40), test=rows("test", 3)))
    assert list(splits["validation"]) == texts(rows("train", 2))
    assert list(splits["train"]) == texts(rows("train", 40)[2:])
    assert list(splits["test"]) == texts(rows("test", 3))


@needs_datasets
@pytest.mark.parametrize("streaming", [False, True])
def test_dataset_column_is_chosen(dataset, streaming):
    source = dataset(**{name: [{"body": f"{name} text", "text": "other"}] for name in SPLITS})
    splits = load_splits(source, text_column="body", streaming=streaming)
    assert {name: list(documents) for name, documents in splits.items()} == {
        n: [f"{n} text"] for n in SPLITS
    }

    with pytest.raises(
        ValueError, match="no column 'content'; choose its text column among 'body', 'text'"
    ):
        load_splits(source, text_column="content", streaming=streaming)


@needs_datasets
def test_dataset_errors(dataset, tmp_path):
    with pytest.raises(ValueError, match=r"too few to hold out 5% of them"):
        load_splits(dataset(train=rows("train", 1)))

    (tmp_path / "dataset/train.jsonl").rename(tmp_path / "dataset/test.jsonl")
    with pytest.raises(ValueError, match="has no split 'train', only 'test'"):
        load_splits(str(tmp_path / "dataset"))

    with pytest.raises(
        ValueError, match="is neither 'python-docs', nor a file or folder here, nor a dataset"
    ):
        load_splits(str(tmp_path / "missing.txt"))

    (tmp_path / "nothing").mkdir()
    with pytest.raises(
        ValueError, match="is neither 'python-docs', nor a file or folder here, nor a dataset"
    ):
        load_splits(str(tmp_path / "nothing"))


# --- Packing


@pytest.mark.parametrize("sequence_length", [1, 7, 64])
def test_character_blocks_spell_the_text(sequence_length):
    tokenizer = character_tokenizer()
    blocks = PackedTokens(DOCUMENTS, tokenizer, sequence_length)
    expected = text8(" ".join(document for document in DOCUMENTS if document))
    expected = expected[: len(expected) // sequence_length * sequence_length]
    assert "".join(tokenizer.decode(block["input_ids"]) for block in blocks) == expected
    assert len(blocks) * sequence_length == len(expected)
    assert torch.equal(blocks[-1]["input_ids"], blocks[len(blocks) - 1]["input_ids"])
    assert blocks[0]["input_ids"].dtype == torch.int64
    assert blocks.tokens.dtype == torch.uint8
    assert blocks.num_characters == len(blocks.tokens)
    with pytest.raises(IndexError):
        blocks[len(blocks)]


def test_documents_are_parted_by_the_eos_token():
    tokenizer = byte_level_tokenizer()
    documents = [document for document in DOCUMENTS if document]
    blocks = PackedTokens(DOCUMENTS, tokenizer, 10)
    pieces = tokenizer.decode(blocks.tokens.tolist()).split("<eos>")
    assert pieces == documents
    assert blocks.tokens.tolist().count(tokenizer.eos_token_id) == len(documents) - 1
    assert blocks.num_characters == sum(map(len, DOCUMENTS))
    assert blocks.characters_per_token == sum(map(len, DOCUMENTS)) / len(blocks.tokens)
    assert blocks.tokens_per_word == len(blocks.tokens) / sum(
        len(document.split()) for document in DOCUMENTS
    )
    packed = torch.cat([block["input_ids"] for block in blocks])
    assert torch.equal(packed, blocks.tokens[: len(packed)].long())
    assert len(blocks.tokens) - len(packed) < 10


@pytest.mark.parametrize(
    ("size", "dtype"), [(256, torch.uint8), (257, torch.int16), (32769, torch.int32)]
)
def test_tokens_are_stored_in_the_smallest_type(size, dtype):
    vocabulary = {f"t{i}": i for i in range(size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = ["t0", f"t{size - 1}", "t1", f"t{size // 2}"]
    blocks = PackedTokens([" ".join(words)], PreTrainedTokenizerFast(tokenizer_object=tokenizer), 4)
    assert blocks.tokens.dtype == dtype
    assert blocks[0]["input_ids"].tolist() == [vocabulary[word] for word in words]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_do_not_depend_on_how_long_documents_are_cut(name, monkeypatch):
    tokenizer = TOKENIZERS[name]()
    documents = [long_text(seed) for seed in (1, 2)] + [
        "x" * 500,
        *DOCUMENTS,
        long_text(3),
        "1 " * 300,
    ]
    whole = PackedTokens(documents, tokenizer, 16)
    calls = []
    encode = type(tokenizer).__call__
    monkeypatch.setattr(
        type(tokenizer),
        "__call__",
        lambda *a, **k: calls.append(max(map(len, a[1]))) or encode(*a, **k),
    )
    monkeypatch.setattr(packing, "PIECE", 100)
    monkeypatch.setattr(packing, "BATCH", 1000)
    cut = PackedTokens(documents, tokenizer, 16)
    assert torch.equal(cut.tokens, whole.tokens)
    assert cut.num_characters == whole.num_characters
    if name != "prefix":  # which agrees to no cut
        assert max(calls) < 800


def test_tokenizers_own_limits_and_special_tokens_leave_the_text_alone():
    tokenizer = byte_level_tokenizer()
    expected = PackedTokens(DOCUMENTS, tokenizer, 10).tokens
    tokenizer.model_max_length = 4
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    tokenizer.add_bos_token = True
    assert torch.equal(PackedTokens(DOCUMENTS, tokenizer, 10).tokens, expected)


@pytest.mark.parametrize("kind", [PackedTokens, StreamingPackedTokens])
@pytest.mark.parametrize(
    ("documents", "length", "tokens"),
    [(["ab", "cd"], 6, 5), ([], 1, 0), ([""], 1, 0), (["ab"], 0, 2), (["ab"], -1, 2)],
)
def test_too_short_a_text_is_refused(kind, documents, length, tokens):
    with pytest.raises(
        ValueError,
        match=f"no sequence of {length} tokens can be cut from a text of {tokens} tokens",
    ):
        list(kind(documents, character_tokenizer(), length))


@pytest.mark.parametrize("kind", [PackedTokens, StreamingPackedTokens])
def test_what_is_no_document_is_refused(kind):
    with pytest.raises(TypeError, match="documents is one string"):
        list(kind("a text", character_tokenizer(), 1))
    with pytest.raises(TypeError, match="a document is a string, not NoneType"):
        list(kind(["a text", None], character_tokenizer(), 1))


# --- Streaming


def blocks_of(dataset):
    return [tuple(block["input_ids"].tolist()) for block in dataset]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("batch", [1, 300, 10**6])
def test_stream_gives_the_same_blocks(name, batch, monkeypatch):
    monkeypatch.setattr(packing, "BATCH", batch)
    tokenizer = TOKENIZERS[name]()
    documents = [*DOCUMENTS, long_text(1, 200)] * 3
    expected = blocks_of(PackedTokens(documents, tokenizer, 11))
    stream = StreamingPackedTokens(documents, tokenizer, 11)
    assert blocks_of(stream) == expected
    assert blocks_of(stream) == expected  # and again


def test_shuffled_stream_gives_every_block_once():
    documents = [long_text(1)]

    def shuffled(seed=0, epoch=0, size=50):
        stream = StreamingPackedTokens(
            documents, character_tokenizer(), 16, shuffle_buffer=size, seed=seed
        )
        stream.set_epoch(epoch)
        return blocks_of(stream)

    ordered = blocks_of(PackedTokens(documents, character_tokenizer(), 16))
    first = shuffled()
    assert Counter(first) == Counter(ordered)
    assert first == shuffled()
    assert (
        len({tuple(order) for order in (ordered, first, shuffled(seed=1), shuffled(epoch=1))}) == 4
    )
    assert Counter(shuffled(size=10**6)) == Counter(ordered)  # a buffer longer than the text


@pytest.mark.parametrize("shuffle_buffer", [0, 20])
def test_stream_resumes_exactly(shuffle_buffer):
    def stream():
        return StreamingPackedTokens(
            [long_text(1)], character_tokenizer(), 16, shuffle_buffer=shuffle_buffer
        )

    full = stream()
    full.set_epoch(3)

    expected = blocks_of(full)
    for used in (0, 1, 37, len(expected)):
        interrupted = stream()
        interrupted.set_epoch(3)
        iterator = iter(interrupted)
        for _ in range(used):
            next(iterator)

        state = json.loads(json.dumps(interrupted.state_dict()))
        assert state == {"epoch": 3, "blocks": used}
        resumed = stream()
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        assert blocks_of(resumed) == expected[used:]
        assert resumed.state_dict() == {"epoch": 3, "blocks": len(expected)}
        assert blocks_of(resumed) == expected  # the next iteration is a whole one


def test_stream_refuses_workers_that_would_repeat_it():
    stream = StreamingPackedTokens(DOCUMENTS, character_tokenizer(), 8)
    loader = torch.utils.data.DataLoader(stream, batch_size=2, num_workers=2)
    with pytest.raises(RuntimeError, match="num_workers <= 1"):
        next(iter(loader))


def test_words_of_a_character_tokenizer_are_those_of_its_tokens():
    blocks = PackedTokens(["In 1984: don't", "stop"], character_tokenizer(), 1)
    assert blocks.num_words == 8  # in one nine eight four don t stop
    long = PackedTokens([long_text(1, 50_000)], character_tokenizer(), 1)
    assert long.num_words == len(text8(long_text(1, 50_000)).split())


def test_whether_a_stream_has_enough_blocks():
    stream = StreamingPackedTokens(["abc def ghi"] * 4, character_tokenizer(), 10, shuffle_buffer=3)
    assert stream.has_blocks(4) and not stream.has_blocks(5)
    assert stream.state_dict() == {"epoch": 0, "blocks": 0}
    with pytest.raises(ValueError, match="no sequence of 10 tokens"):
        StreamingPackedTokens(["abc"], character_tokenizer(), 10).has_blocks(1)
