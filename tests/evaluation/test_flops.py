"""FLOPs, against torch's own counter and the paper's formulas by hand."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

from helpers import ROOT
from helpers.scripts import script
from tarflow_hf import TarFlowLMConfig, TarFlowLMModel
from tarflow_hf.cost import forward_flops
from tarflow_hf.evaluation import (
    GPT2_SIZES,
    count_flops,
    gpt2_sized_config,
    paper_flow_flops,
    paper_head_flops,
)


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("block", ["llama", "qwen3"])
def test_any_configuration_is_counted_as_torch_counts(block, patch_size):
    """Both models that `count_flops` builds without weights, against real ones that run."""
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
    """GPT-2 small on 1,024 tokens, and a head of sixteen inputs.

    The paper counts S (4w + n (24 w^2 + 2 w S)) + 2 S w V.
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
    """The true count of the discrete transformer is nearly the paper's.

    The paper leaves out the products with the values, and adds 4w.
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
