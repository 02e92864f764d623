"""TarFlowLMConfig: defaults, round trips, and what it refuses."""

import copy

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, Qwen3Config

from tarflow_hf import TarFlowLMConfig, TarFlowLMModel


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


# ------------------------------------------------------------------------------ fields that change

SIZES = {"vocab_size": 27, "latent_size": 3, "hidden_size": 32, "num_attention_heads": 2}
SIZES |= {"max_position_embeddings": 16}


def affine(**changes):
    return flow(**{"coupling": "affine", **changes})


# A field, values that it refuses, and part of the message.
REFUSED_VALUES = {
    "start_token_id": ((99, -1, 1.0, "x"), "start_token_id must be in 0, ..., vocab_size - 1 = 26"),
    "embedding_scale": ((0, -1, "x", True), "embedding_scale must be positive and finite"),
    "tie_word_embeddings": (("no", 1), "tie_word_embeddings must be true or false"),
    "eos_token_id": ((2.5, "a", []), "eos_token_id must be an integer, a list"),
    "bos_token_id": ((2.5, "a", [1]), "bos_token_id must be an integer or None"),
    "pad_token_id": ((2.5, "a", [1]), "pad_token_id must be an integer or None"),
}


@pytest.mark.parametrize("way", ["keyword", "attribute", "loaded"])
@pytest.mark.parametrize("name", REFUSED_VALUES)
def test_every_way_to_a_field_is_checked(name, way, tmp_path):
    values, message = REFUSED_VALUES[name]
    config = TarFlowLMConfig(**SIZES, flows=[tied()])
    config.save_pretrained(tmp_path)
    for value in values:
        with pytest.raises(ValueError, match=message):
            if way == "keyword":
                TarFlowLMConfig(**SIZES, flows=[tied()], **{name: value})
            elif way == "attribute":
                setattr(config, name, value)
            else:
                AutoConfig.from_pretrained(tmp_path, **{name: value})


def test_what_a_field_needs_stays():
    """An option of the first flow's embeddings meets none, whichever of both comes last."""
    options = {"start_token_id": 3, "embedding_scale": 2.0, "tie_word_embeddings": True}
    for name, value in options.items():
        config = TarFlowLMConfig(**SIZES, flows=[affine()])
        with pytest.raises(ValueError, match="need a first flow of context posterior"):
            setattr(config, name, value)

        config = TarFlowLMConfig(**SIZES, flows=[tied()], **{name: value})
        for other, change in (("flows", [affine()]), ("patch_size", 2)):
            with pytest.raises(ValueError, match="need a first flow of context posterior"):
                setattr(config, other, change)

    config = TarFlowLMConfig(**SIZES, flows=[tied()], start_token_id=26)
    with pytest.raises(ValueError, match="start_token_id must be in"):
        config.vocab_size = 26


IN_PLACE = {
    r"flows\[0\].direction must be one of": lambda c: c.flows[0].update(direction="up"),
    r"unknown options \['foo'\]": lambda c: c.flows[0].update(foo=3),
    "coupling must be one of": lambda c: c.flows[0].update(coupling="afine"),
    "direction must be one of": lambda c: c.flows.append({"coupling": "affine"}),
    "block_config.max_position_embeddings is 4, fewer than the 16": lambda c: setattr(
        c.block_config, "max_position_embeddings", 4
    ),
}


@pytest.mark.parametrize("message", IN_PLACE)
def test_a_change_in_place_is_refused_where_it_would_act(message, tmp_path):
    config = TarFlowLMConfig(**SIZES, flows=[tied()])
    IN_PLACE[message](config)
    for use in (TarFlowLMModel, lambda config: config.save_pretrained(tmp_path)):
        with pytest.raises(ValueError, match=message):
            use(config)


def test_a_flow_that_is_appended_in_place_is_completed():
    config = TarFlowLMConfig(**SIZES, flows=[tied()])
    config.flows.append(flow())
    model = TarFlowLMModel(config)
    assert config.flows[1]["context"] == "latent" and config.flows[1]["num_components"] == 8
    ids = torch.randint(27, (1, 8))
    assert model(ids).elbo.isfinite().all()


# -------------------------------------------------------------------------------- unknown keywords


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_key_value_heads", 1, "num_key_value_heads is a field of the decoder's configuration"),
        ("attention_dropout", 0.1, "give it in block_config"),
        ("hidden_act", "relu", "give it in block_config"),
        ("rope_theta", 1e4, "give it in block_config"),
        ("rope_scaling", {"rope_type": "linear", "factor": 2.0}, "give it in block_config"),
        ("latent_dim", 5, "no field latent_dim: did you mean latent_size"),
        ("patchsize", 2, "did you mean patch_size"),
        ("posterior_topk", 2, "did you mean posterior_top_k"),
    ],
)
def test_a_keyword_without_effect_is_refused(name, value, message):
    with pytest.raises(ValueError, match=message):
        TarFlowLMConfig(**SIZES, **{name: value})


def test_other_keywords_are_kept_as_the_library_keeps_them(tmp_path):
    config = TarFlowLMConfig(
        **SIZES, sep_token_id=3, author="me", dtype="bfloat16", use_cache=False
    )
    assert (config.sep_token_id, config.author, config.dtype) == (3, "me", torch.bfloat16)

    # What is set later is saved, and loaded by whatever library comes next.
    config.pretraining_tp, config.latent_dim = 1, 5
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert (loaded.pretraining_tp, loaded.latent_dim, loaded.author) == (1, 5, "me")
    assert copy.deepcopy(loaded).to_dict() == loaded.to_dict()


# ----------------------------------------------------------------------------- decoders of a depth

BY_LAYER = {
    "llama4_text": {"intermediate_size_mlp": 32, "num_local_experts": 2, "num_key_value_heads": 2},
    "zamba2": {"mamba_headdim": 8, "n_mamba_heads": 8, "mamba_d_state": 8},
    "gpt_neo": {},
    "smollm3": {},
    "gemma4_text": {"head_dim": 8, "num_key_value_heads": 2, "hidden_size_per_layer_input": 0},
}


@pytest.mark.parametrize("model_type", BY_LAYER)
def test_a_decoder_that_lists_its_layers_is_made_at_each_depth(model_type):
    block = {"model_type": model_type, "hidden_size": 32, "num_attention_heads": 4}
    block |= {"intermediate_size": 32, "max_position_embeddings": 16, **BY_LAYER[model_type]}
    sizes = {"vocab_size": 27, "latent_size": 3, "max_position_embeddings": 16}
    flows = [tied(num_hidden_layers=2), flow(num_hidden_layers=1)]
    model = TarFlowLMModel(TarFlowLMConfig(**sizes, block_config=block, flows=flows))
    decoders = [layer.decoder for layer in model.flow.layers]
    assert [decoder.config.num_hidden_layers for decoder in decoders] == [2, 1]
    layers = [
        next(part for part in decoder.children() if isinstance(part, torch.nn.ModuleList))
        for decoder in decoders
    ]
    assert [len(each) for each in layers] == [2, 1]
    assert model(torch.randint(27, (1, 8))).elbo.isfinite().all()


def test_layers_keep_their_kinds():
    """The first of a list's; and where a flow is deeper than the list, the library's own."""
    block = {"model_type": "smollm3", "hidden_size": 32, "num_attention_heads": 4}
    block |= {"num_hidden_layers": 3, "no_rope_layers": [0, 1, 0], "num_key_value_heads": 2}
    config = TarFlowLMConfig(block_config=block)
    assert config.decoder_config(2).no_rope_layers == [0, 1]
    assert config.decoder_config(3).no_rope_layers == [0, 1, 0]
    assert config.decoder_config(5).no_rope_layers == [1, 1, 1, 0, 1]
