"""Text to tokens in one way everywhere, and what is lost on the way is said."""

import json
import sys

import evaluate
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from helpers import ROOT
from helpers.models import STACKS, make
from helpers.scripts import script
from helpers.words import letters_with_a_template
from tarflow_hf.data import (
    CharacterCount,
    PackedTokens,
    StreamingPackedTokens,
    character_tokenizer,
    checked_ids,
    continued_ids,
    load_splits,
    token_ids,
    vocabulary_size,
)
from tarflow_hf.training import check_tokenizer, save_model


def words_with_a_gap() -> PreTrainedTokenizerFast:
    """21 tokens with ids 0 to 20, but for the last one, 40."""
    vocabulary = {**{f"w{i}": i for i in range(19)}, "<unk>": 19, "<end>": 40}
    backend = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<end>")


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("a quick Brown fox, 42", {",": 1}),
        ("Größe\n\t größer", {"ö": 2, "ß": 2}),
        ("列表", {"列": 1, "表": 1}),
        ("", {}),
        ("   ", {}),
    ],
)
def test_dropped_characters_of_text8(text, lost):
    characters = CharacterCount(character_tokenizer())
    characters.add(text)
    assert characters.lost == lost and characters.num_characters == len(text)
    assert (characters.note() is None) == (not lost)


def test_an_unknown_token_is_a_dropped_character():
    characters = CharacterCount(words_with_a_gap())
    characters.add("w1 xyz w2 <unk>")
    assert characters.lost == {"x": 1, "y": 1, "z": 1} and characters.num_characters == 15
    assert checked_ids(words_with_a_gap(), "w1 xyz") == [1, 19]
    with pytest.raises(ValueError, match=r"Nothing is left of the text: .* none of its 6"):
        checked_ids(words_with_a_gap(), "xy zzz")


@pytest.mark.parametrize("text", ["列表", "?!"])
def test_a_text_of_which_nothing_is_left(text):
    with pytest.raises(ValueError, match="Nothing is left"):
        checked_ids(character_tokenizer(), text)


def test_text_behind_other_text_has_no_space_in_front():
    """As with Llama's tokenizer, whose texts begin with a space of its own."""
    vocabulary = {"▁": 0, "a": 1, "b": 2, "▁a": 3}
    backend = Tokenizer(models.BPE(vocabulary, [("▁", "a")]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert token_ids(tokenizer, "ab") == [3, 2] and continued_ids(tokenizer, "ab") == [1, 2]
    assert continued_ids(tokenizer, " ab") == [3, 2]
    for tokenizer in (character_tokenizer(), words_with_a_gap()):
        for text in ("w1", " ab", "a b"):
            assert continued_ids(tokenizer, text) == token_ids(tokenizer, text)


def test_tokens_are_the_same_in_training_and_in_every_script(tmp_path, capsys, monkeypatch):
    tokenizer = letters_with_a_template()
    text = "the function returns"
    packed = PackedTokens([text], tokenizer, 4).tokens.tolist()
    assert tokenizer(text).input_ids == [0, *packed, 1]
    assert token_ids(tokenizer, text) == checked_ids(tokenizer, text) == packed

    model = make(STACKS["mix-d"], vocab_size=29, max_position_embeddings=32)
    save_model(model, tokenizer, tmp_path)
    run = {"capsys": capsys, "monkeypatch": monkeypatch}
    for name in ("score.py", "edit.py"):
        printed = script(name, tmp_path, text, **run)
        assert "<s>" not in printed and "</s>" not in printed, name

    filled = script("infill.py", tmp_path, "the ____ returns", **run)
    assert filled.startswith("the ") and filled.endswith(" returns\n")
    written = script("generate.py", tmp_path, "--prompt", text, "--max_new_tokens", 1, **run)
    assert written.startswith(text)


def test_every_script_says_what_is_lost(tmp_path, capsys, monkeypatch):
    save_model(make(STACKS["mix-d"], vocab_size=27), character_tokenizer(), tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("größe " * 20, "utf-8")
    said = "20 of 120 characters of the text"

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name])
        try:
            out = script(
                name, tmp_path / "model", *arguments, capsys=capsys, monkeypatch=monkeypatch
            )
        except ValueError as error:
            return str(error)
        return out + capsys.readouterr().err

    output = run("evaluate.py", "--data", text, "--num_samples", 1)
    assert "40 of 120 characters of the text (33.3%) are dropped" in output
    assert "Bits per character are those of the" in output
    for name in ("score.py", "edit.py"):
        assert "Nothing is left of" in run(name, "привет")

    assert "Nothing is left of the prompt" in run("generate.py", "--prompt", "привет")
    assert said not in run("score.py", "plain text")


@pytest.mark.parametrize("kind", [PackedTokens, StreamingPackedTokens])
def test_a_text_that_loses_everything_is_no_text_to_train_on(kind):
    with pytest.raises(
        ValueError, match=r"1 tokens.*999 of 999 characters .*'列'.*Choose a tokeni"
    ):
        list(kind(["列" * 999], character_tokenizer(), 8))


def test_a_vocabulary_holds_the_highest_id():
    tokenizer = words_with_a_gap()
    assert len(tokenizer) == 21 and vocabulary_size(tokenizer) == 41
    check_tokenizer(make(STACKS["mix-d"], vocab_size=41), tokenizer)
    with pytest.raises(ValueError, match=r"'<end>' has id 40. Give the model a vocab_size of 41"):
        check_tokenizer(make(STACKS["mix-d"], vocab_size=21), tokenizer)

    tokens = PackedTokens(["w1 w2", "w3"], tokenizer, 2).tokens
    assert tokens.tolist() == [1, 2, 40, 3]


# --------------------------------------------------------------------------------------------------
# Folders and rows
# --------------------------------------------------------------------------------------------------


def test_a_character_tokenizer_that_pads_has_an_end_token_that_no_text_has(tmp_path):
    tokenizer, name = character_tokenizer(with_end=True), "<|endoftext|>"
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 27 == vocabulary_size(tokenizer)
    documents = [f"one {name} text", "and another", name]
    expected = ["one endoftext text", "and another", "endoftext"]
    assert [tokenizer.decode(token_ids(tokenizer, x)).strip() for x in documents] == expected
    tokens = PackedTokens(documents, tokenizer, 4).tokens
    assert int(tokens.max()) < 27 and "text and another endoftext" in tokenizer.decode(tokens)

    batch = tokenizer(["ab", "a"], padding=True)
    assert batch.input_ids == [[1, 2], [1, 27]] and batch.attention_mask == [[1, 1], [1, 0]]
    assert tokenizer.decode([1, 2, 0, 27, 27], skip_special_tokens=True) == "ab "
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(name, add_special_tokens=False).input_ids == [27]


def test_a_folder_of_text_files_has_a_document_in_each_file(tmp_path):
    (tmp_path / "book.txt").write_text("it was the best of times\n\n" * 60)
    tokenizer = character_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<eos>"})
    for text in ("", "another book\n" * 60):
        if text:
            (tmp_path / "inner").mkdir()
            (tmp_path / "inner" / "other.txt").write_text(text)

        splits = load_splits(str(tmp_path))
        assert all(splits.values())
        tokens = PackedTokens(splits["train"], tokenizer, 8).tokens
        assert int((tokens == tokenizer.eos_token_id).sum()) == bool(text)


def test_text_files_named_after_splits_are_these_splits(tmp_path):
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.txt").write_text(f"{name} text " * 9)

    splits = load_splits(str(tmp_path))
    assert {name: documents[0][:5] for name, documents in splits.items()} == {
        "train": "train",
        "validation": "valid",
        "test": "test ",
    }
    (tmp_path / "valid.txt").unlink()
    splits = load_splits(str(tmp_path))
    assert splits["test"] == ["test text " * 9] and all(splits.values())


def test_many_text_files_are_held_out_as_a_whole(tmp_path):
    for number in range(40):
        (tmp_path / f"{number:02}.txt").write_text(f"document {number:02}")

    splits = load_splits(str(tmp_path))
    assert {name: len(documents) for name, documents in splits.items()} == {
        "train": 36,
        "validation": 2,
        "test": 2,
    }


def test_which_files_of_a_folder_are_its_text(tmp_path, monkeypatch):
    """Text files in capitals, too, beside a description of them; not beside other data."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "BOOK.TXT").write_text("it was the best of times\n" * 60)
    (folder / "meta.json").write_text('{"title": "A book"}')
    assert load_splits(str(folder))["train"][0].startswith("it was")

    (folder / "a.txt").write_text("a text")
    for name in ("one.json", "two.json"):
        (folder / name).write_text('{"title": "A book"}')
    with pytest.raises(
        ValueError, match=r"no column 'text'.* Its text files are read if it has no"
    ):
        load_splits(str(folder))


@pytest.mark.parametrize("name", ["bad.txt", "bad.jsonl"])
def test_a_file_of_a_folder_that_is_not_utf_8_is_named(tmp_path, monkeypatch, name):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "folder"
    folder.mkdir()
    line = '{"text": "good"}\n' if name == "bad.jsonl" else "good\n"
    (folder / f"good{name[3:]}").write_text(line * 50)
    (folder / name).write_bytes(line.replace("good", "café").encode("latin-1") * 50)
    with pytest.raises(ValueError, match=rf"{name} is not UTF-8 text: byte 0xe9 at position"):
        list(load_splits(str(folder))["train"])


@pytest.mark.parametrize("is_stream", [False, True])
def test_errors_about_rows_name_them(tmp_path, monkeypatch, is_stream):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "folder"
    folder.mkdir()
    rows = [{"text": "abc def"}] * 60 + [{"text": None}] + [{"text": "abc def"}] * 60
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("validation", "test"):
        (folder / f"{name}.jsonl").write_text(json.dumps(rows[0]) + "\n")

    train = load_splits(str(folder), streaming=is_stream)["train"]
    with pytest.raises(TypeError, match=r"split 'train', row 60 .*'text' is None.*Leave the row"):
        list(StreamingPackedTokens(train, character_tokenizer(), 8))


def test_a_stream_that_is_held_out_as_a_whole(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "a.jsonl").write_text('{"text": "abc"}\n' * 900)
    train = load_splits(str(tmp_path), streaming=True)["train"]
    with pytest.raises(ValueError, match="no row behind the first 2,000, which are held out"):
        list(train)

    with pytest.raises(ValueError, match="neither"):
        load_splits("")


# --------------------------------------------------------------------------------------------------
# The modules of `evaluate`
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bits_per_token", "generative_perplexity"])
def test_one_string_is_no_list_of_texts(name):
    metric = evaluate.load(str(ROOT / "metrics" / name))
    with pytest.raises(TypeError, match="give a list of texts"):
        metric.compute(predictions="a text")


def test_bits_per_character_are_the_same_in_every_tool(tmp_path, capsys, monkeypatch):
    """The text is one of which the tokenizer drops a part."""
    torch.manual_seed(0)
    save_model(make(STACKS["mix-d"], vocab_size=27), character_tokenizer(), tmp_path / "model")
    text = "In 2024 (see PEP 8), the list's 42 items: größer -- as a tuple!!!" * 3
    (tmp_path / "text.txt").write_text(text, "utf-8")
    output = tmp_path / "evaluation.json"
    arguments = ["evaluate.py", tmp_path / "model", "--data", tmp_path / "text.txt"]
    script(*arguments, "--output", output, capsys=capsys, monkeypatch=monkeypatch)

    metric = evaluate.load(str(ROOT / "metrics" / "bits_per_token"))
    result = metric.compute(predictions=[text], checkpoint=str(tmp_path / "model"))
    expected = json.loads(output.read_text())["bits_per_character"]
    assert result["bits_per_character"] == pytest.approx(expected, rel=1e-5)
    assert result["num_characters"] == result["num_tokens"]
    assert result["num_dropped_characters"] > 0
