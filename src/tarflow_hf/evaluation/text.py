"""The whole evaluation of a model on text, as `examples/evaluate.py` writes it."""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from ..baseline import longest_sequence
from ..data import PackedTokens
from ..modeling.modeling_tarflowlm import TarFlowLMModel
from .codebook import codebook_state, reconstruction
from .likelihood import ONE_SAMPLE, Likelihood, cut_text, likelihoods
from .provenance import Provenance


@dataclass(frozen=True, kw_only=True)
class Evaluation(Provenance):
    """What `examples/evaluate.py --output` writes: the fields of `Provenance`, then these. All are
    flat, none is left out; what does not apply is null.

    Attributes:
        num_tokens, num_sequences: That were scored.
        sequence_length: The longest sequence, in tokens.
        characters_per_token: Of the whole text, by which bits per token are divided.
        tokens_per_word: Of the whole text; a word is what stands between spaces.
        seed: Of the latents.
        num_flows: The stack was cut after these; null: all. Null of a discrete model.
        num_samples: S of the importance-weighted bound. Null of a discrete model, whose figures are
            exact.
        is_upper_bound: True of a TarFlowLM: what follows, up to `perplexity_per_word`, is at least
            the true figure.
        nats_per_token, standard_error: By the importance-weighted bound, or exact; with the
            standard error over the sequences, which is also that of the two below if multiplied as
            they are.
        bits_per_token, bits_per_character, perplexity, perplexity_per_word: The same, otherwise
            expressed.
        elbo_nats_per_token, elbo_standard_error, elbo_bits_per_character, elbo_perplexity: By minus
            the ELBO. Null of a discrete model, as all below.
        reconstruction_accuracy, reconstruction_standard_error: See `Reconstruction`.
        num_text_tokens, num_used_tokens: The same.
        codebook_entries, codebook_latent_size: K and d.
        codebook_scale_min, codebook_scale_mean, codebook_scale_max: Of the standard deviations.
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
    text: PackedTokens,
    provenance: dict,
    num_samples: int = 16,
    batch_size: int = 16,
    max_sequences: int | None = None,
    num_flows: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> tuple[Evaluation, dict[str, Likelihood]]:
    """Everything that `Evaluation` says of a model and all tokens of a text, and the likelihoods in
    it.

    Args:
        model: A TarFlowLM or a discrete causal model with a `bos_token_id`.
        text: Whose tokens are scored in sequences as long as the model takes, whatever
            `text.sequence_length` is.
        provenance: The fields of `Provenance`, by `provenance_of`.

    Raises:
        ValueError: `num_flows` is given for a discrete model.
    """
    is_flow = isinstance(model, TarFlowLMModel)
    if num_flows is not None and not is_flow:
        raise ValueError("num_flows can't be given: this is a discrete model.")

    length = longest_sequence(model)
    sequences = cut_text(text.tokens, length, model.config.patch_size if is_flow else 1)[
        :max_sequences
    ]
    options = {"batch_size": batch_size, "seed": seed, "progress": progress, "num_flows": num_flows}
    rows = likelihoods(model, sequences, num_samples, **options)
    best = list(rows.values())[-1]
    fields: dict[str, Any] = {
        "num_tokens": best.num_tokens,
        "num_sequences": len(sequences),
        "sequence_length": length,
        "characters_per_token": text.characters_per_token,
        "tokens_per_word": text.tokens_per_word,
        "seed": seed,
        "num_flows": num_flows,
        "num_samples": num_samples if is_flow else None,
        "is_upper_bound": is_flow,
        "nats_per_token": best.nats_per_token,
        "standard_error": best.standard_error,
        "bits_per_token": best.bits_per_token,
        "bits_per_character": best.bits_per_character(text.characters_per_token),
        "perplexity": best.perplexity,
        "perplexity_per_word": text.tokens_per_word
        and best.perplexity_per_word(text.tokens_per_word),
    }

    if is_flow:
        elbo, given_back = rows[ONE_SAMPLE], reconstruction(model, sequences, seed=seed)
        fields |= {
            "elbo_nats_per_token": elbo.nats_per_token,
            "elbo_standard_error": elbo.standard_error,
            "elbo_bits_per_character": elbo.bits_per_character(text.characters_per_token),
            "elbo_perplexity": elbo.perplexity,
            "reconstruction_accuracy": given_back.accuracy,
            "reconstruction_standard_error": given_back.standard_error,
            "num_text_tokens": given_back.num_text_tokens,
            "num_used_tokens": given_back.num_used_tokens,
        }
        state = vars(codebook_state(model.codebook()))
        fields["codebook_entries"] = state.pop("num_entries")
        fields |= {f"codebook_{name}": value for name, value in state.items()}

    return Evaluation(**provenance, **fields), rows
