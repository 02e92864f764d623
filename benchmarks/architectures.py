"""Try every causal architecture of the installed transformers, at a tiny size, as a source.

    python benchmarks/architectures.py --output docs/architectures.md     # minutes
    python benchmarks/architectures.py --only llama gpt2                  # prints the table

Each gets random weights, moved off their initial values, and is converted and taken back. "exact"
means 1e-4 nats a token, 1e-3 in log-probabilities, and logits within 1e-4 on the way back.
"""

import argparse
import contextlib
import os
import signal
import textwrap
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tarflow_hf.conversion import from_causal_lm, probe, to_causal_lm

VOCABULARY, SECONDS, MAX_PARAMETERS = 96, 60, 3e7

# Fields of configs, by the names that they have in any of them. What a config has not is left out.
TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "d_model": 32,
    "d_ff": 48,
    "ffn_dim": 48,
    "ffn_hidden_size": 48,
    "word_embed_proj_dim": 32,
    "embedding_size": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "encoder_layers": 1,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "num_layers": 2,
    "num_heads": 4,
    "n_layers": 2,
    "n_heads": 4,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_inner": 48,
    "n_positions": 64,
    "n_ctx": 64,
    "rotary_dim": 4,
    "d_kv": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_d_ssm": 64,
    "mamba_n_groups": 1,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    "state_size": 8,
    "lru_width": 32,
    "attention_hidden_size": 32,
}
OF_ONE = {
    "dots3_note": {"num_key_value_heads": 4},
    "dots3_note_text": {"num_key_value_heads": 4},
    "dots1": {"n_shared_experts": 1, "first_k_dense_replace": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mamba2": {"num_heads": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
}


def tiny_config(model_type: str):
    """A config of few parameters, with its sub-configs."""
    config_class = CONFIG_MAPPING[model_type]
    known = config_class().to_dict()
    names = {**{name: name for name in known}, **getattr(config_class, "attribute_map", {})}
    options = {names[name]: value for name, value in TINY.items() if name in names}
    if "kv_lora_rank" in names and "num_key_value_heads" in names:
        options[names["num_key_value_heads"]] = TINY["num_attention_heads"]  # keys of its own each

    options |= OF_ONE.get(model_type, {})
    for name in getattr(config_class, "sub_configs", {}):
        if isinstance(known.get(name), dict) and known[name].get("model_type") in CONFIG_MAPPING:
            options[name] = tiny_config(known[name]["model_type"]).to_dict()

    return config_class(**options)


def tiny_source(model_type: str):
    """A source whose every parameter matters.

    Raises:
        ValueError: If it is large in spite of its sizes.
    """
    config = tiny_config(model_type)
    with torch.device("meta"):
        num_parameters = AutoModelForCausalLM.from_config(config).num_parameters()
    if num_parameters > MAX_PARAMETERS:
        raise ValueError(f"{num_parameters:,} parameters in spite of tiny sizes")

    torch.manual_seed(0)
    source = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))

    return source


@contextlib.contextmanager
def time_limit(seconds: int):
    def stop(*_):
        raise TimeoutError(f"more than {seconds} seconds")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


@torch.no_grad()
def result(model_type: str) -> tuple[str, str]:
    """The outcome for an architecture, in a word, and what is to be said of it."""
    try:
        with time_limit(SECONDS):
            source = tiny_source(model_type)
    except Exception as error:  # foreign code
        return "not tried", one_line(error)

    try:
        with time_limit(SECONDS):
            model = from_causal_lm(source, start_token_id=1)
            ids = torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(2))
            found = probe(source, model, ids)
            if abs(found.elbo_nats - found.source_nats) > 1e-4 or found.max_difference > 1e-3:
                return "fails", str(found)

            # A tiny hybrid may have no attention layer, and the library's cache then no length.
            back, there = (lm(ids, use_cache=False) for lm in (to_causal_lm(model), source))
            difference = (back.logits - there.logits).abs().max()
            if difference > 1e-4:
                return "fails", f"on the way back logits differ by {difference:.1e}"
    except ValueError as error:
        return "refused", one_line(error)
    except Exception as error:
        return "fails", one_line(error)

    return "exact", "tied tables" if model.config.tie_word_embeddings else ""


def one_line(error: Exception) -> str:
    """The first two sentences of a message, without what would break a table."""
    words = " ".join(str(error).split()).replace("|", "\\|").replace("<", "&lt;")
    sentences = words.split(". ")
    text = ". ".join(sentences[:2]) if len(sentences[0]) < 90 else sentences[0]
    prefix = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return f"{prefix}{textwrap.shorten(text, 220, placeholder=' ...')}".strip()


def page(results: dict[str, tuple[str, str]]) -> str:
    """The documentation's page."""
    counts = {
        kind: sum(found[0] == kind for found in results.values())
        for kind in ("exact", "refused", "fails", "not tried")
    }
    lines = [
        "# Which architectures convert",
        "",
        "`from_causal_lm` and `to_causal_lm` were tried on every architecture that `AutoModelForCausalLM` of",
        f"transformers {transformers.__version__} knows, at a tiny size with random weights: "
        f"{counts['exact']} are exact, {counts['refused']} are refused,",
        f"{counts['fails'] or 'none'} {'fail' if counts['fails'] > 1 else 'fails'}, "
        f"{counts['not tried']} were not tried.",
        "",
        "```bash",
        "python benchmarks/architectures.py --output docs/architectures.md",
        "```",
        "",
        '"exact" is 1e-4 nats a token, 1e-3 in log-probabilities and 1e-4 in logits on the way back. "refused" is a',
        '`ValueError` before any model is returned. "not tried" are those of which the script makes no tiny model.',
        '"tied tables": input and output embeddings are one matrix.',
        "",
        "| architecture | result | reason |",
        "|---|---|---|",
        *(f"| `{name}` | {kind} | {why} |" for name, (kind, why) in results.items()),
    ]
    return "\n".join(lines) + "\n"


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--output", type=Path, help="the page to write")
    parser.add_argument("--only", nargs="+", help="some of the architectures")
    arguments = parser.parse_args()

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    results = {}
    for model_type in arguments.only or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        with (
            open(os.devnull, "w", encoding="utf-8") as nowhere,
            contextlib.redirect_stderr(nowhere),
        ):
            results[model_type] = result(model_type)

        print(model_type, *results[model_type], sep=": ", flush=True)

    if arguments.output:
        arguments.output.write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    main()
