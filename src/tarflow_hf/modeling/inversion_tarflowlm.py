"""The inverse of one flow: the state at each position, from its noise and the states before it.

    h_n = inverse(u_n; context(h_0, ..., h_(n-1))),   n = 0, ..., N - 1

Sequentially that is N steps with a key-value cache. In parallel it is a fixed point, solved for
many positions at once (Jacobi's method): from a guess of all states, recompute all of them, again
and again. After k iterations at least the first k states are those of the sequential inverse,
whatever the flow is. If states depend little on those before them, far more are.

Everything here is in the flow's own order, slot by slot. Three methods of a `FlowLayer` are used:
`inputs` (the decoder's inputs; slot s predicts position s and reads the state at s - 1), `context`
(the decoder's output of these) and `invert_position` (the coupling's inverse there).

Shapes: B batch, N positions of size D.

References:
    Song, Meng, Liao & Ermon, *Accelerating Feedforward Computation via Parallel Nonlinear Equation
    Solving*, ICML 2021, arXiv:2002.03629.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer

from .codebook import Gaussians
from .coupling_head import LogitsProcessor
from .decoder_tarflowlm import InputCache
from .slots_tarflowlm import Known, Observed, Order, to_tokens

INVERSE_METHODS = ("auto", "sequential", "parallel")

# A guess further out is pulled in. It only steers the iteration: what is final is never clamped.
# Without it a guess that overflows would reach the positions before it, as 0 times NaN, through the
# masked part of the attention.
MAX_GUESS = 1e4


# --------------------------------------------------------------------------------------------------
# Options and report
# --------------------------------------------------------------------------------------------------


class InverseOptions(NamedTuple):
    """The options of inverting a stack. All methods give the same states, up to rounding.

    Args:
        inverse_method: "sequential", "parallel" or "auto", for all flows or a list with one for
            each from the data side; see `choose_inverse_methods` for the choice of "auto".
        inverse_window: The number of positions that the parallel form takes at once; by default all
            of them, on a CPU at least 16 and about 1,024 over the batch.
        inverse_tolerance: The change of a state, |G(h) - h| / (1 + |h|), that the parallel form
            takes for none. By default 32 times the relative spacing of the states' dtype or, if the
            decoder runs in a coarser one, a quarter of that one's.
        capture_step: Takes the steps of the sequential form by a CUDA graph.
        flow_temperatures: A factor for each flow from the data side, by which its output is
            multiplied before it is inverted. The last one is the noise's standard deviation.
        logits_processor: A map from the mixture logits (n, K), in float32 or better, to other ones
            (-inf leaves a component out), for every flow whose coupling takes one.
        token_processor: A map like that, for the first flow only, which runs before it. It is
            called once for each position, in order; with drafts, for several at once.
        on_position: Called with the latents (B, P, d) of each position that the first flow
            completes, in its order. If it returns True, the positions behind that one are not
            wanted, and are 0.
        on_guess: Called with latents (B, T, d), in the order of the text, that the rest may still
            change: the output of every flow before it is inverted, and the first flow's input after
            each pass of its parallel form.
        drafts: The `Drafts` that guess states of the first flow ahead and verify them; they invert
            it whatever its method.
    """

    inverse_method: str | Sequence[str] = "auto"
    inverse_window: int | None = None
    inverse_tolerance: float | None = None
    capture_step: bool = False
    flow_temperatures: Sequence[float] | None = None
    logits_processor: LogitsProcessor | None = None
    token_processor: LogitsProcessor | None = None
    on_position: Callable[[Tensor], bool | None] | None = None
    on_guess: Callable[[Tensor], None] | None = None
    drafts: Any = None

    def for_flows(
        self, flows: Sequence[nn.Module], u: Tensor, is_differentiable: bool
    ) -> list["InverseOptions"]:
        """The options of each flow from the data side, with one method and one temperature.

        Raises:
            ValueError: If an option is unknown or out of range, or has no gradients where they are
                asked for.
        """
        if self.inverse_window is not None and self.inverse_window < 1:
            raise ValueError(
                f"inverse_window must be an integer of at least 1, not {self.inverse_window}."
            )
        if self.inverse_tolerance is not None and not self.inverse_tolerance >= 0:
            raise ValueError(f"inverse_tolerance must not be negative: {self.inverse_tolerance}.")
        if is_differentiable and self.capture_step:
            raise ValueError(
                "capture_step=True has no gradients: use torch.no_grad(), or capture_step=False."
            )

        temperatures = [1.0] * len(flows)
        if self.flow_temperatures is not None:
            temperatures = list(self.flow_temperatures)

        if len(temperatures) != len(flows):
            raise ValueError(
                f"flow_temperatures has {len(temperatures)} entries for {len(flows)} flows: {temperatures}."
            )
        if not all(0 < temperature < math.inf for temperature in temperatures):
            raise ValueError(f"flow_temperatures must be positive and finite, not {temperatures}.")

        methods = choose_inverse_methods(self.inverse_method, flows, u, is_differentiable)
        options = [
            self._replace(
                inverse_method=method,
                flow_temperatures=(temperature,),
                on_position=None,
                on_guess=None,
                drafts=None,
                token_processor=None,
                logits_processor=self.logits_processor
                if flow.head.takes_logits_processor
                else None,
            )
            for flow, method, temperature in zip(flows, methods, temperatures, strict=True)
        ]
        first = {name: getattr(self, name) for name in ("on_position", "on_guess", "drafts")}
        options[0] = options[0]._replace(**first)
        if self.token_processor is not None:
            options[0] = options[0]._replace(logits_processor=self._process_tokens)

        return options

    def _process_tokens(self, logits: Tensor) -> Tensor:
        logits = self.token_processor(logits)
        return logits if self.logits_processor is None else self.logits_processor(logits)

    def for_slots(self, order: Order) -> "InverseOptions":
        """The options for a flow's own order.

        `on_position` is called with its states (B, 1, D), `on_guess` with all of them.
        """
        channels, on_position, on_guess = order.channels, self.on_position, self.on_guess

        def on_slot(h: Tensor) -> bool | None:
            return on_position(to_tokens(channels.unshuffle(h), channels.patch_size))

        def on_slots(h: Tensor) -> None:
            on_guess(to_tokens(order.rearrange(h), channels.patch_size))

        return self._replace(
            on_position=None if on_position is None else on_slot,
            on_guess=None if on_guess is None else on_slots,
        )

    def show(self, h: Tensor, patch_size: int) -> None:
        """Hands a flow's output (B, N, D) on to `on_guess`."""
        if self.on_guess is not None:
            self.on_guess(to_tokens(h, patch_size))


@dataclass
class InverseReport:
    """The course of the inversion of one flow.

    `residual` is the largest |G(h) - h| / (1 + |h|) over the final states, G(h) being their
    recomputation from the final states before them: how far the result is from being its own next
    iterate. It is 0 for a sequential inverse by construction.
    """

    method: str  # "sequential", "parallel" or "drafts"
    iterations: int  # passes through the decoder
    residual: float
    num_final: list[int]  # number of positions that each iteration made final; their sum is N


def choose_inverse_methods(
    methods: str | Sequence[str],
    flows: Sequence[nn.Module],
    u: Tensor,
    is_differentiable: bool = False,
) -> list[str]:
    """The method of each flow, "sequential" or "parallel".

    "auto" is a rule made from rough timings on one core of a CPU, with stacks of width 128 trained
    on characters for 600 steps of 256. The speed of the parallel form divided by that of the
    sequential one at 256 positions, and in brackets the iterations it took:

    | flow | batch 1 | 8 | 16 | 32 |
    |---|---|---|---|---|
    | Mix-1, one layer, on top of a Mix-d flow | 40 (3) | 10 (6) | 7 (12) | 4 (23) |
    | Mix-1, four layers, next to the data | 11 (7) | 2.5 (14) | 1.5 (29) | 1 (49) |
    | Mix-1, one layer, on top of that | 14 (8) | 4 (17) | 2.3 (34) | 1.4 (58) |
    | Mix-1, one layer, next to the noise there | 1.9 (56) | 0.8 (100) | 0.6 (128) | 0.5 (171) |

    A Mix-d flow of four layers that reads the posterior over tokens came to 0.3 at batch 1 (226):
    its states depend on those before almost as discrete tokens do. An affine flow of one layer
    gained 7 at 1,024 positions (5). So "auto" takes the parallel form

    - for a flow of a smooth coupling (affine, Mix-1) and at most four layers that reads the latents
      themselves,
    - on a CPU up to a batch of 16 (a GPU has not been measured; there the batch does not count),
    - if no gradients are asked for, which only the sequential form has,

    and the sequential form otherwise.

    Args:
        methods: "auto", "sequential" or "parallel", or a list with one of these for each flow.
        flows: The `FlowLayer`s, from the data side.
        u: The noise to invert, (B, N, D).
        is_differentiable: True if gradients are asked for.

    Raises:
        ValueError: If a method is unknown, if a list has another length than the flows, or if
            gradients of the parallel form are asked for.
    """
    methods = [methods] * len(flows) if isinstance(methods, str) else list(methods)
    if len(methods) != len(flows):
        raise ValueError(
            f"inverse_method has {len(methods)} entries for {len(flows)} flows: {methods}."
        )
    if unknown := [method for method in methods if method not in INVERSE_METHODS]:
        raise ValueError(
            f"inverse_method must be one of {', '.join(INVERSE_METHODS)}, not {unknown[0]!r}."
        )
    if is_differentiable and "parallel" in methods:
        raise ValueError(
            'inverse_method="parallel" has no gradients: use torch.no_grad(), or inverse_method="sequential".'
        )

    parallel_pays = not is_differentiable and (u.device.type != "cpu" or len(u) <= 16)
    automatic = [
        "parallel" if flow.is_shallow and parallel_pays else "sequential" for flow in flows
    ]

    return [
        auto if method == "auto" else method
        for method, auto in zip(methods, automatic, strict=True)
    ]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """The module in eval mode: no dropout, and no checkpointing, which drops the caches."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False

    try:
        yield
    finally:
        for part in training:
            part.training = True


def check_finite(states: Tensor, what: str, is_reversed: bool = False) -> None:
    """Raises a ValueError if some states (B, N, D) are not finite; it names the first position."""
    is_bad = ~states.isfinite().all(-1).all(0)  # (N,)
    if not bool(is_bad.any()):
        return

    positions = is_bad.nonzero().flatten().tolist()
    position = positions[-1] if is_reversed else positions[0]
    raise ValueError(
        f"{what} is not finite, first at position {position}. The weights may be broken (NaN), or the activations "
        f"too large for the decoder's dtype: float16 overflows above 65,504, bfloat16 and float32 do not."
    )


# --------------------------------------------------------------------------------------------------
# The three ways
# --------------------------------------------------------------------------------------------------


def invert(
    flow: nn.Module,
    u: Tensor,
    codebook: Gaussians,
    observed: Observed | None,
    known: Known | None,
    options: InverseOptions,
) -> tuple[Tensor, InverseReport]:
    """The states (B, N, D) that the flow maps to u (B, N, D), in the flow's own order.

    Args:
        flow: The `FlowLayer`.
        u: Its output.
        codebook: The encoder's.
        observed: The inputs that tell a conditional model's decoder what is observed.
        known: States that are held fixed.
        options: Those of this flow, with one method. `on_position` is called with each new state
            (B, 1, D), in order, but not with those at the beginning that are known to all
            sequences.
    """
    arguments = flow, u, codebook, observed, known, options
    if options.drafts is not None:
        return options.drafts.invert(*arguments)
    if options.inverse_method == "parallel":
        return invert_in_parallel(*arguments)
    if options.capture_step:
        return invert_by_captured_step(*arguments)

    return invert_sequentially(*arguments)


def invert_sequentially(
    flow: nn.Module,
    u: Tensor,
    codebook: Gaussians,
    observed: Observed | None,
    known: Known | None,
    options: InverseOptions,
) -> tuple[Tensor, InverseReport]:
    """`invert`, one position after another: each costs the decoder one slot. Differentiable."""
    num_positions = u.shape[1]
    first = num_known_to_all(known)

    # Not a static cache, which attends over all N slots at every step.
    cache = make_cache(flow.decoder, num_positions)

    # States are a list: gradients pass through it.
    states = [] if first == 0 else [known.states[:, :first]]
    num_final = [] if first == 0 else [first]

    # The first step reads all that is known at the beginning, and the start vector before it.
    beginning = u if known is None else known.states
    inputs = flow.inputs(beginning, codebook, observed, 0, min(first + 1, num_positions))
    start = 0

    for n in range(first, num_positions):
        if n > first:  # of the states before, slot n reads the last alone
            inputs = flow.inputs(states[-1].expand(-1, n, -1), codebook, observed, n, n + 1)
            start = n

        context = flow.context(inputs, observed, start, cache)
        state = flow.invert_position(u[:, n : n + 1], context[:, -1:], codebook, options)
        if known is not None:
            is_known = known.mask[:, n : n + 1, None]
            state = torch.where(is_known, known.states[:, n : n + 1], state)

        states.append(state)
        num_final.append(1)
        if options.on_position is not None and options.on_position(state):
            break

    report = InverseReport("sequential", len(num_final) - (first > 0), 0.0, num_final)
    h = torch.cat(states, 1)
    return F.pad(h, (0, 0, 0, num_positions - h.shape[1])), report


def invert_by_captured_step(
    flow: nn.Module,
    u: Tensor,
    codebook: Gaussians,
    observed: Observed | None,
    known: Known | None,
    options: InverseOptions,
) -> tuple[Tensor, InverseReport]:
    """`invert_sequentially` by a step of fixed shapes on fixed buffers, captured and replayed.

    The step counts its own position on the device, so that one CUDA graph serves them all. On a CPU
    it runs as it is. It has no gradients, and takes no observed tokens, whose slots differ from row
    to row.

    Raises:
        ValueError: If something is observed.
    """
    if observed is not None:
        raise ValueError(
            "capture_step=True cannot go on from observed tokens: use capture_step=False."
        )
    if not takes_steps(flow.decoder):
        raise ValueError(
            f"capture_step=True needs a cache of keys and values, which {flow.decoder.config.model_type} does not "
            "have: use capture_step=False."
        )

    num_positions = u.shape[1]
    first = num_known_to_all(known)
    h = torch.zeros_like(u) if known is None else known.states.clone()
    if first == num_positions:
        return h, InverseReport("sequential", 0, 0.0, [first])

    cache = StaticCache(config=flow.decoder.config, max_cache_len=num_positions)
    slot = torch.full((1,), first, device=u.device)

    def step(inputs: Tensor | None = None) -> None:
        if inputs is None:
            inputs = flow.inputs(h.index_select(1, slot - 1), codebook, None, 1, 2)

        context = flow.context(inputs, None, 0, cache)
        noise = u.index_select(1, slot)
        state = flow.invert_position(noise, context[:, -1:], codebook, options)
        if known is not None:
            is_known = known.mask.index_select(1, slot).unsqueeze(-1)
            state = torch.where(is_known, h.index_select(1, slot), state)

        h.index_copy_(1, slot, state.to(h.dtype))
        slot.add_(1)

    graph = None
    for n in range(first, num_positions):
        if n == first:
            step(flow.inputs(h, codebook, None, 0, n + 1))
        elif u.device.type != "cuda" or n == first + 1:
            step()  # on a GPU the first plain step is the graph's warm-up
        else:
            if graph is None:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):  # records the step without taking it
                    step()

            graph.replay()

        if options.on_position is not None and options.on_position(h[:, n : n + 1].clone()):
            h[:, n + 1 :] = 0
            break

    num_steps = n + 1 - first
    num_final = [first] * (first > 0) + [1] * num_steps
    return h, InverseReport("sequential", num_steps, 0.0, num_final)


def invert_in_parallel(
    flow: nn.Module,
    u: Tensor,
    codebook: Gaussians,
    observed: Observed | None,
    known: Known | None,
    options: InverseOptions,
) -> tuple[Tensor, InverseReport]:
    """`invert`, many positions at once, iterated until they no longer change.

    One iteration recomputes the positions of a window, whose states h are guesses, from the states
    before them. From the left, positions become final

    - as long as recomputing them changes no sequence's state by more than the tolerance. The guess
      that was read stays the state: what was measured is what is returned, and its keys and values
      in the cache are right;
    - and one more, which was computed from final states only: the very step of the sequential
      inverse.

    So every iteration makes at least one position final, N always suffice, and no number of
    iterations is taken for convergence. Each state returned is what a sequential step makes of
    those before it, up to the tolerance. By default that is the rounding level: the error is of the
    kind and size that rounding commits in the sequential inverse. It is measured in the space of
    the states, where the result is compared and decoded. It costs nothing there, because G(h) - h
    is the step of the iteration itself.

    Final positions stay in the cache and are not computed again: the window moves on behind them.
    """
    num_positions = u.shape[1]
    window = _window(u, options)
    tolerance = _tolerance(flow, u, options)
    num_known = num_known_to_all(known)

    h = _as_guess(u)
    if known is not None:
        h = torch.where(known.mask.unsqueeze(-1), known.states, h)

    cache = make_cache(flow.decoder)
    first, num_final, residuals = 0, [], [u.new_zeros(())]

    while first < num_positions:
        last = min(max(first, num_known) + window, num_positions)
        inputs = flow.inputs(h, codebook, observed, first, last)
        context = flow.context(inputs, observed, first, cache)
        new = flow.invert_position(u[:, first:last], context, codebook, options)
        if known is not None:
            is_known = known.mask[:, first:last, None]
            new = torch.where(is_known, known.states[:, first:last], new)

        old = h[:, first:last]
        change = ((new - old).abs() / (1 + old.abs())).amax((0, 2))  # (n,)
        num_unchanged = int((change <= tolerance).int().cumprod(0).sum())  # waits for the device
        exact = first + num_unchanged
        end = min(exact + 1, last)
        if exact > first:
            residuals.append(change[:num_unchanged].max())

        h[:, exact:end] = new[:, num_unchanged : end - first]
        h[:, end:last] = _as_guess(new[:, end - first :])
        if end < last:
            cache.crop(end - last)

        num_final.append(end - first)
        if options.on_position is not None:
            positions = range(max(first, num_known), end)
            if any(options.on_position(h[:, n : n + 1]) for n in positions):
                h[:, end:] = 0
                break

        if options.on_guess is not None and end < num_positions:
            options.on_guess(h)

        first = end

    residual = torch.stack(residuals).max().item()
    return h, InverseReport("parallel", len(num_final), residual, num_final)


def _window(u: Tensor, options: InverseOptions) -> int:
    if options.inverse_window is not None:
        return options.inverse_window

    return max(16, 1024 // len(u)) if u.device.type == "cpu" else u.shape[1]


def _tolerance(flow: nn.Module, u: Tensor, options: InverseOptions) -> float:
    if options.inverse_tolerance is not None:
        return options.inverse_tolerance

    eps, decoder_eps = torch.finfo(u.dtype).eps, torch.finfo(flow.decoder.dtype).eps
    return decoder_eps / 4 if decoder_eps > eps else 32 * eps


def _as_guess(h: Tensor) -> Tensor:
    return h.nan_to_num(0.0).clamp(-MAX_GUESS, MAX_GUESS)


def num_known_to_all(known: Known | None) -> int:
    """The number of positions from the first that are known to all sequences."""
    return 0 if known is None else int(known.mask.all(0).int().cumprod(0).sum())


# --------------------------------------------------------------------------------------------------
# Caches
# --------------------------------------------------------------------------------------------------


class LayerWithRoom(DynamicLayer):
    """The keys and values of a decoder layer, in buffers with room for all slots.

    A step copies its own slot only. The library's layer makes both tensors anew at every step, and
    copies N^2 / 2 slots in N steps.
    """

    def __init__(self, num_slots: int):
        super().__init__()
        self.num_slots = num_slots

    def update(
        self, key_states: Tensor, value_states: Tensor, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.buffers = [
                x.new_empty(*x.shape[:2], self.num_slots, x.shape[3])
                for x in (key_states, value_states)
            ]

        first = self.get_seq_length()
        last = first + key_states.shape[2]
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, first:last] = states

        self.keys, self.values = (buffer[:, :, :last] for buffer in self.buffers)
        return self.keys, self.values


def make_cache(decoder: PreTrainedModel, num_slots: int | None = None) -> Cache | InputCache:
    """A cache for a decoder, as far as it can be used there (`check_decoders` has measured it).

    Args:
        decoder: A flow's.
        num_slots: The number of slots of the sequential form, for which there is room at once where
            no gradients are wanted. Without it the cache is one that can be cropped.
    """
    if num_slots is None:
        # Without its configuration the cache keeps every slot, also of a decoder with a sliding
        # window: it can be cropped.
        is_usable = getattr(decoder, "takes_crops", not decoder._is_stateful)
        return DynamicCache() if is_usable else InputCache()

    if not takes_steps(decoder):
        return InputCache()

    cache = DynamicCache(config=decoder.config)
    if not torch.is_grad_enabled():  # gradients do not pass through what is written in place
        cache.layers = [
            LayerWithRoom(num_slots) if type(x) is DynamicLayer else x for x in cache.layers
        ]

    return cache


def takes_steps(decoder: PreTrainedModel) -> bool:
    """True if a decoder can be run slot by slot with a cache of the library."""
    return getattr(decoder, "takes_steps", not decoder._is_stateful)
