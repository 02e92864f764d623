"""The whole evaluation of a model on text, as `examples/evaluate.py` writes it."""

from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedModel

from ..baseline import is_discrete, longest_sequence, patch_size_of
from ..data import PackedTokens, SentenceTokens
from ..modeling.modeling_tarflowlm import TarFlowLMModel
from .codebook import codebook_state, reconstruction
from .likelihood import Likelihood, Scoring, cut_text, score
from .provenance import Provenance


@dataclass(frozen=True, kw_only=True)
class Evaluation(Provenance):
    """The result of `examples/evaluate.py --output`: the fields of `Provenance`, then these.

    All are flat and none is left out. A field that does not apply is null.

    Attributes:
        num_tokens, num_sequences: The numbers that were scored.
        sequence_length: The longest sequence, in tokens.
        characters_per_token: The mean over the whole text. Bits per token are divided by it.
        tokens_per_word: The mean over the whole text. A word is what stands between spaces.
        seed: The seed of the latents.
        num_flows: The flows after which the stack was cut. Null for all of them, and for a discrete
            model.
        num_samples: S of the importance-weighted bound. Null for a discrete model, whose figures
            are exact.
        is_upper_bound: True for a TarFlowLM: the figures that follow, up to `perplexity_per_word`,
            are at least the true ones.
        nats_per_token: The importance-weighted bound, or exact.
        standard_error: The standard error of `nats_per_token`, over the sequences. Those of `bits_per_token` and
            `bits_per_character` follow in proportion.
        bits_per_token, bits_per_character, perplexity, perplexity_per_word: The same likelihood in
            other units.
        elbo_nats_per_token, elbo_standard_error, elbo_bits_per_character, elbo_perplexity: The same
            from minus the ELBO. Null for a discrete model, as all fields below.
        reconstruction_accuracy, reconstruction_standard_error: See `Reconstruction`.
        num_text_tokens, num_used_tokens: See `Reconstruction`.
        codebook_entries, codebook_latent_size: K and d.
        codebook_scale_min, codebook_scale_mean, codebook_scale_max: The smallest, mean and
            largest standard deviation.
        codebook_nearest_distance_min, codebook_nearest_distance_median: See `nearest_distances`.
    """

    num_tokens: int
    num_sequences: int
    sequence_length: int
    characters_per_token: float
    tokens_per_word: float | None
    seed: int
    num_flows: int | None
    num_samples: int | None
    is_upper_bound: bool
    nats_per_token: float
    standard_error: float | None
    bits_per_token: float
    bits_per_character: float
    perplexity: float
    perplexity_per_word: float | None
    elbo_nats_per_token: float | None = None
    elbo_standard_error: float | None = None
    elbo_bits_per_character: float | None = None
    elbo_perplexity: float | None = None
    reconstruction_accuracy: float | None = None
    reconstruction_standard_error: float | None = None
    num_text_tokens: int | None = None
    num_used_tokens: int | None = None
    codebook_entries: int | None = None
    codebook_latent_size: int | None = None
    codebook_scale_min: float | None = None
    codebook_scale_mean: float | None = None
    codebook_scale_max: float | None = None
    codebook_nearest_distance_min: float | None = None
    codebook_nearest_distance_median: float | None = None


def evaluate_text(
    model: PreTrainedModel,
    text: PackedTokens | SentenceTokens,
    provenance: dict[str, Any],
    **options: Any,
) -> tuple[Evaluation, dict[str, Likelihood]]:
    """Evaluates a model on all tokens of a text.

    Args:
        model: A TarFlowLM, or a discrete causal model with a `bos_token_id`.
        text: Its tokens are scored in sequences as long as the model takes, whatever
            `text.sequence_length` is. Sentences are scored one by one, made for the model's patch
            size.
        provenance: The fields of `Provenance`, by `provenance_of`.
        options: The fields of `Scoring`; `num_samples` is 16 by default.

    Returns:
        The evaluation, and the likelihoods in it as the rows of a table.

    Raises:
        ValueError: If `num_flows` is given for a discrete model.
    """
    scoring = Scoring(**{"num_samples": 16, **options})
    if scoring.num_flows is not None and is_discrete(model):
        raise ValueError("num_flows can't be given: this is a discrete model.")

    length = longest_sequence(model)
    if isinstance(text, SentenceTokens):
        sequences = text.first(scoring.max_sequences)
    else:
        sequences = cut_text(text.tokens, length, patch_size_of(model))[: scoring.max_sequences]

    scores = score(model, sequences, **vars(scoring))

    fields = {
        "num_sequences": len(sequences),
        "sequence_length": length,
        "characters_per_token": text.characters_per_token,
        "tokens_per_word": text.tokens_per_word,
        "seed": scoring.seed,
        "num_flows": scoring.num_flows,
        "num_samples": None if scores.is_exact else scoring.num_samples,
        "is_upper_bound": not scores.is_exact,
        **_likelihood_fields(scores.best, text),
    }
    if not scores.is_exact:
        fields |= _elbo_fields(scores.one_sample, text)
        fields |= _codebook_fields(model, sequences, scoring.seed)

    return Evaluation(**provenance, **fields), scores.rows()


def _likelihood_fields(best: Likelihood, text: PackedTokens | SentenceTokens) -> dict[str, Any]:
    per_word = text.tokens_per_word
    return {
        "num_tokens": best.num_tokens,
        "nats_per_token": best.nats_per_token,
        "standard_error": best.standard_error,
        "bits_per_token": best.bits_per_token,
        "bits_per_character": best.bits_per_character(text.characters_per_token),
        "perplexity": best.perplexity,
        "perplexity_per_word": per_word and best.perplexity_per_word(per_word),
    }


def _elbo_fields(elbo: Likelihood, text: PackedTokens | SentenceTokens) -> dict[str, Any]:
    return {
        "elbo_nats_per_token": elbo.nats_per_token,
        "elbo_standard_error": elbo.standard_error,
        "elbo_bits_per_character": elbo.bits_per_character(text.characters_per_token),
        "elbo_perplexity": elbo.perplexity,
    }


def _codebook_fields(
    model: TarFlowLMModel, sequences: list[dict[str, Any]], seed: int
) -> dict[str, Any]:
    found = reconstruction(model, sequences, seed=seed)
    state = asdict(codebook_state(model.codebook()))

    return {
        "reconstruction_accuracy": found.accuracy,
        "reconstruction_standard_error": found.standard_error,
        "num_text_tokens": found.num_text_tokens,
        "num_used_tokens": found.num_used_tokens,
        "codebook_entries": state.pop("num_entries"),
        **{f"codebook_{name}": value for name, value in state.items()},
    }
