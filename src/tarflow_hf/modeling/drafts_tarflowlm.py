"""Drafts: tokens that are guessed ahead, and verified in one pass of the flow next to the data.

In a flow the state at a position is a function of its noise and of the states before it. So a
guess of what comes next is right if and only if the inverse, run behind that guess, gives it again:

    h_n = inverse(u_n; context(h_0, ..., h_(n-1)))

The guess of a state is the mean of its token's Gaussian. The decoder reads a state as the average
of embeddings under p(token | state). If the codebook does not overlap, this average is the
token's own embedding to within rounding, at its mean as at any state of that token. So one pass
over a run of guesses gives the very states that position after position would give, as long as
tokens agree. The decoder's inputs themselves are compared: a guess counts if the state found in
its place is read as the guess was, to within rounding. With a codebook that overlaps this
may fail. Then the states found are the guess of the next pass, as in the parallel form of
`inversion_tarflowlm.py`, and count once that pass gives the decoder the same inputs.

Nothing is drawn and nothing rejected: drafts change no token, at any temperature and behind any
processor of logits.

Shapes: B batch, N positions of P tokens and size D = P d, m guessed positions, V tokens in the
vocabulary.

References:
    Leviathan, Kalman & Matias, *Fast Inference from Transformers via Speculative Decoding*, ICML
    2023, arXiv:2211.17192, whose rejection sampling this has no need of.
    Saxena, *Prompt Lookup Decoding*, 2023, github.com/apoorvumang/prompt-lookup-decoding.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel

from .codebook import Gaussians
from .decoder_tarflowlm import InputCache
from .draft_sources import ASSISTED, MAX_MATCHING, DraftSource, PromptLookup, make_assistant
from .generation_options import GenerationOptions
from .generation_writing import TokenWriter
from .inverse_options import FlowInverse, InverseReport
from .inversion_tarflowlm import (
    LayerWithRoom,
    make_cache,
    num_known_to_all,
)
from .slots_tarflowlm import Known, Observed, take

# A guess counts if the decoder's input differs by at most so many units of the input's rounding,
# relative to the largest number of the slot.
MAX_ROUNDINGS = 2


# --------------------------------------------------------------------------------------------------
# How many of them are worth a pass
# --------------------------------------------------------------------------------------------------


class DraftLength:
    """Chooses how many guesses a pass takes along, so that drafts never cost much.

    Times are in steps, passes over one position. A pass over m + 1 positions takes `steps_of_pass(m)` of
    them, a rough model. With the probabilities p_1, p_2, ... that a guess is right when those before
    it are, it completes 1 + p_1 + p_1 p_2 + ... positions; m maximises their number per time. Each
    p is counted separately for each sureness, and old counts fade. A lookup is surer of a token the
    more tokens before it were found. Its guesses are counted even if no pass verifies them.

    Losses come out of an allowance: 2% of a step for each position, and what earlier drafts gained.
    A pass whose guesses may all be wrong is taken only if that pays for it. So by this model text
    that drafts do not help takes at most 2% longer, and 1.25 steps. A draft that the allowance had
    no room for and that turns out to have been worth its pass makes room for one like it.

    Args:
        batch_size: Number of sequences that go in step.
        device: The kind of device that runs the model.
        cost: The time of a draft token, in steps.
    """

    ALLOWANCE = 0.02
    FIRST_BALANCE, MAX_BALANCE = 1.25, 4.0
    FADING = 0.95
    # Guesses of sureness k: k last tokens were found before, and an assistant's.
    PRIOR = (0.1, 0.15, 0.3, 0.45, 0.6, 0.7, 0.8, 0.85, 0.9, 0.7)
    PRIOR_COUNT = 4.0
    # A pass over one row takes 1, the second row 0.53, each further one 0.075, as SmolLM2's about do.
    TIMES = {"cpu": (0.45, 0.075)}

    def __init__(self, batch_size: int, device: str, cost: float = 0.0):
        self.batch_size, self.cost = batch_size, cost
        self.first_row, self.next_row = self.TIMES.get(device, (0.0, 0.002))
        self.balance = self.FIRST_BALANCE
        self.counts = [[p * self.PRIOR_COUNT, self.PRIOR_COUNT] for p in self.PRIOR]
        self.wanted = 0  # at the last choice, whatever the allowance

    def steps_of_pass(self, num_drafts: int) -> float:
        """The time of a pass over `num_drafts` guesses and one position more, in steps."""
        rows = self.batch_size * (num_drafts + 1)
        time, step = (
            1 + self.first_row * (x > 1) + self.next_row * (x - 1) for x in (rows, self.batch_size)
        )
        return time / step + self.cost * num_drafts

    def choose(self, num_available: int, sureness: int) -> int:
        """The number of guesses to take along, at most `num_available`."""
        best, most = 0, 1.0
        total, power = 1.0, 1.0
        for m in range(1, num_available + 1):
            right, tried = self._counts(sureness, m - 1)
            power *= right / tried
            total += power
            if total / self.steps_of_pass(m) > most:
                best = m
                most = total / self.steps_of_pass(m)

        self.wanted = best
        has_room = self.balance >= self.MAX_BALANCE / 2
        if not best and num_available and has_room and sureness == ASSISTED:
            best = min(num_available, 4)  # times change: a try now and then

        while best and self.steps_of_pass(best) - 1 > self.balance:
            best -= 1

        return best

    def observe(
        self, num_drafts: int, num_right: int, sureness: int, would_be_right: bool | None = None
    ) -> None:
        """Learns from a pass: of its guesses the first `num_right` were right.

        Args:
            num_drafts: The number of guesses.
            num_right: The number of those before the first wrong one.
            sureness: The sureness of the first guess.
            would_be_right: For a pass without a guess, True if the first one would have been right,
                None if there was none.
        """
        gain = num_right + 1 - self.steps_of_pass(num_drafts) if num_drafts else 0.0
        self.balance += self.ALLOWANCE * (num_right + 1) + gain
        self.balance = min(self.balance, self.MAX_BALANCE)

        outcomes = [True] * num_right + [False] * (num_right < num_drafts)
        if not num_drafts and would_be_right is not None:
            outcomes = [would_be_right]

        for place, is_right in enumerate(outcomes):
            counts = self._counts(sureness, place)
            counts[:] = self.FADING * counts[0] + is_right, self.FADING * counts[1] + 1

    def regret(self, num_drafts: int, num_right: int) -> None:
        """Makes room for as many guesses again, if they would have been worth their pass."""
        if num_right + 1 > self.steps_of_pass(num_drafts):
            self.balance = max(self.balance, self.steps_of_pass(num_drafts) - 1)

    def _counts(self, sureness: int, place: int) -> list[float]:
        """The right guesses and all guesses, of those at some place behind the first."""
        return self.counts[
            sureness if sureness == ASSISTED else min(sureness + place, MAX_MATCHING)
        ]


# --------------------------------------------------------------------------------------------------
# The inverse of a flow, with drafts
# --------------------------------------------------------------------------------------------------


class _Guess(NamedTuple):
    """Guessed positions of every sequence."""

    tokens: Tensor  # (B, m, P)
    states: Tensor  # (B, m, D), in the flow's own order of channels

    def at(self, positions: slice) -> "_Guess":
        return _Guess(self.tokens[:, positions], self.states[:, positions])

    @property
    def size(self) -> int:
        return self.tokens.shape[1]


class _Proposal(NamedTuple):
    """Tokens that may be written, whether or not a pass takes them along."""

    tokens: dict[int, list[int]]  # of each text, by its row
    first: int  # the place of the first of them, as the flow passes the tokens
    size: int  # so many positions of them


class Drafts:
    """Inverts the first flow as `invert_sequentially` does, verifying guesses on the way.

    Args:
        source: The source of the guesses.
        writer: The tokens so far. It takes each position as it becomes final.
        length: Chooses how many guesses a pass takes along.
        patch_size: The number of tokens of a position.
    """

    def __init__(
        self, source: DraftSource, writer: TokenWriter, length: DraftLength, patch_size: int
    ):
        self.source, self.writer, self.length = source, writer, length
        self.patch_size = patch_size
        self.is_new = take(writer.is_new, writer.order)  # (B, n), as the flow passes the tokens
        self.sureness = 0  # of the last guess
        self.proposal: _Proposal | None = None  # in the last pass
        self.missed: _Proposal | None = None  # what there was no room for, until it is decided

    def invert(
        self,
        flow: nn.Module,
        u: Tensor,
        codebook: Gaussians,
        observed: Observed | None,
        known: Known | None,
        options: FlowInverse,
    ) -> tuple[Tensor, InverseReport]:
        """The `invert` of `inversion_tarflowlm.py`, without gradients.

        The report's residual is the largest difference between the decoder's input of a guess that
        counted and that of the state found in its place, relative to the slot's largest number.
        """
        if known is None:
            known = Known(torch.zeros_like(u), u.new_zeros(u.shape[:2], dtype=torch.bool))

        num_positions = u.shape[1]
        num_known = num_known_to_all(known)
        h = known.states.clone()
        cache = _croppable_cache(flow, num_positions)
        reader = _Reader(flow, codebook)
        self.source.begin(reader.latents(u).flatten(1, 2), codebook)
        carried = reader.guess(torch.zeros(len(u), 0, reader.patch_size, dtype=torch.long))
        num_final = [num_known] if num_known else []
        residual = 0.0
        first = num_known  # the first position that is not final
        num_cached = 0  # slots

        while first < num_positions:
            is_waited_for = self._is_waited_for()
            guess = self._extend(carried, reader, is_waited_for, num_positions - first - 1)
            self.writer.drafted = guess.tokens.flatten(1)
            self.writer.put_draft(self.writer.drafted)
            last = first + guess.size + 1
            h[:, first : last - 1] = known.hold(guess.states, first)

            inputs = flow.inputs(h, codebook, observed, num_cached, last)
            context = flow.context(inputs, observed, num_cached, cache)[:, first - last :]
            new = flow.invert_position(u[:, first:last], context, codebook, options)
            h[:, first:last] = known.hold(new, first)

            num_right = 0
            if guess.size:
                renewed = flow.inputs(h, codebook, observed, first + 1, last)
                read = inputs[:, -guess.size :]
                num_right, difference = _num_right(read, renewed, is_waited_for)
                residual = max(residual, difference)

            end, is_stopped = self._write(h, first, guess, num_right, is_waited_for, options)
            num_final.append(end - first)
            self._learn(guess.size, num_right)
            if is_stopped:
                h[:, end:] = 0
                break

            carried = guess.at(slice(0))
            if num_right < guess.size and end == first + num_right + 1:
                carried = reader.carried(h[:, first:last], guess, num_right, is_waited_for)
            if end < last:
                cache.crop(end - last)

            first = num_cached = end

        num_passes = len(num_final) - (num_known > 0)
        return h, InverseReport("drafts", num_passes, residual, num_final)

    def _is_waited_for(self) -> Tensor:
        """True for the texts (B,) that have not ended; what the others would go on with is free."""
        writer = self.writer
        is_open = self.is_new[:, writer.num_passed :].any(-1)
        return is_open if writer.ends is None else is_open & ~writer.ends.has_ended

    def _extend(
        self, carried: _Guess, reader: "_Reader", is_waited_for: Tensor, num_left: int
    ) -> _Guess:
        """The guess with drafts behind it: together `num_left` at most, as many in every text."""
        patch_size = self.patch_size
        self.proposal = None
        carried = carried.at(slice(num_left))
        num_free = min(num_left - carried.size, self.source.max_tokens // patch_size)
        rows = is_waited_for.nonzero().flatten().tolist()
        if num_free < 1 or not rows:
            return carried

        if self.source.sureness is not None:
            num_free = self.length.choose(num_free, self.source.sureness)
            if not num_free:
                return carried

        texts, known = self._texts(carried, rows)
        drafts, self.sureness = self.source.propose(texts, num_free * patch_size)
        drafts = {row: known[row] + draft for row, draft in drafts.items()}
        num_drafts = min(num_free, min(map(len, drafts.values())) // patch_size)
        first = self.writer.num_passed + carried.size * patch_size
        self.proposal = _Proposal(drafts, first, num_drafts)
        if self.source.sureness is None:
            num_drafts = self.length.choose(num_drafts, self.sureness)
            if self.missed is None and self.length.wanted > num_drafts:
                self.missed = _Proposal(drafts, first, self.length.wanted)

        if not num_drafts:
            return carried

        tokens = torch.zeros(len(is_waited_for), num_drafts, patch_size, dtype=torch.long)
        for row, draft in drafts.items():
            tokens[row] = torch.tensor(draft[: num_drafts * patch_size]).view(-1, patch_size)

        pairs = zip(carried, reader.guess(tokens), strict=True)
        return _Guess(*(torch.cat(pair, 1) for pair in pairs))

    def _texts(
        self, carried: _Guess, rows: list[int]
    ) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
        """Some texts as they are guessed to be, and the known tokens at their end that follow that."""
        writer = self.writer
        texts = {}
        known = {}
        place = writer.num_passed + carried.tokens[0].numel()
        for row in rows:
            text = take(writer.tokens[row, None], writer.order[row, None])[0].tolist()
            text[writer.num_passed : place] = carried.tokens[row].flatten().tolist()
            num_known = int((~self.is_new[row, place:]).long().cumprod(0).sum())
            texts[row] = text[: place + num_known]
            known[row] = text[place : place + num_known]

        return texts, known

    def _learn(self, num_guesses: int, num_right: int) -> None:
        """Learns from a pass, also from what it did not take along, now that it has been written."""
        would_be_right = None
        if not num_guesses and self.proposal is not None and self.proposal.size:
            num_same, is_decided = self._compare(self.proposal)
            would_be_right = num_same > 0 if num_same or is_decided else None

        self.length.observe(num_guesses, num_right, self.sureness, would_be_right)
        if self.missed is not None:
            num_same, is_decided = self._compare(self.missed)
            if is_decided:
                self.length.regret(self.missed.size, num_same)
                self.missed = None

    def _compare(self, proposal: _Proposal) -> tuple[int, bool]:
        """The number of its positions that were written so, and True if no more can follow."""
        writer, patch_size = self.writer, self.patch_size
        num_written = max(0, writer.num_passed - proposal.first) // patch_size
        num_same = size = min(num_written, proposal.size)
        places = slice(proposal.first, proposal.first + size * patch_size)
        for row, draft in proposal.tokens.items():
            written = writer.tokens[row, writer.order[row, places]].tolist()
            others = (n for n, token in enumerate(written) if token != draft[n])
            num_same = min(num_same, next(others, len(written)) // patch_size)

        return num_same, num_same < size or size == proposal.size

    def _write(
        self,
        h: Tensor,
        first: int,
        guess: _Guess,
        num_right: int,
        is_waited_for: Tensor,
        options: FlowInverse,
    ) -> tuple[int, bool]:
        """Hands on the states (B, N, D) found from `first` on, up to the first wrong guess's.

        A token can be written that is not the most likely of its state. Processors of logits that
        have read the guess instead were misled: then it ends there.

        Returns:
            The place at which it ended, and True if all texts did.
        """
        writer = self.writer
        for n in range(first, first + num_right + 1):
            if options.on_position(h[:, n : n + 1]):
                return n + 1, True

            if writer.groups and n < first + num_right:
                places = writer.order[
                    :, writer.num_passed - guess.tokens.shape[2] : writer.num_passed
                ]
                is_other = (take(writer.tokens, places) != guess.tokens[:, n - first]).any(-1)
                if bool((is_other & is_waited_for).any()):
                    return n + 1, False

        return first + num_right + 1, False


def check_drafts(options: GenerationOptions, config: PreTrainedConfig) -> None:
    """Raises a ValueError where drafts contradict the model or other options of `generate`."""
    names = ", ".join(options.draft_options)
    direction = config.flows[0]["direction"]
    if len(options.draft_options) > 1:
        raise ValueError(f"{names} both guess the next tokens: give one of them.")

    if direction == "right_to_left":
        raise ValueError(
            f"{names} guess what follows a text: the flow next to the data has to run left to right, not {direction}."
        )
    if options.synced_gpus:
        raise ValueError(
            f"synced_gpus needs as many passes on every GPU, but with {names} their number depends on the text."
        )

    if options.first_inverse_method == "parallel" or options.capture_step:
        raise ValueError(
            f"{names} invert the first flow in a way of their own: leave out capture_step, and "
            'inverse_method="parallel" of the first flow.'
        )

    num_tokens = options.prompt_lookup_num_tokens
    if 0 < num_tokens < config.patch_size:
        raise ValueError(
            f"prompt_lookup_num_tokens={num_tokens} is less than a patch, of patch_size {config.patch_size}."
        )


def make_drafts(
    options: GenerationOptions, writer: TokenWriter | None, model: PreTrainedModel
) -> Drafts | None:
    """The drafts that the options of `generate` ask for, if any.

    Raises:
        ValueError: If an assistant does not go with the model.
    """
    if writer is None or not options.draft_options:
        return None

    source: DraftSource
    if options.assistant_model is None:
        source = PromptLookup(options.prompt_lookup_num_tokens, options.max_matching_ngram_size)
    else:
        num_tokens = options.num_assistant_tokens
        warpers = options.warpers()
        source = make_assistant(options.assistant_model, model, num_tokens, warpers)

    length = DraftLength(len(writer.tokens), writer.tokens.device.type, source.cost)
    return Drafts(source, writer, length, model.config.patch_size)


class _Reader:
    """Reads tokens as states of a flow, and states as tokens."""

    def __init__(self, flow: nn.Module, codebook: Gaussians):
        self.channels = flow.channels
        self.codebook = codebook
        self.patch_size = flow.channels.patch_size

    def guess(self, tokens: Tensor) -> _Guess:
        """Tokens (B, m, P), with their means as the states."""
        tokens = tokens.to(self.codebook.mean.device)
        means = F.embedding(tokens, self.codebook.mean).flatten(-2)
        return _Guess(tokens, self.channels.shuffle(means))

    def tokens(self, states: Tensor) -> Tensor:
        """The most likely tokens (B, m, P) of states (B, m, D)."""
        return self.codebook.most_likely_token(self.latents(states))

    def latents(self, states: Tensor) -> Tensor:
        """States (B, m, D) by tokens, (B, m, P, d)."""
        return self.channels.unshuffle(states).unflatten(-1, (self.patch_size, -1))

    def carried(
        self, states: Tensor, guess: _Guess, num_right: int, is_waited_for: Tensor
    ) -> _Guess:
        """The states behind a guess that did not count, as long as tokens are the guessed ones.

        Args:
            states: Those found, (B, m + 1, D).
            guess: The guesses for the first m of them.
            num_right: The number of those that counted.
            is_waited_for: The texts (B,) whose tokens are compared.
        """
        tokens = self.tokens(states[:, num_right:])
        is_other = (tokens[:, :-1] != guess.tokens[:, num_right:]).any(-1)
        is_same = ~(is_other & is_waited_for.unsqueeze(-1)).any(0)
        num_same = int(is_same.long().cumprod(0).sum())
        return _Guess(tokens, states[:, num_right:]).at(slice(1, num_same + 1))


def _num_right(read: Tensor, renewed: Tensor, is_waited_for: Tensor) -> tuple[int, float]:
    """The number of guesses that the decoder has read as it reads the states found, up to rounding.

    Args:
        read: The decoder's inputs of the guesses, (B, m, w).
        renewed: Those of the states found.
        is_waited_for: The texts (B,) that count.

    Returns:
        The number, and the largest difference among these inputs, relative to the largest number of
        its slot.
    """
    differences = (read - renewed).abs().amax(-1).float() / read.abs().amax(-1).float()
    differences = differences.masked_fill(~is_waited_for.unsqueeze(-1), 0).amax(0)  # (m,)
    is_right = differences <= MAX_ROUNDINGS * torch.finfo(read.dtype).eps
    num_right = int(is_right.long().cumprod(0).sum())  # waits for the device
    return num_right, max([0.0, *differences[:num_right].tolist()])


def _croppable_cache(flow: nn.Module, num_slots: int) -> Cache | InputCache:
    """A cache that keeps every slot, also of a decoder with a sliding window."""
    cache = make_cache(flow.decoder)
    if isinstance(cache, DynamicCache):
        num_layers = flow.decoder.config.num_hidden_layers
        cache.layers = [LayerWithRoom(num_slots) for _ in range(num_layers)]

    return cache
