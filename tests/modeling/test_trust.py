"""Faults that would pass without a word: NaN, decoders that look ahead, overridden fields, wrappers."""

import copy
import math

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from helpers.models import STACKS, make
from helpers.streaming import Recorder
from tarflow_hf import TarFlowLMConfig, TarFlowLMModel
from tarflow_hf.data import character_tokenizer
from tarflow_hf.modeling import causality
from tarflow_hf.training import recompute_activations

STACK = "mix-d, mix-1, mix-1"

# -------------------------------------------------------------------------------------------- NaN


@pytest.mark.parametrize("method", ["sequential", "parallel"])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_nan_in_a_head_is_an_error_that_names_the_weight(index, method):
    model = make(STACKS[STACK])
    name, parameter = list(model.flow.layers[index].head.named_parameters())[-1]
    with torch.no_grad():
        parameter.view(-1)[0] = math.nan

    with pytest.raises(ValueError, match=rf"flow\.layers\.{index}\.head\.{name} has a weight"):
        model.generate(inverse_method=method)


@pytest.mark.parametrize("method", ["sequential", "parallel"])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_nan_in_activations_is_an_error_that_names_the_flow(index, method):
    model = make(STACKS[STACK])
    layer = model.flow.layers[index].decoder.layers[0]

    def spoil(module, args, output):
        return output * math.inf

    handle = layer.mlp.register_forward_hook(spoil)
    position = 17 if index == 1 else 0
    with pytest.raises(ValueError, match=rf"flow {index} .* first at position {position}\."):
        model.generate(inverse_method=method)
    if index == 0:
        with pytest.raises(ValueError, match="latent of token 0"):
            model.generate(streamer=Recorder())

    handle.remove()
    model.generate()


def test_nan_in_noise_and_codebook():
    model = make(STACKS[STACK])
    noise = torch.zeros(1, 18, 2)
    noise[0, 5, 1] = math.nan
    with pytest.raises(ValueError, match="noise is not finite, first at position 5"):
        model.generate(noise=noise)

    with torch.no_grad():
        model.codebook.mean[1, 1] = math.nan
    with pytest.raises(ValueError, match=r"flow\.codebook\.mean has a weight"):
        model.generate()


def test_float16_that_overflows_writes_nothing():
    model = make(STACKS[STACK]).float()
    with torch.no_grad():  # the same function in exact arithmetic
        for layer in model.flow.layers[0].decoder.layers:
            layer.mlp.up_proj.weight.mul_(1e6)
            layer.mlp.down_proj.weight.div_(1e6)

    model.generate()
    with pytest.raises(ValueError, match=r"not finite.* float16 overflows"):
        model.half().generate()


# -------------------------------------------------------------------------------- train mode


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["sequential", "parallel"])
def test_train_mode_inverts_as_eval_mode(method, checkpointing):
    model = make(STACKS[STACK], block_config={
        "model_type": "llama", "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32,
        "max_position_embeddings": 18, "attention_dropout": 0.5,
    })  # fmt: skip
    noise = torch.randn(2, 18, 2, dtype=torch.float64)
    expected = model.generate(noise=noise, inverse_method=method)
    latents = model.flow(noise, reverse=True).latents

    if checkpointing:
        recompute_activations(model)

    model.train()
    assert torch.equal(model.generate(noise=noise, inverse_method=method), expected)
    assert torch.equal(model.flow(noise, reverse=True, inverse_method="auto").latents, latents)
    assert all(module.training for module in model.modules())


# ------------------------------------------------------------------------------------- decoders

SIZE = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}


def with_block(**block):
    flows = [
        {"coupling": "mixture_rosenblatt", "direction": "left_to_right", "num_hidden_layers": 2}
    ]
    return TarFlowLMConfig(
        vocab_size=11, latent_size=3, max_position_embeddings=32, block_config=block, flows=flows
    )


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"model_type": "bert"}, "bert looks ahead"),
        ({"model_type": "modernbert"}, "modernbert looks ahead"),
        ({"model_type": "electra", "embedding_size": 32}, "electra looks ahead"),
        ({"model_type": "t5"}, "t5 is a model of several parts"),
        ({"model_type": "llava"}, "llava is a model of several parts"),
        ({"model_type": "trocr"}, "trocr makes no decoder"),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_decoders_that_are_not_causal_are_refused(block, message):
    with pytest.raises(ValueError, match=message):
        TarFlowLMModel(with_block(**block, **SIZE))


# What the library's caches of these give slot by slot, and with slots taken out again.
CACHES = {
    "gemma2": ({"sliding_window": 3}, True, True),
    "gpt_oss": ({"num_local_experts": 2}, True, True),  # knows no sdpa; each token has both experts
    "openai-gpt": ({"n_embd": 32, "n_head": 4}, False, False),  # has no cache
    "mamba": ({"state_size": 4}, True, False),  # states, which forget what cannot be cropped
    "recurrent_gemma": ({"lru_width": 32, "num_key_value_heads": 1}, False, False),
}


@pytest.mark.parametrize("method", ["sequential", "parallel"])
@pytest.mark.parametrize("model_type", CACHES)
def test_every_causal_decoder_is_inverted(model_type, method):
    """With its cache where that is right, and else from all inputs anew; gaps included."""
    options, takes_steps, takes_crops = CACHES[model_type]
    block = {"model_type": model_type, **SIZE, "head_dim": 8, "num_key_value_heads": 2, **options}
    is_recurrent = model_type in ("mamba", "recurrent_gemma")
    torch.manual_seed(0)
    config = with_block(**block)
    config.conditional = not is_recurrent  # these take no places of their own
    model = TarFlowLMModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))

    decoder = model.flow.layers[0].decoder
    assert (decoder.takes_steps, decoder.takes_crops) == (takes_steps, takes_crops)

    ids, latents = torch.randint(11, (2, 9)), torch.randn(2, 9, 3)
    options = {}
    if not is_recurrent:
        options = {"observed_ids": ids, "observed_mask": torch.arange(9).expand(2, -1) % 4 == 1}

    with torch.no_grad():
        noise = model.flow(latents, **options).noise
        found = model.flow(noise, reverse=True, inverse_method=method, **options).latents

    is_variable = ~options.get("observed_mask", torch.zeros(2, 9, dtype=torch.bool))
    torch.testing.assert_close(found[is_variable], latents[is_variable], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("model_type", ["mamba", "openai-gpt"])
def test_drafts_change_no_token_of_a_decoder_without_keys_and_values(model_type):
    options, *_ = CACHES[model_type]
    torch.manual_seed(0)
    model = TarFlowLMModel(with_block(model_type=model_type, **SIZE, **options)).eval()
    prompt, noise = torch.tensor([[1, 2, 3, 1, 2, 3, 1, 2]]), torch.randn(1, 24, 3)
    expected = model.generate(prompt, noise=noise)
    assert torch.equal(model.generate(prompt, noise=noise, prompt_lookup_num_tokens=4), expected)


def test_a_decoder_without_a_cache_is_said_to_be_slow(monkeypatch):
    said = []
    monkeypatch.setattr(causality, "_measured", {})
    monkeypatch.setattr(causality.logger, "warning_once", said.append)
    model = TarFlowLMModel(with_block(model_type="openai-gpt", n_embd=32, n_head=4, n_positions=64))
    assert len(said) == 1 and "openai-gpt has no cache" in said[0] and "llama or qwen3" in said[0]
    with pytest.raises(ValueError, match="capture_step=True needs a cache"):
        model.generate(max_new_tokens=4, capture_step=True)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "mistral", "gemma", "gpt_neox"])
def test_causal_decoders_are_measured_once(model_type, monkeypatch):
    measured = []
    measure = causality._measure

    def count(decoder):
        measured.append(1)
        return measure(decoder)

    monkeypatch.setattr(causality, "_measured", {})
    monkeypatch.setattr(causality, "_measure", count)
    state = torch.get_rng_state()
    config = with_block(model_type=model_type, **SIZE, head_dim=8, num_key_value_heads=4)
    torch.set_rng_state(state)
    TarFlowLMModel(config)
    first = torch.get_rng_state()
    torch.set_rng_state(state)
    TarFlowLMModel(config)
    assert measured == [1] and torch.equal(first, torch.get_rng_state())


def test_what_is_loaded_is_measured_too(tmp_path, monkeypatch):
    TarFlowLMModel(with_block(model_type="llama", **SIZE)).save_pretrained(tmp_path)
    monkeypatch.setattr(causality, "_measured", {})
    monkeypatch.setattr(causality, "_differ", lambda a, b: True)
    with pytest.raises(ValueError, match="llama looks ahead"):
        TarFlowLMModel.from_pretrained(tmp_path)


def test_rotary_embeddings_that_change_with_the_length_are_refused():
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 8.0}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rope |= {"original_max_position_embeddings": 8}

    block = dict(SIZE, model_type="llama", head_dim=8, rope_parameters=rope)
    config = with_block(**block)
    with pytest.raises(ValueError, match="max_position_embeddings must be at most 8, not 32"):
        TarFlowLMModel(config)

    config.max_position_embeddings = 8
    TarFlowLMModel(config)


# ------------------------------------------------------------------------------- overridden fields

AFFINE = [{"coupling": "affine", "direction": "left_to_right", "num_hidden_layers": 2}]
OVERRIDDEN = {
    "vocab_size": (40, None),
    "latent_size": (3, None),
    "max_position_embeddings": (512, None),
    "patch_size": (2, None),
    "conditional": (True, None),
    "posterior_top_k": (2, None),
    "flows": (AFFINE, None),
    "bos_token_id": (1, None),
    "eos_token_id": ([1, 2], None),
    "pad_token_id": (1, None),
    "start_token_id": (3, None),
    "embedding_scale": (2.0, None),
    "tie_word_embeddings": (True, None),
    "hidden_size": (96, "hidden_size is 96, but 128 in block_config"),
    "num_attention_heads": (2, "num_attention_heads is 2, but 4"),
    "intermediate_size": (8, "intermediate_size is 8"),
    "num_hidden_layers": (2, "num_hidden_layers is the sum over the flows"),
}


def test_a_smaller_patch_makes_room_for_more_positions():
    config = TarFlowLMConfig(
        hidden_size=32, num_attention_heads=2, max_position_embeddings=64, patch_size=4
    )
    config.block_config.max_position_embeddings = 16
    config.patch_size = 1
    assert config.block_config.max_position_embeddings == 64


@pytest.mark.parametrize("way", ["keyword", "attribute"])
@pytest.mark.parametrize("name", OVERRIDDEN)
def test_an_overridden_field_has_its_effect_or_an_error(name, way):
    path, (value, message) = "checkpoints/python-docs", OVERRIDDEN[name]

    def override():
        if way == "keyword":
            return AutoConfig.from_pretrained(path, **{name: value})

        config = AutoConfig.from_pretrained(path)
        setattr(config, name, value)
        return config

    if message is not None:
        with pytest.raises(ValueError, match=message):
            override()
        return

    config = override()
    arguments = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "auto_map")}
    assert TarFlowLMConfig(**arguments).to_dict() == config.to_dict()
    model = TarFlowLMModel(config)
    length = min(config.max_position_embeddings, 400)
    ids = torch.randint(config.vocab_size, (1, length))
    assert model(ids, labels=ids).loss.isfinite()
    decoder = model.flow.layers[0].decoder.config
    assert decoder.max_position_embeddings * config.patch_size >= config.max_position_embeddings
    with pytest.raises(ValueError, match=name):
        setattr(config, name, "nonsense" if name != "posterior_top_k" else 0)


def test_a_refused_value_changes_nothing():
    config = make(STACKS[STACK]).config
    before = copy.deepcopy(config.to_dict())
    for name, value in (("latent_size", 0), ("vocab_size", -1), ("flows", []), ("patch_size", 5)):
        with pytest.raises(ValueError, match=name):
            setattr(config, name, value)

    assert config.to_dict() == before


# ---------------------------------------------------------------------------------------- adapters


@pytest.fixture
def peft():
    """The package, which the environment of the oldest versions lacks."""
    return pytest.importorskip("peft")


@pytest.mark.parametrize(
    "stack", ["affine", "mix-d", "mix-1", "mix-1, independent dimensions", STACK]
)
def test_adapters_on_all_linear_maps(peft, stack):
    model, ids = make(STACKS[stack]), torch.arange(10)[None] % 5
    noise = torch.randn(1, 10, 2, dtype=torch.float64)
    expected = model.generate(noise=noise)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
    )
    assert torch.equal(adapted.generate(noise=noise), expected)
    adapted(input_ids=ids, labels=ids).loss.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in adapted.parameters())


ON_TABLES = {
    "PromptTuningConfig": {"task_type": "CAUSAL_LM", "num_virtual_tokens": 2},
    "PrefixTuningConfig": {"task_type": "CAUSAL_LM", "num_virtual_tokens": 2},
    "PromptEncoderConfig": {"task_type": "CAUSAL_LM", "num_virtual_tokens": 2},
    "TrainableTokensConfig": {"token_indices": [1]},
    "LoraConfig": {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": [1]},
}


@pytest.mark.parametrize("stack", ["affine", "mix-d"])
@pytest.mark.parametrize("kind", ON_TABLES)
def test_adapters_of_token_embeddings_are_refused(peft, kind, stack):
    model = make(STACKS[stack])
    with pytest.raises(AttributeError, match=r"has no table of token embeddings.* LoRA of linear"):
        peft.get_peft_model(model, getattr(peft, kind)(**ON_TABLES[kind]))


def test_modules_are_found_and_missing_ones_are_not():
    model = make(STACKS["mix-d"])
    assert model.get_submodule("flow.layers.0.decoder") is model.flow.layers[0].decoder
    for name in ("flow.layers.1", "embeddings.word_embeddings"):
        with pytest.raises(AttributeError, match="has no attribute"):
            model.get_submodule(name)

    assert not hasattr(model.get_input_embeddings(), "in_features")


def test_an_adapter_saved_with_its_tokenizer_loads(peft, tmp_path):
    base, folder = tmp_path / "base", tmp_path / "adapter"
    make(STACKS["mix-d"], vocab_size=28).float().save_pretrained(base)
    adapted = peft.get_peft_model(
        TarFlowLMModel.from_pretrained(base),
        peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]),
    )
    adapted.save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(folder)
    noise = torch.randn(1, 10, 2)
    assert len(AutoTokenizer.from_pretrained(folder)) <= 28
    assert torch.equal(loaded.generate(noise=noise), adapted.generate(noise=noise))
    merged = loaded.merge_and_unload()
    assert torch.equal(merged.generate(noise=noise), adapted.generate(noise=noise))
    assert merged.get_input_embeddings().weight.shape == (28, 2)
