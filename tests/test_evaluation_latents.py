"""Latent evolution and FLOPs, against definitions written out and torch's own counter."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from test_modeling import STACKS, make
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

from tarflow_hf import TarFlowLMConfig, TarFlowLMModel
from tarflow_hf.checkpointing import save_model
from tarflow_hf.data import character_tokenizer
from tarflow_hf.evaluation import cut_text
from tarflow_hf.flops import (
    GPT2_SIZES,
    count_flops,
    gpt2_sized_config,
    paper_flow_flops,
    paper_head_flops,
)
from tarflow_hf.latent_evolution import (
    evolution_of_samples,
    evolution_of_text,
    measure_evolution,
    measure_state,
)
from tarflow_hf.provenance import provenance_of
from tarflow_hf.throughput import forward_flops

ROOT = Path(__file__).parents[1]


def by_definition(state):
    """The four measures of one sequence's states (T, d)."""
    length = len(state)
    pairs = [(i, j) for i in range(length) for j in range(i + 1, length)]
    cosines = [torch.cosine_similarity(state[i], state[j], dim=0) for i, j in pairs]
    eigenvalues = torch.linalg.eigvalsh(
        torch.cov(state.T, correction=0).reshape(state.shape[1], -1)
    )

    return {
        "norm": state.norm(dim=-1).mean(),
        "cosine": torch.stack(cosines).mean() if pairs else torch.tensor(1.0),
        "participation_ratio": eigenvalues.sum() ** 2 / eigenvalues.square().sum()
        if pairs
        else torch.tensor(0.0),
        "centroid": state.mean(0),
    }


@pytest.mark.parametrize("size", [1, 2, 5])
def test_measures_by_definition(size):
    torch.manual_seed(size)
    lengths = [1, 2, 7, 4]
    state = torch.randn(4, 7, size, dtype=torch.float64) + 0.5
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    state = state.masked_fill(~mask[..., None], torch.nan)  # what is no token is not read
    measured = measure_state(state, mask)
    order = torch.randperm(7)
    shuffled = measure_state(state[:, order], mask[:, order])

    for row, length in enumerate(lengths):
        for name, expected in by_definition(state[row, :length]).items():
            torch.testing.assert_close(measured[name][row], expected, check_dtype=False)
            torch.testing.assert_close(shuffled[name][row], expected, check_dtype=False)


def test_known_shapes():
    """States on a line vary in one direction, those of a ball in all; a state moved moves its
    centre so far.
    """
    torch.manual_seed(0)
    line = torch.linspace(-1, 3, 50)[None, :, None] * torch.ones(3)
    ball = torch.randn(1, 20_000, 3)
    assert measure_state(line)["participation_ratio"].item() == pytest.approx(1)
    assert measure_state(ball)["participation_ratio"].item() == pytest.approx(3, abs=0.01)
    assert measure_state(ball)["cosine"].item() == pytest.approx(0, abs=1e-3)
    evolution = measure_evolution([[line, line + torch.tensor([0.0, 3.0, 4.0])]])
    assert evolution.centroid_movement[0].mean == pytest.approx(5)
    assert [len(getattr(evolution, name)) for name in ("norm", "cosine", "centroid_movement")] == [
        2,
        2,
        1,
    ]


@pytest.mark.parametrize(
    ("states", "message"),
    [
        ([], "no sequence to measure"),
        ([[torch.zeros(2, 3)]], r"State 0 of 0: .*\(B, T, d\), not \(2, 3\)"),
        ([[torch.zeros(1, 0, 2)]], "needs a token"),
        (
            [[torch.zeros(1, 3, 2), torch.full((1, 3, 2), torch.nan)]],
            "State 1 of 1: .*not finite in 3 tokens",
        ),
    ],
)
def test_bad_states(states, message):
    with pytest.raises(ValueError, match=message):
        measure_evolution(states)


@pytest.fixture(scope="module")
def model():
    return make(STACKS["mix-d, mix-1, mix-1"], vocab_size=27).float()


def test_evolution_of_text_and_samples(model):
    ids = torch.randint(27, (11, 18))
    sequences = [{"input_ids": row} for row in ids]
    whole = evolution_of_text(model, sequences)
    assert whole.num_states == 4 and (whole.num_sequences, whole.num_tokens, whole.latent_size) == (
        11,
        18,
        2,
    )
    halves = [
        evolution_of_text(model, sequences, **options)
        for options in ({"batch_size": 3}, {"max_sequences": 5})
    ]
    assert (
        halves[0].norm[2].mean == pytest.approx(whole.norm[2].mean, rel=1e-5)
        and halves[1].num_sequences == 5
    )
    with torch.no_grad():
        states = model.flow(model.encode(ids)).states  # other latents, alike

    assert states[1].norm(dim=-1).mean().item() == pytest.approx(whole.norm[1].mean, rel=0.1)

    one, other = (evolution_of_samples(model, 5, length=8, batch_size=size) for size in (2, 16))
    assert one.num_states == 4 and one.norm[0].mean == pytest.approx(other.norm[0].mean, rel=1e-4)
    many = evolution_of_samples(model, 200, length=8, batch_size=200)
    assert many.norm[-1].mean == pytest.approx(
        1.2533, abs=0.05
    )  # of N(0, I) in two dimensions: sqrt(pi / 2)


# -------------------------------------------------------------------------------------------- FLOPs


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("block", ["llama", "qwen3"])
def test_any_configuration_is_counted_as_torch_counts(block, patch_size):
    """Both models of `count_flops`, whose weights hold nothing, against real ones that run."""
    flows = [
        {"coupling": "mixture_rosenblatt", "direction": "left_to_right", "num_hidden_layers": 2},
        {
            "coupling": "mixture_cdf",
            "direction": "right_to_left",
            "num_hidden_layers": 1,
            "num_components": 4,
        },
    ]
    block_config = {
        "model_type": block,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    block_config |= {"intermediate_size": 256, "head_dim": 64, "max_position_embeddings": 64}
    config = TarFlowLMConfig(96, 8, patch_size, 64, flows=flows, block_config=block_config)
    count = count_flops(config)
    model = TarFlowLMModel(config).eval().requires_grad_(False)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model(torch.randint(96, (3, 64)))

    assert 3 * count.flow == pytest.approx(counter.get_total_flops(), rel=0.03)
    assert count.num_tokens == 64 and count.flow_per_token == count.flow / 64
    assert count_flops(config, 32).flow < count.flow / 2  # attention grows faster than the length


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_token_table_is_no_product_and_a_tied_head_is_one(is_tied):
    config = GPT2Config(
        n_embd=64, n_layer=2, n_head=2, vocab_size=100, n_positions=32, tie_word_embeddings=is_tied
    )
    model = GPT2LMHeadModel(config).eval().requires_grad_(False)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model(torch.randint(100, (1, 32)))

    assert forward_flops(model, 32) == [counter.get_total_flops()]


def test_the_papers_count_by_hand():
    """GPT-2 small, 1,024 tokens: S (4w + n (24 w^2 + 2 w S)) + 2 S w V; and a head of sixteen
    inputs.
    """
    count = count_flops(gpt2_sized_config("small"))
    assert (
        count.paper_discrete
        == 1024 * (3072 + 12 * (14_155_776 + 1_572_864)) + 2 * 1024 * 768 * 50257
    )
    mix_1 = {
        "coupling": "mixture_cdf",
        "autoregressive": True,
        "num_components": 64,
        "head_hidden_size": 128,
    }

    # E = min(max(1, floor(72 / 15)), 96) = 4; 6E 15^2 + 128 16 (768 + 15E) + 128 16^2 192
    assert paper_head_flops(mix_1, 768, 16) == 5_400 + 2048 * 828 + 6_291_456

    # E = 2 of 32 inputs
    assert (
        paper_head_flops(mix_1, 768, 16, patch_size=2)
        == 12 * 31**2 + 128 * 32 * (768 + 62) + 128 * 32**2 * 192
    )
    flows = paper_flow_flops(gpt2_sized_config("small", patch_size=2), 1024)
    bodies = [512 * (3072 + n * (14_155_776 + 2 * 768 * 512)) for n in (2, 2, 8)]
    assert flows == [body + 512 * paper_head_flops(mix_1, 768, 16, 2) for body in bodies]
    assert paper_head_flops({"coupling": "affine"}, 768, 16) == 2 * 768 * 32
    mix_d = {"coupling": "mixture_rosenblatt", "num_components": 50257}
    assert paper_head_flops(mix_d, 768, 16, patch_size=2) == 2 * (2 * 768 * 50257)


def test_gpt2_sizes_have_gpt2s_blocks():
    """The true count of the discrete transformer is the paper's, but for the products with the
    values and the 4w.
    """
    for size, (layers, width, _) in GPT2_SIZES.items():
        count = count_flops(gpt2_sized_config(size, max_position_embeddings=128))
        missing = (
            2 * layers * width * 128**2 + 2 * 128 * width - 4 * 128 * width
        )  # with the beginning-of-sequence token
        assert count.discrete == pytest.approx(count.paper_discrete + missing, rel=0.01)

    with pytest.raises(
        ValueError, match="size must be one of small, medium, large, xl, not 'tiny'"
    ):
        gpt2_sized_config("tiny")

    with pytest.raises(ValueError, match="positive multiple of patch_size: 3, 2"):
        count_flops(gpt2_sized_config("small", patch_size=2), 3)


# ----------------------------------------------------------------------------------------- commands


def script(name, *arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    return capsys.readouterr().out


def test_flops_as_a_command(model, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    options = {"monkeypatch": monkeypatch, "capsys": capsys}
    sizes = ("--sizes", "small", "xl", "--patch_sizes", 1, 4)
    table = script("flops.py", *sizes, "--figure", tmp_path / "figure.svg", **options)
    expected = [count_flops(gpt2_sized_config(size, patch_size=4)) for size in ("small", "xl")]
    for line, count in zip(table.splitlines()[1:], expected, strict=True):
        assert line.split()[-2:] == [f"{count.ratio:.3f}", f"({count.paper_ratio:.3f})"]

    assert (tmp_path / "figure.svg").read_text().count("<svg") == 1
    model.save_pretrained(tmp_path / "model")
    count = count_flops(model.config)

    for where in (
        ("--checkpoint", tmp_path / "model"),
        ("--recipe", ROOT / "examples" / "recipes" / "demo.json"),
    ):
        printed = script("flops.py", *where, "--patch_sizes", 1, **options)
        assert printed.splitlines()[-1].split()[::2] == [
            "1",
            printed.split("ratio:")[1].split(";")[0].strip(),
        ]
        assert (f"ratio:                {count.ratio:.3f}" in printed) == (
            where[0] == "--checkpoint"
        )


def test_evolution_as_a_command(model, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    save_model(model, character_tokenizer(), tmp_path / "model")
    (tmp_path / "text.txt").write_text("some words to encode " * 10)
    arguments = [
        "--data",
        tmp_path / "text.txt",
        "--num_sequences",
        4,
        "--length",
        9,
        "--device",
        "cpu",
    ]
    arguments += ["--figure", tmp_path / "evolution.svg", "--output", tmp_path / "evolution.json"]
    options = {"monkeypatch": monkeypatch, "capsys": capsys}
    printed = script("latent_evolution.py", tmp_path / "model", *arguments, **options)
    assert printed.count("flow 3") == 2 and "text: 4 sequences of 9 tokens" in printed
    import json

    found = json.loads((tmp_path / "evolution.json").read_text())
    ids = torch.tensor(character_tokenizer()("some words to encode " * 10).input_ids)
    expected = evolution_of_text(model, cut_text(ids[:36], 9))
    assert found["text"]["norm"][3]["mean"] == pytest.approx(expected.norm[3].mean, rel=1e-4)
    assert set(found) == {*provenance_of(model, "", None), "text", "samples"}


def test_pictures_show_the_numbers():
    pytest.importorskip("matplotlib")
    from tarflow_hf.flops import figure_7
    from tarflow_hf.report import plot_evolution, plot_flops

    counts = figure_7(["small"], [1, 2])
    left, right = plot_flops(counts).axes
    assert list(left.lines[0].get_ydata()) == [
        count.paper_ratio for count in counts["small"].values()
    ]
    assert list(right.lines[0].get_ydata()) == [count.ratio for count in counts["small"].values()]
    evolution = measure_evolution([[torch.randn(3, 5, 2) for _ in range(3)]])
    panels = plot_evolution({"text": evolution}, ["left_to_right", "right_to_left"]).axes
    assert list(panels[0].lines[0].get_ydata()) == [statistic.mean for statistic in evolution.norm]
    assert (
        list(panels[3].lines[0].get_xdata()) == [1, 2]
        and "←" in panels[0].get_xticklabels()[2].get_text()
    )


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    from tarflow_hf.report import plot_flops

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot_flops({})
