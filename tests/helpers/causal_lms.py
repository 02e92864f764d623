"""Tiny causal language models of many architectures, moved off their initial weights."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 96
TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 40}

# The options of each architecture, beyond the sizes.
CAUSAL_LMS = {
    "llama": {},
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 6},
    "gpt_neox": {},
    "olmo2": {},
    "phi": {},  # its output projection has a bias
    "phi3": {"sliding_window": 6},
    "opt": {"ffn_dim": 40, "word_embed_proj_dim": 32},
    "gpt2": GPT,
    "gemma": {},
    "gemma3_text": {"sliding_window": 6, "layer_types": ["full_attention", "sliding_attention"]},
    "granite": {
        "embedding_multiplier": 6.0,
        "logits_scaling": 3.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.2,
    },
    "cohere": {"logit_scale": 0.25},
    "starcoder2": {},
    "qwen3_moe": EXPERTS,
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
TIED = {"tie_word_embeddings": True}


def tiny_causal_lm(name, dtype=torch.float32, seed=0, **options):
    """Returns a small model of an architecture whose every parameter matters."""
    torch.manual_seed(seed)
    sizes = {
        key: value for key, value in TINY.items() if not name.startswith("gpt2") or "_id" in key
    }
    sizes["vocab_size"] = VOCABULARY
    config = AutoConfig.for_model(
        name.split()[0], **{**sizes, **CAUSAL_LMS.get(name, {}), **options}
    )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))

    return model
