"""Sources of drafts: the text itself, or a smaller model that is given the same noise.

Shapes: B batch, n tokens of the texts, d latent size of a token, V tokens in the vocabulary.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from .codebook import Gaussians
from .coupling import mixture_rosenblatt_inverse
from .coupling_head import LogitsProcessor
from .decoder_tarflowlm import CACHE_ARGUMENT, InputCache
from .inversion_tarflowlm import evaluating, make_cache

# The sureness of a lookup's tokens is the number of tokens found, at most this; then an assistant's.
MAX_MATCHING = 8
ASSISTED = MAX_MATCHING + 1

# Texts by their row in the batch.
Texts = Mapping[int, list[int]]


class DraftSource(Protocol):
    """Guesses what follows in each text of a batch."""

    max_tokens: int  # at most so many for each text
    cost: float  # of a draft token, in steps of the model
    sureness: int | None  # from 0 on, if it does not depend on the texts

    def begin(self, u: Tensor, codebook: Gaussians) -> None:
        """Takes the first flow's noise (B, n, d), as it passes the tokens, before anything else."""

    def propose(self, texts: Texts, num_tokens: int) -> tuple[dict[int, list[int]], int]:
        """Up to `num_tokens` tokens that may follow each text, and how sure they are."""


class PromptLookup:
    """Copies what followed the last tokens where they stood before, by the library's generator.

    Args:
        num_tokens: Copies at most so many.
        max_matching_ngram_size: The number of last tokens that are looked for first; then fewer.
            The more tokens agree, the surer is what follows: the default is not the library's, 2.

    Example:
        >>> PromptLookup(3, 2).propose({0: [5, 6, 7, 8, 9, 5, 6]}, 3)
        ({0: [7, 8, 9]}, 2)
    """

    cost = 0.0
    sureness: int | None = None

    def __init__(self, num_tokens: int, max_matching_ngram_size: int = MAX_MATCHING):
        self.max_tokens = num_tokens
        self.generator = PromptLookupCandidateGenerator(
            num_output_tokens=num_tokens,
            max_matching_ngram_size=max_matching_ngram_size,
            max_length=2**31,
        )

    def begin(self, u: Tensor, codebook: Gaussians) -> None:
        """Nothing: it reads no noise."""

    def propose(self, texts: Texts, num_tokens: int) -> tuple[dict[int, list[int]], int]:
        """The tokens, and how many of the last ones were found before them, at most 8."""
        found = {}
        sizes = []
        for row, text in texts.items():
            if len(text) < 2:
                return {key: [] for key in texts}, 0

            candidates, _ = self.generator.get_candidates(torch.tensor([text]))
            found[row] = candidates[0, len(text) :].tolist()[:num_tokens]
            sizes.append(_num_matching(text, found[row]))

        return found, min(sizes)


def _num_matching(text: list[int], draft: list[int]) -> int:
    """The number of last tokens of a text behind which the draft stands elsewhere in it."""
    best = 0
    size = len(draft)
    for start in range(1, len(text) - size + 1):
        if size and text[start] == draft[0] and text[start : start + size] == draft:
            limit = min(MAX_MATCHING, start)
            num = 0
            while num < limit and text[start - 1 - num] == text[-1 - num]:
                num += 1

            best = max(best, num)

    return best


class Assistant:
    """The tokens that a smaller model says, given the same noise.

    Both models' tokens are functions of the noise. If their mixture weights are similar, they pick
    the same tokens, at any temperature. (Independent samples of two models agree with probability
    sum_k p_k q_k only, even if p = q.) The assistant gives the weights; noise, codebook and coupling
    are the model's own. So any model with logits of the next token will do.

    Args:
        assistant: A causal language model of the library.
        num_tokens: It says at most so many at a time.
        cost: The time of a token of the assistant, in steps of the model.
        start_token_id: Stands before each text, if given.
        warpers: Processes logits (n, V) as those of the model are.
        is_coupled: False to take the most likely tokens, where the model's first flow is no mixture
            over the codebook.
    """

    sureness: int | None = ASSISTED

    def __init__(
        self,
        assistant: PreTrainedModel,
        num_tokens: int,
        cost: float,
        start_token_id: int | None = None,
        warpers: LogitsProcessor | None = None,
        is_coupled: bool = True,
    ):
        self.assistant, self.max_tokens, self.cost = assistant, num_tokens, cost
        self.warpers, self.is_coupled = warpers, is_coupled
        self.start = [] if start_token_id is None else [start_token_id]
        self.caches: dict[int, tuple[Any, list[int]]] = {}  # with the tokens that are in

    def begin(self, u: Tensor, codebook: Gaussians) -> None:
        self.noise, self.codebook = u, codebook

    @torch.no_grad()
    def propose(self, texts: Texts, num_tokens: int) -> tuple[dict[int, list[int]], int]:
        """The tokens, one after another, each behind those before it."""
        found = {row: list(text) for row, text in texts.items()}
        with evaluating(self.assistant):
            for row, text in found.items():
                for place in range(len(text), min(len(text) + num_tokens, self.noise.shape[1])):
                    if not self.start and not text:
                        break

                    text.append(self._token(self._logits(row, text), self.noise[row, place]))

        return {row: text[len(texts[row]) :] for row, text in found.items()}, ASSISTED

    def _token(self, logits: Tensor, u: Tensor) -> int:
        """The token that the noise (d,) picks by the logits (1, V)."""
        logits = logits.to(u.device, torch.promote_types(logits.dtype, u.dtype))
        if not self.is_coupled:
            return int(logits.argmax())
        if self.warpers is not None:
            logits = self.warpers(logits)

        z = mixture_rosenblatt_inverse(u.to(logits.dtype)[None], logits, *self.codebook)
        return int(self.codebook.most_likely_token(z.to(u.dtype)))

    def _logits(self, row: int, text: list[int]) -> Tensor:
        """The assistant's logits (1, V) of what follows a text."""
        text = self.start + text
        cache, seen = self.caches.get(row, (self._make_cache(), []))
        num_same = 0
        while num_same < min(len(seen), len(text) - 1) and seen[num_same] == text[num_same]:
            num_same += 1

        if num_same < len(seen):
            cache.crop(num_same - len(seen))

        self.caches[row] = cache, text
        return self._run(text, num_same, cache)

    def _make_cache(self) -> Cache | InputCache:
        return DynamicCache()  # without the configuration it can be cropped

    def _run(self, text: list[int], num_cached: int, cache: Cache | InputCache) -> Tensor:
        ids = torch.tensor([text[num_cached:]], device=self.assistant.device)
        options = {CACHE_ARGUMENT: cache, "use_cache": True, "logits_to_keep": 1}
        return self.assistant(input_ids=ids, **options).logits[:, -1]


class FlowAssistant(Assistant):
    """An `Assistant` that is a TarFlowLM: the mixture weights of its first flow.

    It reads tokens as their means, behind its own start vector.
    """

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.start = [-1]  # in its place

    def _make_cache(self) -> Cache | InputCache:
        return make_cache(self.assistant.flow.layers[0].decoder)

    def _run(self, text: list[int], num_cached: int, cache: Cache | InputCache) -> Tensor:
        flow = self.assistant.flow.layers[0]
        codebook = self.assistant.codebook()
        means = codebook.mean[text[1:]].unsqueeze(0)
        inputs = flow.inputs(means, codebook, None, num_cached, len(text))
        context = flow.context(inputs, None, num_cached, cache)[:, -1]
        return F.linear(context, *flow.head.projection()[0])


def make_assistant(
    assistant: PreTrainedModel,
    model: PreTrainedModel,
    num_tokens: int | None,
    warpers: LogitsProcessor | None,
) -> Assistant:
    """The assistant of a model, a TarFlowLM.

    Args:
        assistant: A causal language model of the library, or a TarFlowLM.
        model: The TarFlowLM that it works for.
        num_tokens: It says at most so many at a time; by default what its own generation config
            says, or 20, as in the library.
        warpers: See `Assistant`.

    Raises:
        ValueError: If it is no model, has another vocabulary or no logits of a next token.
    """
    if not isinstance(assistant, PreTrainedModel):
        raise ValueError(f"assistant_model must be a model of the library, not {assistant!r}.")

    names = [type(each).__name__ for each in (assistant, model)]
    sizes = [each.config.get_text_config().vocab_size for each in (assistant, model)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"assistant_model, a {names[0]}, has a vocabulary of {sizes[0]:,} tokens, the model, a {names[1]}, one of "
            f"{sizes[1]:,}: their token ids do not mean the same."
        )

    if num_tokens is None:
        own = getattr(assistant, "generation_config", None)
        num_tokens = getattr(own, "num_assistant_tokens", None) or 20

    first = model.config.flows[0]
    options: dict[str, Any] = {
        "num_tokens": num_tokens,
        "cost": assistant.num_parameters() / model.num_parameters(),
        "warpers": warpers,
        "is_coupled": first["coupling"] == "mixture_rosenblatt" and first["tie_codebook"],
    }
    if assistant.config.model_type == model.config.model_type:
        if not assistant.config.has_token_logits:
            raise ValueError(
                "assistant_model has no logits of the next token: its first flow must be mixture_rosenblatt with the "
                "encoder's codebook, left to right, with patch_size 1."
            )

        return FlowAssistant(assistant, **options)

    if assistant.get_output_embeddings() is None or assistant.config.is_encoder_decoder:
        raise ValueError(f"assistant_model, a {names[0]}, is no causal language model.")
    if assistant._is_stateful:
        raise ValueError(
            f"assistant_model, a {names[0]}, keeps a state that takes back no token: take a model with a cache."
        )

    starts = (
        model.config.start_token_id,
        assistant.config.bos_token_id,
        assistant.config.eos_token_id,
    )
    start = next((token for token in starts if isinstance(token, int)), None)
    return Assistant(assistant, start_token_id=start, **options)
