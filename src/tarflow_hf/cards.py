"""Model cards, made from a configuration, a run's options and an evaluation's JSON."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .data import PYTHON_DOCS
from .modeling.configuration_tarflowlm import TarFlowLMConfig
from .modeling.coupling_heads import COUPLING_HEADS
from .modeling.modeling_tarflowlm import TarFlowLMModel

# The figures of an evaluation's JSON that a card gives: what they are, and the field with their
# standard error.
METRICS = {
    "nats_per_token": ("nats per token, at most: importance-weighted bound", "standard_error"),
    "elbo_nats_per_token": ("nats per token, at most: ELBO", "elbo_standard_error"),
    "bits_per_character": ("bits per character, at most: importance-weighted bound", None),
    "elbo_bits_per_character": ("bits per character, at most: ELBO", None),
    "perplexity": ("perplexity per token, at most", None),
    "perplexity_per_word": ("perplexity per word, at most", None),
    "reconstruction_accuracy": (
        "share of tokens that are decoded correctly from their latents",
        "reconstruction_standard_error",
    ),
    "generative_perplexity": ("generative perplexity of samples", None),
    "mauve": ("MAUVE of samples", None),
    "entropy": ("unigram entropy of samples, nats", None),
}

# The options of a training run that a card gives, as of `examples/train.py` and its recipes.
OPTIONS = {
    "mode": "stages",
    "num_steps": "steps",
    "stage_steps": "steps of each stage",
    "batch_size": "sequences a step",
    "learning_rate": "learning rate, peak",
    "stage_learning_rates": "learning rate of each stage, peak",
    "warmup_steps": "steps of warm-up, in each stage",
    "weight_decay": "weight decay",
    "max_grad_norm": "gradient clipping",
    "ema_decay": "decay of averaged weights",
    "mixed_precision": "precision",
    "seed": "seed",
}

TEMPLATE = Path(__file__).with_name("model_card.md").read_text(encoding="utf-8")


def model_card(
    config: TarFlowLMConfig,
    training: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
    *,
    repo_id: str = "USER/NAME",
    description: str = "",
    license: str = "apache-2.0",
    language: str = "en",
) -> ModelCard:
    """A model's card. Nothing is on it that these arguments do not say.

    Args:
        training: Options of the run, by the names that `examples/train.py` and its recipes give
            them, and its `command`. `dataset` becomes metadata where it is one of the Hub.
        evaluation: An evaluation as `json.load` reads it: a flat dict with its `command`, its
            `date`, and any of METRICS, which become the table and the `model-index` (null: not
            known); `data` names the text, `versions` the libraries, `num_samples` the samples of
            the importance-weighted bound, `num_tokens` what was scored.
        repo_id: The model's name on the Hub, for the code that shows how to use it.
        description: A sentence on what this model is.
        license: The licence of the weights, by the Hub's identifiers.

    Raises:
        ValueError: If the evaluation has no command or date, no known figure, or one that is not
            finite.

    Example:
        >>> config = TarFlowLMConfig(vocab_size=27, latent_size=2, hidden_size=8, num_attention_heads=1, flows=[
        ...     {"coupling": "affine", "direction": "left_to_right", "num_hidden_layers": 1}])
        >>> evaluation = {"command": "python examples/evaluate.py ...", "date": "2026-01-01", "bits_per_character": 2.5}
        >>> card = model_card(config, evaluation=evaluation, repo_id="USER/tiny")
        >>> card.data.pipeline_tag, card.data.eval_results[0].metric_value
        ('text-generation', 2.5)
    """
    training = {} if training is None else dict(training)
    for option, of_stages in (
        ("num_steps", "stage_steps"),
        ("learning_rate", "stage_learning_rates"),
    ):
        if training.get(of_stages):
            training.pop(option, None)  # which stands for nothing then

    name = repo_id.split("/")[-1]
    results = None if evaluation is None else _eval_results(evaluation)
    dataset = training.get("dataset")
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        license=license,
        language=language,
        tags=["tarflowlm", "normalizing-flows"],
        datasets=[dataset] if dataset and _is_on_the_hub(dataset) else None,
        model_name=name if results else None,
        eval_results=results,
    )
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    content = environment.from_string(TEMPLATE).render(
        card_data=card_data,
        config=config,
        name=name,
        repo_id=repo_id,
        description=description or "A language model of flows.",
        couplings={name: head.title or name for name, head in COUPLING_HEADS.items()},
        num_parameters=_num_parameters(config),
        num_new_tokens=min(64, config.max_position_embeddings)
        // config.patch_size
        * config.patch_size,
        prompts=_prompts(config),
        training=training,
        dataset=_describe_data(training),
        tokenizer=_describe_tokenizer(training),
        options=OPTIONS,
        evaluation=evaluation,
        metrics=METRICS,
    )

    return ModelCard(content)


def _eval_results(evaluation: Mapping[str, Any]) -> list[EvalResult]:
    """The known figures of an evaluation, for the metadata."""
    for name in ("command", "date"):
        if not evaluation.get(name):
            raise ValueError(
                f"evaluation needs its {name}: a number on a card stands beside what made it."
            )

    known = {name: evaluation[name] for name in METRICS if evaluation.get(name) is not None}
    if not known:
        raise ValueError(
            f"evaluation has none of the figures that a card gives: {', '.join(METRICS)}."
        )

    for name, value in known.items():
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"evaluation's {name} must be a finite number, not {value!r}.")

    text = str(evaluation.get("data") or "held-out text")
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=text,
            dataset_name=text,
            metric_type=name,
            metric_value=value,
            metric_name=METRICS[name][0],
        )
        for name, value in known.items()
    ]


def _is_on_the_hub(dataset: str) -> bool:
    return dataset != PYTHON_DOCS and not Path(dataset).exists() and dataset.count("/") == 1


def _describe_data(training: Mapping[str, Any]) -> str:
    dataset = training.get("dataset")
    if dataset == PYTHON_DOCS:
        return "the documentation inside Python's standard library"
    if dataset and _is_on_the_hub(dataset):
        return f"[{dataset}](https://huggingface.co/datasets/{dataset})"

    return f"`{Path(dataset).name}`, a local text" if dataset else ""


def _describe_tokenizer(training: Mapping[str, Any]) -> str:
    tokenizer = training.get("tokenizer")
    return "the 27 characters of text8" if tokenizer == "text8" else f"that of `{tokenizer}`"


def _num_parameters(config: TarFlowLMConfig) -> int:
    with torch.device("meta"):
        return TarFlowLMModel(config).num_parameters()


def _prompts(config: TarFlowLMConfig) -> str:
    """Returns the sentences on how `generate` continues prompts and fills gaps."""
    if config.conditional:
        return (
            "It was made to be told some of the tokens: `generate` continues prompts and fills gaps (`infill_mask`)\n"
            "by the distribution that it was trained for."
        )

    if any(flow["direction"] == "right_to_left" for flow in config.flows):
        return (
            "`generate` continues prompts and fills gaps (`infill_mask`) by an approximation: a flow here runs right\n"
            "to left, so what is known is held fixed in the first flow only."
        )

    return (
        "`generate` continues a prompt exactly by the model's distribution, because no flow runs right to left; it\n"
        "fills gaps (`infill_mask`) by an approximation."
    )
