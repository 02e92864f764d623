"""TarFlowLM for the language model evaluation harness (`pip install lm-eval`).

It is found by its own runner:

    python -m tarflow_hf.lm_eval_model --model tarflowlm --model_args pretrained=runs/demo/model --tasks wikitext

or, in Python, after `import tarflow_hf.lm_eval_model`, by
`lm_eval.simple_evaluate(model="tarflowlm", ...)`.

Its numbers:

- `loglikelihood_rolling` (perplexity, bits per byte): a lower bound on the log-likelihood, so
  perplexities are upper bounds. A text longer than the model takes is cut into sequences, over
  whose cuts nothing reaches; no window slides.
- `loglikelihood` (multiple choice, log-probabilities of answers) of a conditional model: a lower
  bound on log p(answer | question), the one it was trained for. For any other model it is a
  DIFFERENCE OF TWO BOUNDS, bound(question, answer) - bound(question), which may lie on either side
  of the truth. The results' `config` says which of the two it was.
- `generate_until`: what `generate` continues, with all it says of exactness. The noise of an
  answer follows from the seed and the prompt, not from the other requests.

A tokenizer that loses something of a text, as that of text8, is scored on what is left of it. The
number of characters that it drops is said once; a text of which nothing is left is an error. The
harness's bits per byte divide by the bytes of the original text.
"""

import zlib
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
except ImportError as error:
    raise ImportError(
        f"The evaluation harness is missing or too old: `pip install -U lm-eval` ({error})."
    ) from None

from .data import CharacterCount, checked_ids, token_ids
from .evaluation import cut_text, elbo_samples, latent_noise, log_mean_exp
from .loading import check_checkpoint
from .modeling.coupling_torch import chunks
from .modeling.generation_options import is_neutral
from .modeling.modeling_tarflowlm import TarFlowLMModel

logger = logging.get_logger(__name__)

GENERATE_UNTIL = {"do_sample", "temperature", "top_k", "top_p"}  # options of its sampling
BOUND = "a lower bound on log p(continuation | context)"
DIFFERENCE = "a difference of two bounds, of context with continuation and of context, which is itself no bound"


class Asked(NamedTuple):
    """The parts of a request of `generate_until`."""

    prompt: list[int]
    num_new: int
    stops: list[str]
    options: dict[str, Any]


@register_model("tarflowlm")
class TarFlowLMEvaluator(LM):
    """A TarFlowLM in the harness.

    Args:
        pretrained: A folder, or a repository of the Hub; or a model, with its `tokenizer`.
        tokenizer: The tokenizer, if it is not in the same place.
        batch_size: Sequences at once; "auto" is 16.
        device: By default "cuda", if there is one.
        num_samples: The number of samples of the importance-weighted bound.
        seed: The seed of the latents. They follow from it and the text (for `loglikelihood`: the
            context, so that the choices of a question share them), not from the other requests.
        check_greedy: If True, `loglikelihood` also finds out if the model would write the
            continuation with its noise at 0, as lambada asks. It takes a generation for each
            request. If False, the answer is always no.
        max_gen_toks: The number of new tokens of `generate_until`, if a task names none.
        dtype, revision, trust_remote_code: Options of `from_pretrained`.

    Raises:
        ValueError: The checkpoint is another kind of model, which the harness evaluates by `--model
            hf`.
    """

    def __init__(
        self,
        pretrained: str | TarFlowLMModel,
        tokenizer: Any = None,
        batch_size: int | str | None = 16,
        max_batch_size: int | None = None,
        device: str | None = None,
        num_samples: int = 16,
        seed: int = 0,
        check_greedy: bool = True,
        max_gen_toks: int = 256,
        dtype: str = "auto",
        revision: str = "main",
        trust_remote_code: bool = False,
    ):
        super().__init__()
        options = {"revision": revision, "trust_remote_code": trust_remote_code}
        model = pretrained

        if isinstance(pretrained, str):
            check_checkpoint(pretrained, needs_tokenizer=tokenizer is None)
            tokenizer = AutoTokenizer.from_pretrained(
                pretrained if tokenizer is None else tokenizer, **options
            )
            model = AutoModelForCausalLM.from_pretrained(pretrained, dtype=dtype, **options)

        if not isinstance(model, TarFlowLMModel):
            raise ValueError(
                f"{pretrained} is no TarFlowLM but {type(model).__name__}: evaluate it by --model hf."
            )
        if tokenizer is None:
            raise ValueError("A model that is given as such needs its tokenizer, too.")
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, not {num_samples}.")

        # The harness's default is "cuda", also where there is none.
        if device is None or (device.startswith("cuda") and not torch.cuda.is_available()):
            device = "cuda" if torch.cuda.is_available() else "cpu"

        self.model = model.to(device).eval()
        self.tokenizer = tokenizer
        self._device = torch.device(device)

        if batch_size is None or str(batch_size).startswith("auto"):
            batch_size = 16

        self.batch_size = int(batch_size)
        self.num_samples = num_samples
        self.seed = seed
        self.check_greedy = check_greedy
        self.max_gen_toks = max_gen_toks

        self.characters = CharacterCount(tokenizer)
        self.is_said = False

        self.is_conditional = model.config.conditional
        self.patch_size = model.config.patch_size
        self.max_length = model.config.max_position_embeddings

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path

    def get_model_info(self) -> dict[str, Any]:
        """Returns a description of the model, and of its numbers, for the results' `config`."""
        return {
            "model_num_parameters": self.model.num_parameters(),
            "num_samples": self.num_samples,
            "loglikelihood_rolling": "a lower bound on log p(text)",
            "loglikelihood": BOUND if self.is_conditional else DIFFERENCE,
        }

    def encode(self, text: str) -> list[int]:
        return token_ids(self.tokenizer, text)

    def _look_at(self, requests: list[Instance]) -> None:
        """Says once which characters of the requests' texts the tokenizer drops.

        Raises:
            ValueError: If nothing is left of a context, of an answer, or of a text to score. The
                message names the document.
        """
        for request in requests:
            texts = [text for text in request.args[:2] if isinstance(text, str)]
            for name, text in zip(("text", "answer"), texts, strict=False):
                if text.strip():
                    checked_ids(self.tokenizer, text, f"document {request.doc_id}'s {name}")

            self.characters.add("".join(texts))

        if note := self.characters.note("the requests so far"):
            if not self.is_said:
                logger.warning(note)
            self.is_said = True

    # -------------------------------------------------------------------------------------- scoring

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Returns bounds on log p(text), in nats; 0 for an empty text."""
        self._look_at(requests)
        pieces = []
        for index, request in enumerate(requests):
            tokens = torch.tensor(self.encode(request.args[0]), dtype=torch.long)
            cuts = cut_text(tokens, self.max_length, self.patch_size)
            pieces += [(index, cut["input_ids"]) for cut in cuts]

        totals = [0.0] * len(requests)
        bounds = self._bounds([(ids, 0) for _, ids in pieces], disable_tqdm)
        for (index, _), bound in zip(pieces, bounds, strict=True):
            totals[index] += bound

        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)

        return totals

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Returns log p(continuation | context), in nats, and "is greedy", for each request.

        The log-probability is a bound for a conditional model, and a difference of bounds for any
        other. "Is greedy" means that the model writes the continuation with its noise at 0 (see
        `check_greedy`).
        """
        if not self.is_conditional:
            logger.warning_once(f"loglikelihood is {DIFFERENCE}: this model is not conditional.")

        self._look_at(requests)
        pairs = [self._encode_pair(*request.args) for request in requests]
        contexts = [torch.tensor(context, dtype=torch.long) for context, _ in pairs]
        continuations = [torch.tensor(continuation) for _, continuation in pairs]

        # The choices of a question share the latents' noise.
        seeds = [self._seed(context) for context in contexts]
        scores = self._bounds(self._joined(contexts, continuations), disable_tqdm, seeds)
        if not self.is_conditional:
            scores = self._minus_contexts(scores, contexts, disable_tqdm)

        greedy = self._is_greedy(pairs, disable_tqdm) if self.check_greedy else [False] * len(pairs)
        results = list(zip(scores, greedy, strict=True))
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, result)

        return results

    def _joined(
        self, contexts: Sequence[Tensor], continuations: Sequence[Tensor]
    ) -> list[tuple[Tensor, int]]:
        """Returns each context with its continuation, and how many of the tokens are given.

        The last token is repeated until patches are whole: see `cut_text`.
        """
        joined = []
        for context, continuation in zip(contexts, continuations, strict=True):
            padding = continuation[-1:].expand(-len(continuation) % self.patch_size)
            ids = torch.cat([context, continuation, padding])
            joined.append((ids, len(context) if self.is_conditional else 0))

        return joined

    def _minus_contexts(
        self, scores: Sequence[float], contexts: Sequence[Tensor], disable_tqdm: bool
    ) -> list[float]:
        """Returns the scores less the bounds of their contexts, each of which is scored once."""
        known = {tuple(context.tolist()): (context, 0) for context in contexts}
        bounds = self._bounds(list(known.values()), disable_tqdm)
        bound_of = dict(zip(known, bounds, strict=True))

        return [
            score - bound_of[tuple(context.tolist())]
            for score, context in zip(scores, contexts, strict=True)
        ]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Returns the tokens of context and continuation.

        The context's first ones are left out if both are too long, or if it has no whole patches.

        Raises:
            ValueError: There is no continuation, or it alone is too long.
        """
        num_spaces = len(context) - len(context.rstrip())  # they belong to the word that follows
        if num_spaces:
            context, continuation = context[:-num_spaces], context[-num_spaces:] + continuation

        whole = self.encode(context + continuation)
        num_context = len(self.encode(context))
        before, after = whole[:num_context], whole[num_context:]

        length = len(after) + -len(after) % self.patch_size
        if not after or length > self.max_length:
            raise ValueError(
                f"A continuation must have 1 to {self.max_length} tokens (max_position_embeddings), not {len(after)}: "
                f"{continuation[:80]!r}."
            )

        patch = self.patch_size
        room = min(len(before), self.max_length - length) // patch * patch
        if room < len(before) // patch * patch:
            logger.warning_once(
                f"The model takes {self.max_length} tokens: some contexts lose their first tokens."
            )

        return before[len(before) - room :], after

    def _batches(self, indices: Sequence[int]) -> list[Sequence[int]]:
        """Returns them in lists of at most `batch_size`."""
        return [indices[part] for part in chunks(len(indices), self.batch_size)]

    @torch.no_grad()
    def _bounds(
        self,
        sequences: Sequence[tuple[Tensor, int]],
        disable_tqdm: bool,
        seeds: Sequence[int] | None = None,
    ) -> list[float]:
        """Returns importance-weighted bounds, in nats, of ids (T,) given their first ones.

        The number of those comes with the ids.
        """
        seeds = [self._seed(ids) for ids, _ in sequences] if seeds is None else seeds
        bounds = [0.0] * len(sequences)

        # Of a similar length, longest first; an empty sequence has probability one.
        order = [i for i, (ids, _) in enumerate(sequences) if len(ids)]
        order.sort(key=lambda i: -len(sequences[i][0]))

        for batch in tqdm(self._batches(order), desc="bounds", disable=disable_tqdm):
            rows = [sequences[i][0] for i in batch]
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self._device)
            position = torch.arange(ids.shape[1], device=self._device)
            lengths = torch.tensor([[len(row)] for row in rows], device=self._device)
            given = torch.tensor([[sequences[i][1]] for i in batch], device=self._device)

            # As many as the model takes, so that the first ones are the same whatever the length.
            batch_seeds = [(self.seed, seeds[i]) for i in batch]
            noise = latent_noise(self.model, self.max_length, batch_seeds, self.num_samples)
            options = {"attention_mask": (position < lengths).long()}
            if bool(given.any()):
                options["observed_mask"] = position < given

            samples = elbo_samples(self.model, ids, noise[:, :, : ids.shape[1]], **options)
            for i, bound in zip(batch, log_mean_exp(samples.cpu().double()).tolist(), strict=True):
                bounds[i] = bound

        return bounds

    def _seed(self, ids: Tensor) -> int:
        return zlib.crc32(ids.numpy().tobytes())

    # ----------------------------------------------------------------------------------- generation

    def _is_greedy(
        self, pairs: Sequence[tuple[list[int], list[int]]], disable_tqdm: bool
    ) -> list[bool]:
        """True for each continuation that `generate` writes with the noise at 0."""
        num_new = [len(after) + -len(after) % self.patch_size for _, after in pairs]
        prompts = [before for before, _ in pairs]
        outputs = self._generate(prompts, num_new, {"do_sample": False}, disable_tqdm)

        return [
            output[: len(after)] == after for output, (_, after) in zip(outputs, pairs, strict=True)
        ]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations, cut before the first of the strings in `until`.

        Reads `until`, `max_gen_toks` (also by its other names), `do_sample`, `temperature`, `top_k`
        and `top_p` from the task's `generation_kwargs`, as the harness does: a temperature above 0
        samples, unless `do_sample` is False; otherwise the noise is 0.

        Raises:
            ValueError: If there are others that ask for something, or if `max_gen_toks` is
                negative.
        """
        self._look_at(requests)
        asked = [self._read_request(request) for request in requests]
        texts = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for index, each in enumerate(asked):
            groups.setdefault(repr(sorted(each.options.items())), []).append(index)

        for indices in groups.values():
            prompts = [asked[i].prompt for i in indices]
            num_new = [asked[i].num_new for i in indices]
            options = asked[indices[0]].options | self._ends
            outputs = self._generate(prompts, num_new, options, disable_tqdm)
            for i, output in zip(indices, outputs, strict=True):
                text = self.tokenizer.decode(
                    output, skip_special_tokens=True, clean_up_tokenization_spaces=False
                )
                beginnings = [text.split(stop)[0] for stop in asked[i].stops if stop]
                texts[i] = min(beginnings, key=len, default=text)
                self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])

        return texts

    @property
    def _ends(self) -> dict[str, Any]:
        """The saved end-of-sequence tokens, which end answers."""
        return {"eos_token_id": self.model.generation_config.eos_token_id}

    def _read_request(self, request: Instance) -> Asked:
        """Returns what a request of `generate_until` asks for, which documents the errors."""
        context, given = request.args
        options = dict(normalize_gen_kwargs(given, self.max_gen_toks))
        stops = options.pop("until")
        num_new = options.pop("max_gen_toks")
        if num_new < 0:
            raise ValueError(f"max_gen_toks must be at least 0, not {num_new}.")

        prompt, num_new = self._share_positions(self.encode(context), num_new)
        unknown = [
            name
            for name, value in options.items()
            if name not in GENERATE_UNTIL and not is_neutral(name, value)
        ]
        if unknown:
            raise ValueError(
                f"generate_until has no options {sorted(unknown)}; its options are {sorted(GENERATE_UNTIL)}, until and "
                "max_gen_toks."
            )

        # A temperature of 0 is the noise at 0, which generate asks for in another way.
        if not options["do_sample"] or options.get("temperature") == 0:
            return Asked(prompt, num_new, stops, {"do_sample": False})

        options = {name: value for name, value in options.items() if name in GENERATE_UNTIL}
        return Asked(prompt, num_new, stops, options)

    def _share_positions(self, tokens: list[int], num_new: int) -> tuple[list[int], int]:
        """Returns the prompt and the number of new tokens, which fit the model together.

        If they do not fit, the prompt keeps at least half of the positions, and loses its first
        tokens only if it needs more than the new tokens leave.
        """
        patch = self.patch_size
        half = max(self.max_length // 2 // patch, 1) * patch
        kept = len(tokens) // patch * patch
        least = patch if num_new > 0 else 0
        length = max(min(num_new, self.max_length - min(kept, half)) // patch * patch, least)
        kept = min(kept, self.max_length - length)

        if kept < len(tokens) // patch * patch or length < num_new // patch * patch:
            logger.warning_once(
                f"The model takes {self.max_length} tokens: some prompts lose their first tokens, or some answers get "
                "fewer new ones than the task's max_gen_toks. A prompt keeps at least half of the positions."
            )

        return tokens[len(tokens) - kept :], length

    def _generate(
        self,
        prompts: Sequence[list[int]],
        num_new: Sequence[int],
        options: dict[str, Any],
        disable_tqdm: bool,
    ) -> list[list[int]]:
        """Returns the new tokens behind each prompt.

        The prompts of a batch have one length, and are continued by equally many tokens.
        """
        outputs: list[list[int]] = [[]] * len(prompts)
        groups: dict[tuple[int, int], list[int]] = {}
        for i, (prompt, length) in enumerate(zip(prompts, num_new, strict=True)):
            if length > 0:
                groups.setdefault((len(prompt), length), []).append(i)

        seeds = self._seeds_of(prompts)
        options = dict(options)
        scale = options.pop("temperature", 1.0) if options.pop("do_sample") else 0.0
        with tqdm(total=len(prompts), desc="generating", disable=disable_tqdm) as bar:
            for (size, length), group in groups.items():
                for batch in self._batches(group):
                    ids = torch.tensor([prompts[i] for i in batch], device=self._device)
                    noise = latent_noise(self.model, size + length, [seeds[i] for i in batch])[0]
                    tokens = self.model.generate(
                        ids if size else None, noise=scale * noise, **options
                    )[:, size:]
                    for i, row in zip(batch, tokens.tolist(), strict=True):
                        outputs[i] = row

                    bar.update(len(batch))

        return outputs

    def _seeds_of(self, prompts: Sequence[list[int]]) -> list[tuple[int, int, int]]:
        """Returns a seed for each prompt's noise, by its tokens.

        Prompts that occur again, as in a task that repeats, are told apart by their count.
        """
        counts: Counter[tuple[int, ...]] = Counter()
        seeds = []
        for prompt in prompts:
            tokens = tuple(prompt)
            words = torch.tensor(prompt, dtype=torch.long)
            seeds.append((self.seed, self._seed(words), counts[tokens]))
            counts[tokens] += 1

        return seeds


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
