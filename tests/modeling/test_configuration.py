"""TarFlowLMConfig: defaults, round trips, and what it refuses."""

import pytest
from transformers import AutoConfig, LlamaConfig, Qwen3Config

from tarflow_hf import TarFlowLMConfig


def flow(**changes):
    return {
        "coupling": "mixture_cdf",
        "direction": "left_to_right",
        "num_hidden_layers": 1,
        **changes,
    }


def tied(**changes):
    return flow(**{"coupling": "mixture_rosenblatt", **changes})


def test_defaults_fill_in():
    config = TarFlowLMConfig(
        vocab_size=27, flows=[tied(), flow(direction="right_to_left"), tied(num_components=4)]
    )
    assert config.flows[0] == tied(tie_codebook=True, num_components=27, context="posterior")
    assert config.flows[1]["num_components"] == 8 and config.flows[1]["autoregressive"] is True
    assert config.flows[2]["tie_codebook"] is False and config.flows[2]["context"] == "latent"
    assert (config.hidden_size, config.num_attention_heads, config.intermediate_size) == (
        768,
        12,
        2048,
    )
    assert config.num_hidden_layers == 3 and config.posterior_top_k is None
    assert TarFlowLMConfig().posterior_top_k == 8  # GPT-2's vocabulary


def test_the_callers_dicts_are_left_alone():
    flows = [tied()]
    TarFlowLMConfig(vocab_size=27, flows=flows)
    assert flows == [tied()]


@pytest.mark.parametrize(
    "block", [None, {"model_type": "qwen3", "hidden_size": 32, "num_attention_heads": 4}]
)
def test_saved_and_loaded_it_is_the_same(tmp_path, block):
    flows = [tied(patch_head_layers=1), flow(direction="right_to_left_within_patch")]
    config = TarFlowLMConfig(
        vocab_size=27, latent_size=3, patch_size=2, block_config=block, flows=flows
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, TarFlowLMConfig) and type(loaded.block_config) is type(
        config.block_config
    )
    assert loaded.to_diff_dict() == config.to_diff_dict()


def test_a_block_config_sets_the_sizes():
    block = Qwen3Config(hidden_size=64, num_attention_heads=4, intermediate_size=96)
    config = TarFlowLMConfig(block_config=block)
    assert (config.hidden_size, config.num_attention_heads, config.intermediate_size) == (64, 4, 96)
    assert isinstance(
        TarFlowLMConfig(hidden_size=64, num_attention_heads=4).block_config, LlamaConfig
    )


REFUSED = {
    "vocab_size must be an integer of at least 1, not 0": dict(vocab_size=0),
    "latent_size must be an integer of at least 1, not 0": dict(latent_size=0),
    "latent_size must be an integer of at least 1, not 2.5": dict(latent_size=2.5),
    "patch_size must be an integer of at least 1, not -1": dict(patch_size=-1),
    "multiple of patch_size: 10, 4": dict(max_position_embeddings=10, patch_size=4),
    "multiple of num_attention_heads: 10, 4": dict(hidden_size=10, num_attention_heads=4),
    "at least one flow": dict(flows=[]),
    r"flows\[0\] must be a dict": dict(flows=["mixture_cdf"]),
    r"flows\[0\].coupling must be one of affine, mixture_cdf, mixture_rosenblatt, not 'spline'": dict(
        flows=[flow(coupling="spline")]
    ),
    r"flows\[1\].direction must be one of left_to_right, right_to_left, right_to_left_within_patch, not 'up'": dict(
        flows=[flow(), flow(direction="up")]
    ),
    r"flows\[0\].num_hidden_layers must be an integer of at least 1, not 0": dict(
        flows=[flow(num_hidden_layers=0)]
    ),
    r"flows\[0\].num_hidden_layers must be an integer of at least 1, not None": dict(
        flows=[{"coupling": "affine", "direction": "left_to_right"}]
    ),
    r"flows\[0\].num_components must be an integer of at least 1": dict(
        flows=[flow(num_components=0)]
    ),
    r"flows\[0\] has unknown options \['num_component'\]": dict(flows=[flow(num_component=3)]),
    r"unknown options \['num_components'\]: a flow of affine": dict(
        flows=[flow(coupling="affine", num_components=3)]
    ),
    r"flows\[0\].num_components must be vocab_size, 27": dict(
        vocab_size=27, flows=[tied(num_components=5)]
    ),
    r"flows\[1\].tie_codebook must be False": dict(flows=[flow(), tied(tie_codebook=True)]),
    r"flows\[0\].context must be one of latent, posterior, not 'both'": dict(
        flows=[flow(context="both")]
    ),
    r"flows\[1\].context must be latent": dict(flows=[flow(), flow(context="posterior")]),
    r"flows\[0\].autoregressive must be true or false, not 'no'": dict(
        flows=[flow(autoregressive="no")]
    ),
    r"flows\[0\].patch_head_layers must be 0, not 1: with patch_size 1": dict(
        flows=[tied(patch_head_layers=1)]
    ),
    r"flows\[0\].patch_head_layers must be an integer of at least 1, not -1": dict(
        patch_size=2, flows=[tied(patch_head_layers=-1)]
    ),
    r"unknown options \['patch_head_layers'\]": dict(
        patch_size=2, flows=[flow(patch_head_layers=1)]
    ),
    "posterior_top_k": dict(posterior_top_k=0),
    "block_config needs the model_type of an architecture": dict(
        block_config={"model_type": "lama"}
    ),
    "block_config must be a configuration or a dict": dict(block_config="llama"),
    "hidden_size is 32, but 64 in block_config": dict(
        hidden_size=32, block_config=LlamaConfig(hidden_size=64, num_attention_heads=4)
    ),
    "block_config.max_position_embeddings is 8, fewer than": dict(
        block_config=LlamaConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=8)
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_contradictions_are_refused(message):
    with pytest.raises(ValueError, match=message):
        TarFlowLMConfig(**REFUSED[message])
