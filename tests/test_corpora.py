"""Penn Treebank by characters and WikiText-2 by words, on text of the same form."""

import json

import pytest
import torch
from transformers import set_seed

from helpers.scripts import script
from helpers.training import run
from tarflow_hf import TarFlowLMConfig, TarFlowLMModel
from tarflow_hf.baseline import negative_log_likelihood
from tarflow_hf.data import (
    PackedTokens,
    SentenceTokens,
    load_corpus,
    load_splits,
    make_tokenizer,
    penn_treebank_tokenizer,
)
from tarflow_hf.data.corpora import LONGEST_SENTENCE
from tarflow_hf.data.sentences import SimilarLengths
from tarflow_hf.evaluation import score
from tarflow_hf.training import compute_loss, discrete_baseline, draw_step

LINES = [
    "mr. <unk> 's index rose N N to $ N a share",
    "no it was n't black monday",
    "the u.s.&u.k. traders sold #1 w\\/o a word",
    "it fell",
    "a stock",
]
FLOWS = [
    {"coupling": "mixture_rosenblatt", "direction": "left_to_right", "num_hidden_layers": 1},
    {
        "coupling": "mixture_cdf",
        "direction": "right_to_left",
        "num_hidden_layers": 1,
        "num_components": 2,
    },
]


def config(**changes) -> TarFlowLMConfig:
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "max_position_embeddings": 64}
    return TarFlowLMConfig(
        **{"vocab_size": 50, "latent_size": 2, "flows": FLOWS, **sizes, **changes}
    )


@pytest.fixture
def folder(tmp_path):
    """The three files of a small corpus in the form of Penn Treebank's, and something beside them."""
    folder = tmp_path / "ptb"
    folder.mkdir()
    too_long = "x" * (LONGEST_SENTENCE + 1)
    for name, times in (("train", 8), ("valid", 1), ("test", 2)):
        lines = [f" {line} " for line in times * LINES] + ["", too_long]
        (folder / f"ptb.{name}.txt").write_text("\n".join(lines) + "\n")

    (folder / "ptb.zip").write_bytes(b"PK\x03\x04")
    return folder


@pytest.fixture
def sentences():
    tokenizer = penn_treebank_tokenizer()
    return SentenceTokens(8 * LINES, tokenizer, train=SentenceTokens(LINES, tokenizer))


def test_penn_treebank_is_read_by_sentence(folder):
    splits = load_splits(f"ptb:{folder}")
    assert {name: len(lines) for name, lines in splits.items()} == {
        "train": 40,
        "validation": 5,
        "test": 10,
    }
    assert splits["validation"] == LINES  # stripped; neither the empty line nor the one of 289


def test_a_missing_file_says_where_the_text_is_from(folder):
    (folder / "ptb.valid.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"ptb\.valid\.txt, the validation text of Penn"):
        load_splits(f"ptb:{folder}")
    with pytest.raises(FileNotFoundError, match=r"github\.com/timbmg/RNNLM"):
        load_splits("ptb:nowhere")


def test_a_file_that_is_no_text_is_named(folder):
    path = folder / "ptb.train.txt"
    path.write_bytes(b"\xef\xbb\xbfit fell\r\nno one\r\n")
    assert load_corpus(f"ptb:{folder}")["train"] == ["it fell", "no one"]
    path.write_bytes("größe".encode("latin-1"))
    with pytest.raises(ValueError, match=r"ptb\.train\.txt is not UTF-8 text: byte 0xf6"):
        load_corpus(f"ptb:{folder}")


def test_the_tokenizer_gives_each_symbol_a_token():
    tokenizer = make_tokenizer(None, "ptb:anywhere")
    text = "".join(LINES)
    ids = tokenizer(text).input_ids
    assert (
        len(tokenizer) == 50 and len(ids) == len(text) and max(ids) < tokenizer.eos_token_id == 49
    )
    assert tokenizer.decode(ids) == text


def test_the_end_counts_and_what_fills_a_patch_does_not():
    sentences = SentenceTokens(LINES, penn_treebank_tokenizer(), patch_size=4)
    lengths = [len(line) + 1 for line in LINES]
    assert sentences.num_tokens.tolist() == lengths
    assert [len(each["input_ids"]) for each in sentences] == [-(-n // 4) * 4 for n in lengths]
    assert all(
        set(each["input_ids"][each["num_tokens"] - 1 :].tolist()) == {49} for each in sentences
    )
    assert sentences.characters_per_token == 1.0


def test_words_and_the_ends_of_lines(tmp_path):
    for name in ("train", "valid", "test"):
        (tmp_path / f"wiki.{name}.tokens").write_text(
            " \n = a title = \n \n the <unk> sat , it sat . \n"
        )

    source = f"wikitext2:{tmp_path}"
    tokenizer = make_tokenizer(None, source)
    tokens = PackedTokens(load_splits(source)["test"], tokenizer, 4)
    words = "<eos> = a title = <eos> <eos> the <unk> sat , it sat . <eos>"
    assert tokenizer.decode(tokens.tokens) == words and tokens.note() is None
    assert len(tokenizer) == len(set(words.split()))
    unknown = tokenizer("dog").input_ids
    assert unknown == tokenizer("<unk>").input_ids != tokenizer("sat").input_ids


@pytest.mark.parametrize("kind", ["flow", "stack", "patches", "discrete"])
def test_padding_changes_no_likelihood(kind):
    """A batch's loss is the nats of its sentences, each scored alone, over the given number."""
    set_seed(0)
    patch_size = 2 if kind == "patches" else 1
    sentences = SentenceTokens(LINES, penn_treebank_tokenizer(), patch_size)
    shape = config(flows=FLOWS[: 1 + (kind != "flow")], patch_size=patch_size)
    model = discrete_baseline(shape) if kind == "discrete" else TarFlowLMModel(shape)
    batch = sentences.collate(list(sentences))
    draws = draw_step(model, (5, sentences.sequence_length), torch.Generator().manual_seed(1))
    given = torch.tensor(7.0)
    loss = compute_loss(
        model, batch["input_ids"], draws, None, given, batch["attention_mask"]
    ).item()

    nats = 0.0
    for row, sentence in enumerate(sentences):
        ids = sentence["input_ids"][None]
        if kind == "discrete":
            nats += negative_log_likelihood(model, ids).item()
        else:
            nats -= model(
                ids, latent_noise=draws.latent_noise[row : row + 1, : ids.shape[1]]
            ).elbo.item()

    assert loss == pytest.approx(nats / 7, rel=1e-5)


def test_a_flow_that_begins_at_the_end_pays_for_the_length(sentences):
    """Left to right the end is predicted like any token; right to left its place was given away."""
    lengths = torch.arange(1, 2 * sentences.sequence_length + 1)
    assert sentences.nats_of_lengths(lengths).neg().exp().sum().item() == pytest.approx(1)
    assert sentences.nats_of_lengths(lengths[-1:] + 1).item() == float("inf")
    often = len("it fell") + 1  # two of five lines have this length, one more is for each of 86
    assert sentences.length_nats[3].exp().item() == pytest.approx((5 + 86) / (2 + 1))
    assert sentences.lengths[3] == often == sentences.lengths[4]

    set_seed(0)
    model = TarFlowLMModel(config()).eval()
    bare = [{"input_ids": each["input_ids"]} for each in sentences.first(5)]
    for num_flows, expected in ((1, 5 * [0.0]), (2, sorted(sentences.length_nats[:5].tolist()))):
        with_length = score(model, sentences.first(5), num_flows=num_flows).nats[0]
        extra = with_length - score(model, bare, num_flows=num_flows).nats[0]
        assert sorted(extra.tolist()) == pytest.approx(expected)

    with pytest.raises(ValueError, match="knows where a sentence ends"):
        score(model, SentenceTokens(LINES, penn_treebank_tokenizer()).first())


def test_an_epoch_has_each_sentence_once_and_little_padding():
    lengths = torch.randint(1, 289, (1000,), generator=torch.Generator().manual_seed(0)).numpy()
    order = SimilarLengths(lengths, batch_size=16, seed=3)
    first = list(order)
    order.set_epoch(1)
    assert sorted(first) == sorted(order) == list(range(1000)) and first != list(order)
    order.set_epoch(0)
    assert first == list(order)
    batches = lengths[first[:992]].reshape(-1, 16)
    assert 16 * batches.max(1).sum() < 1.1 * batches.sum()
    assert abs(batches[:31].mean() - batches[31:].mean()) < 30  # the lengths follow no order


@pytest.mark.parametrize("baseline", [False, True])
def test_a_run_on_sentences_goes_on_exactly(tmp_path, sentences, baseline):
    """Over the end of an epoch, too: ten batches in each."""
    options = {"baseline": baseline, "num_steps": 16, "save_every": 13, "eval_sequences": 5}
    tokenizer = penn_treebank_tokenizer()
    _, whole = run(tmp_path / "whole", sentences, tokenizer, config(), **options)
    part = {**options, "num_steps": 16}
    run(tmp_path / "part", sentences, tokenizer, config(), **part)
    for newest in (tmp_path / "part").glob("checkpoint-16"):
        newest.rename(tmp_path / "aside")

    _, resumed = run(tmp_path / "part", sentences, tokenizer, config(), **part, resume=True)
    assert resumed == whole and len(whole) == 16


def test_parts_of_a_step_give_the_same_losses(tmp_path, sentences):
    tokenizer = penn_treebank_tokenizer()
    losses = [
        run(tmp_path / str(parts), sentences, tokenizer, config(), num_steps=4, gradient_accumulation_steps=parts)[1]
        for parts in (1, 2)
    ]  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_what_does_not_fit_is_refused(tmp_path, sentences):
    tokenizer = penn_treebank_tokenizer()
    with pytest.raises(ValueError, match="longest sentence has 43 tokens"):
        run(tmp_path, sentences, tokenizer, config(max_position_embeddings=32))
    with pytest.raises(ValueError, match="conditional"):
        run(tmp_path, sentences, tokenizer, config(conditional=True))
    with pytest.raises(ValueError, match="eos_token"):
        SentenceTokens(
            LINES, make_tokenizer("ptb").__class__(tokenizer_object=tokenizer.backend_tokenizer)
        )


def test_scripts_take_the_folder(tmp_path, folder, capsys, monkeypatch):
    """Trained and scored by the protocol: all tokens with the ends, a sentence at a time."""
    (tmp_path / "small.json").write_text(json.dumps(config().to_diff_dict()))
    options = ["--dataset", f"ptb:{folder}", "--config", str(tmp_path / "small.json")]
    options += ["--num_steps", "2", "--output_dir", str(tmp_path / "run")]
    run_script = {"capsys": capsys, "monkeypatch": monkeypatch}
    printed = script("train.py", *options, **run_script)
    assert "in 40 sentences" in printed

    options = [str(tmp_path / "run" / "model"), "--data", f"ptb:{folder}", "--num_samples", "2"]
    script("evaluate.py", *options, "--output", str(tmp_path / "out.json"), **run_script)
    found = json.loads((tmp_path / "out.json").read_text())
    model = TarFlowLMModel.from_pretrained(tmp_path / "run" / "model")
    train = SentenceTokens(8 * LINES, penn_treebank_tokenizer())
    test = SentenceTokens(2 * LINES, penn_treebank_tokenizer(), train=train)
    best = score(model, test.first(), num_samples=2).best
    assert found["num_tokens"] == 2 * sum(len(line) + 1 for line in LINES) == best.num_tokens
    assert found["bits_per_character"] == pytest.approx(best.bits_per_token)
    assert found["num_sequences"] == 10 and found["standard_error"] > 0
