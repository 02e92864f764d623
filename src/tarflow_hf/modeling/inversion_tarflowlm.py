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

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer

from .codebook import Gaussians
from .decoder_tarflowlm import InputCache
from .inverse_options import FlowInverse, InverseReport
from .slots_tarflowlm import Known, Observed

# A guess further out is pulled in. It only steers the iteration: what is final is never clamped.
# Without it a guess that overflows would reach the positions before it, as 0 times NaN, through the
# masked part of the attention.
MAX_GUESS = 1e4


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
    options: FlowInverse,
) -> tuple[Tensor, InverseReport]:
    """The states (B, N, D) that the flow maps to u (B, N, D), in the flow's own order.

    Args:
        flow: The `FlowLayer`.
        u: Its output.
        codebook: The encoder's.
        observed: The inputs that tell a conditional model's decoder what is observed.
        known: States that are held fixed.
        options: The options of this flow. `on_position` is called with each new state (B, 1, D), in
            order, but not with those at the beginning that are known to all sequences.
    """
    arguments = flow, u, codebook, observed, known, options
    if options.drafts is not None:
        return options.drafts.invert(*arguments)
    if options.method == "parallel":
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
    options: FlowInverse,
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
            state = known.hold(state, n)

        states.append(state)
        num_final.append(1)
        if options.on_position is not None and options.on_position(state):
            break

    report = InverseReport("sequential", len(num_final) - (first > 0), 0.0, num_final)
    h = torch.cat(states, 1)
    return F.pad(h, (0, 0, 0, num_positions - h.shape[1])), report


def transform_sequentially(
    flow: nn.Module, h: Tensor, codebook: Gaussians, observed: Observed | None
) -> Tensor:
    """The noise (B, N, D) of states h (B, N, D), both in the flow's own order, slot by slot.

    It is that of `transform` but for rounding: each context is computed as `invert_sequentially`
    computes it. In half precision a context's rounding can move a mixture's weights by more than an
    unlikely component has.
    """
    cache = make_cache(flow.decoder, h.shape[1])
    noise = []
    for n in range(h.shape[1]):
        inputs = flow.inputs(h, codebook, observed, n, n + 1)
        context = flow.context(inputs, observed, n, cache)
        u, _ = flow.head(h[:, n : n + 1], context, codebook)
        noise.append(u)

    return torch.cat(noise, 1)


def invert_by_captured_step(
    flow: nn.Module,
    u: Tensor,
    codebook: Gaussians,
    observed: Observed | None,
    known: Known | None,
    options: FlowInverse,
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
    num_final = [first] if first else []
    num_final += [1] * num_steps
    return h, InverseReport("sequential", num_steps, 0.0, num_final)


def invert_in_parallel(
    flow: nn.Module,
    u: Tensor,
    codebook: Gaussians,
    observed: Observed | None,
    known: Known | None,
    options: FlowInverse,
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
        h = known.hold(h, 0)

    cache = make_cache(flow.decoder)
    first = 0
    num_final = []
    residuals = [u.new_zeros(())]

    while first < num_positions:
        last = min(max(first, num_known) + window, num_positions)
        inputs = flow.inputs(h, codebook, observed, first, last)
        context = flow.context(inputs, observed, first, cache)
        new = flow.invert_position(u[:, first:last], context, codebook, options)
        if known is not None:
            new = known.hold(new, first)

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


def _window(u: Tensor, options: FlowInverse) -> int:
    if options.window is not None:
        return options.window

    return max(16, 1024 // len(u)) if u.device.type == "cpu" else u.shape[1]


def _tolerance(flow: nn.Module, u: Tensor, options: FlowInverse) -> float:
    if options.tolerance is not None:
        return options.tolerance

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
