"""The inverse of one flow, sequential or parallel: u_n and the states before n give the state at n,
for every n.

    h_n = inverse(u_n; context(h_0, ..., h_(n-1))),   n = 0, ..., N - 1

Sequentially that is N steps with a key-value cache. In parallel it is a fixed point, solved for
many positions at once (Jacobi's method): from a guess of all states, recompute all of them, again
and again. After k iterations at least the first k states are those of the sequential inverse,
whatever the flow; where a state depends little on those before it, far more are, and that is what
the parallel form lives on.

Everything here is in the flow's own, arranged order. Of a `FlowLayer` it asks `_inputs(h, codebook,
first, last)`, the decoder's inputs of the slots first, ..., last - 1 (slot s predicts position s
and reads the state at s - 1), `_context(inputs)`, what the decoder makes of them, and `_inverse(u,
context, codebook)`, the coupling's inverse there.

What is promised of them, and the tests in the repository that show it:

- all give the same states, up to rounding:
  `tests/modeling/test_inversion.py::test_every_method_gives_the_sequential_inverse`, also where a guess is
  worth little, `tests/modeling/test_inversion.py::test_a_hard_flow_still_ends_right`, or nothing,
  `tests/modeling/test_inversion.py::test_states_that_no_guess_can_reach_are_found_one_by_one`;
- no final position is computed again:
  `tests/modeling/test_generation.py::test_work_is_linear_in_the_length`,
  `tests/modeling/test_inversion.py::test_final_positions_are_not_computed_again`;
- the caches take memory in proportion to the positions:
  `tests/modeling/test_inversion.py::test_caches_grow_linearly`;
- what is known stays, and the rest follows from it:
  `tests/modeling/test_inversion.py::test_known_positions_are_kept_and_the_others_follow_from_them`;
- gradients: `tests/modeling/test_inversion.py::test_gradients_are_those_of_recomputing_every_prefix`.

Shapes: B batch, N positions of size D.

References:
    Song, Meng, Liao & Ermon, *Accelerating Feedforward Computation via Parallel Nonlinear Equation
    Solving*, ICML 2021, arXiv:2002.03629.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, StaticCache
from transformers.cache_utils import DynamicLayer

from .codebook import Gaussians

INVERSE_METHODS = ("auto", "sequential", "parallel")

# A guess further out is pulled in. It only steers the iteration: what is final is never clamped.
# Without it a guess that overflows would reach, as 0 times NaN, the positions before it through the
# masked part of the attention.
MAX_GUESS = 1e4


@dataclass
class InverseReport:
    """What the inversion of one flow did.

    `residual` is the largest |G(h) - h| / (1 + |h|) over the final states, G(h) being their
    recomputation from the final states before them: how far the result is from being its own next
    iterate. 0 for a sequential inverse, which is that by construction.
    """

    method: str  # "sequential" or "parallel"
    iterations: int  # passes through the decoder
    residual: float
    num_final: list[int]  # number of positions that each iteration made final; their sum is N


def choose_inverse_methods(
    methods: str | Sequence[str],
    flows: Sequence[nn.Module],
    u: Tensor,
    is_differentiable: bool = False,
) -> list[str]:
    """The method of each flow, "sequential" or "parallel", from one for all of them or a list with
    one for each.

    "auto" is a rule made from rough timings on one core of a CPU, of stacks of width 128 trained on
    characters for 600 steps of 256. How many times faster the parallel form was than the sequential
    one at 256 positions (in brackets the iterations it took):

    | flow | batch 1 | 8 | 16 | 32 |
    |---|---|---|---|---|
    | Mix-1, one layer, on top of a Mix-d flow | 40 (3) | 10 (6) | 7 (12) | 4 (23) |
    | Mix-1, four layers, next to the data | 11 (7) | 2.5 (14) | 1.5 (29) | 1 (49) |
    | Mix-1, one layer, on top of that | 14 (8) | 4 (17) | 2.3 (34) | 1.4 (58) |
    | Mix-1, one layer, next to the noise there | 1.9 (56) | 0.8 (100) | 0.6 (128) | 0.5 (171) |

    and 0.3 for a Mix-d flow of four layers that reads the posterior over tokens, at batch 1 (226):
    its states hang on those before almost as discrete tokens do. An affine flow of one layer gained
    7 at 1,024 positions (5). So "auto" takes the parallel form

    - for a flow of an affine or mixture-CDF coupling and at most four layers that reads the latents
      themselves,
    - on a CPU up to a batch of 16 (a GPU has not been measured; there the batch does not count),
    - where no gradients are asked for, which only the sequential form has,

    and the sequential form otherwise.

    Args:
        methods: "auto", "sequential" or "parallel", or a list of these.
        flows: The `FlowLayer`s, from the data side.
        u: What is to be inverted (B, N, D).
        is_differentiable: Whether gradients are asked for.

    Raises:
        ValueError: An unknown method, a list of another length than the flows, or gradients of the
            parallel form.
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


class LayerWithRoom(DynamicLayer):
    """The keys and values of a decoder layer, in buffers with room for all slots: a step copies its
    own, not the past.

    The library's layer, which makes both anew at every step, copies N^2 / 2 slots in N steps.
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


def _make_cache(config: PreTrainedConfig, num_slots: int) -> DynamicCache:
    cache = DynamicCache(config=config)
    if not torch.is_grad_enabled():  # gradients do not pass through what is written in place
        cache.layers = [
            LayerWithRoom(num_slots) if type(x) is DynamicLayer else x for x in cache.layers
        ]

    return cache


def invert_sequentially(
    flow: nn.Module,
    u: Tensor,
    codebook: Gaussians,
    observed: tuple[Tensor, ...] | None = None,
    known: Tensor | None = None,
    known_mask: Tensor | None = None,
    on_position: Callable[[Tensor], None] | None = None,
    logits_processor: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, InverseReport]:
    """One position after another: each costs the decoder one slot. Differentiable.

    Args:
        flow: The `FlowLayer`.
        u: Its output (B, N, D).
        codebook: The encoder's, as tensors.
        observed: Of a conditional model, what its decoder knows beforehand.
        known, known_mask: States (B, N, D) that are given where the mask (B, N) is true, and stay
            as they are.
        on_position: Called with each new state (B, 1, D), as it is found; not with those known to
            all sequences at the beginning, which are read at once.
        logits_processor: Steers the inverse of a mixture Rosenblatt coupling.

    Returns:
        The states (B, N, D) and the report.
    """
    first = _num_known(known_mask)
    # Not a static cache, which attends over all N slots at every step. States are a list: gradients
    # pass through it.
    cache = _make_cache(flow.decoder.config, u.shape[1])
    states = [] if first == 0 else [known[:, :first]]
    num_final = [] if first == 0 else [first]
    inputs, start = (
        flow._inputs(
            u if known is None else known, codebook, 0, min(first + 1, u.shape[1]), observed
        ),
        0,
    )

    for n in range(first, u.shape[1]):
        if n > first:  # of the states before, slot n reads the last alone
            inputs, start = (
                flow._inputs(states[-1].expand(-1, n, -1), codebook, n, n + 1, observed),
                n,
            )

        context = flow._context(inputs, observed, start, cache)
        state = flow._inverse(u[:, n : n + 1], context[:, -1:], codebook, logits_processor)
        if known_mask is not None:
            state = torch.where(known_mask[:, n : n + 1, None], known[:, n : n + 1], state)

        states.append(state)
        num_final.append(1)
        if on_position is not None:
            on_position(state)

    return torch.cat(states, 1), InverseReport("sequential", u.shape[1] - first, 0.0, num_final)


def invert_by_captured_step(
    flow: nn.Module,
    u: Tensor,
    codebook: Gaussians,
    observed: tuple[Tensor, ...] | None = None,
    known: Tensor | None = None,
    known_mask: Tensor | None = None,
    on_position: Callable[[Tensor], None] | None = None,
    logits_processor: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, InverseReport]:
    """`invert_sequentially` by a step of fixed shapes on fixed buffers, which on a GPU is captured
    and replayed.

    The step counts its own position on the device, so that one CUDA graph serves them all. On a CPU
    it runs as it is. Without gradients, and not for what is observed in a conditional model, whose
    slots differ from row to row.

    Raises:
        ValueError: Something is observed.
    """
    if observed is not None:
        raise ValueError(
            "capture_step=True cannot go on from observed tokens: use capture_step=False."
        )

    first = _num_known(known_mask)
    num_positions = u.shape[1]
    h = torch.zeros_like(u) if known is None else known.clone()
    if first == num_positions:
        return h, InverseReport("sequential", 0, 0.0, [first])

    cache = StaticCache(config=flow.decoder.config, max_cache_len=num_positions)
    slot = torch.full((1,), first, device=u.device)

    def step(inputs: Tensor | None = None) -> None:
        if inputs is None:
            inputs = flow._inputs(h.index_select(1, slot - 1), codebook, 1, 2)

        context = flow._context(inputs, cache=cache)
        state = flow._inverse(u.index_select(1, slot), context[:, -1:], codebook, logits_processor)

        if known_mask is not None:
            state = torch.where(
                known_mask.index_select(1, slot).unsqueeze(-1), h.index_select(1, slot), state
            )

        h.index_copy_(1, slot, state.to(h.dtype))
        slot.add_(1)

    graph = None
    for n in range(first, num_positions):
        if n == first:
            step(flow._inputs(h, codebook, 0, n + 1))
        elif (
            u.device.type != "cuda" or n == first + 1
        ):  # on a GPU the first plain step is the graph's warm-up
            step()
        else:
            if graph is None:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):  # records the step without taking it
                    step()
            graph.replay()

        if on_position is not None:
            on_position(h[:, n : n + 1].clone())

    num_final = [1] * (num_positions - first)
    return h, InverseReport(
        "sequential", num_positions - first, 0.0, [first] * (first > 0) + num_final
    )


def invert_in_parallel(
    flow: nn.Module,
    u: Tensor,
    codebook: Gaussians,
    observed: tuple[Tensor, ...] | None = None,
    known: Tensor | None = None,
    known_mask: Tensor | None = None,
    on_position: Callable[[Tensor], None] | None = None,
    logits_processor: Callable[[Tensor], Tensor] | None = None,
    window: int | None = None,
    tolerance: float | None = None,
) -> tuple[Tensor, InverseReport]:
    """Many positions at once, iterated until they no longer change: the sequential inverse, to the
    tolerance.

    One iteration recomputes the positions of a window, whose states h are guesses, from the states
    before them. From the left, positions become final

    - as long as recomputing them changes no sequence's state by more than the tolerance. The guess
      that was read stays the state, so that what was measured is what is returned, and its keys and
      values in the cache are right;
    - and one more, which was computed from final states alone: the very step of the sequential
      inverse.

    So every iteration makes at least one position final, N always suffice, and no number of
    iterations is taken for convergence. Each state returned is what a sequential step makes of
    those before it, up to the tolerance, at the rounding level by default: the error is of the
    kind, and by default of the size, that rounding commits in the sequential inverse. It is
    measured in z, the space of the states, where the result is compared and decoded, and where it
    costs nothing, because G(h) - h is the step of the iteration itself.

    Final positions stay in the cache and are not computed again: the window moves on behind them.

    Args:
        flow, u, codebook, observed, known, known_mask: As in `invert_sequentially`.
        on_position: Called with the state (B, 1, D) of each final position that is not among those
            known to all sequences at the beginning, in order.
        logits_processor: As in `invert_sequentially`.
        window: Positions computed at once; by default all, but on a CPU at least 16 and about 1,024
            over the batch.
        tolerance: Of |G(h) - h| / (1 + |h|). By default 32 times the relative spacing of the
            states' dtype or, if the decoder runs in a coarser one, a quarter of that one's.

    Returns:
        The states (B, N, D) and the report.

    Raises:
        ValueError: The window is not at least 1, or the tolerance is negative.
    """
    num_positions = u.shape[1]
    if window is None:
        window = max(16, 1024 // len(u)) if u.device.type == "cpu" else num_positions

    if window < 1:
        raise ValueError(f"inverse_window must be at least 1, not {window}.")

    if tolerance is None:
        tolerance = 32 * torch.finfo(u.dtype).eps
        if torch.finfo(flow.decoder.dtype).eps > torch.finfo(u.dtype).eps:
            tolerance = torch.finfo(flow.decoder.dtype).eps / 4

    if not tolerance >= 0:
        raise ValueError(f"inverse_tolerance must not be negative: {tolerance}.")

    num_known = _num_known(known_mask)
    h = (
        _as_guess(u)
        if known is None
        else torch.where(known_mask.unsqueeze(-1), known, _as_guess(u))
    )

    # Without its configuration the cache keeps every slot, also of a decoder with a sliding window:
    # it can be cropped.
    cache = DynamicCache()

    first, num_final, residuals = 0, [], [u.new_zeros(())]
    while first < num_positions:
        last = min(max(first, num_known) + window, num_positions)
        inputs = flow._inputs(h, codebook, first, last, observed)
        context = flow._context(inputs, observed, first, cache)
        new = flow._inverse(u[:, first:last], context, codebook, logits_processor)
        if known_mask is not None:
            new = torch.where(known_mask[:, first:last, None], known[:, first:last], new)

        old = h[:, first:last]
        change = ((new - old).abs() / (1 + old.abs())).amax((0, 2))  # (n,)
        num_unchanged = int(
            (change <= tolerance).int().cumprod(0).sum()
        )  # the one look at the device
        exact = first + num_unchanged
        end = min(exact + 1, last)
        if exact > first:
            residuals.append(change[:num_unchanged].max())

        h[:, exact:end] = new[:, num_unchanged : end - first]
        h[:, end:last] = _as_guess(new[:, end - first :])
        if end < last:
            cache.crop(end - last)

        num_final.append(end - first)
        if on_position is not None:
            for n in range(max(first, num_known), end):
                on_position(h[:, n : n + 1])

        first = end

    return h, InverseReport(
        "parallel", len(num_final), torch.stack(residuals).max().item(), num_final
    )


def _as_guess(h: Tensor) -> Tensor:
    return h.nan_to_num(0.0).clamp(-MAX_GUESS, MAX_GUESS)


def _num_known(known_mask: Tensor | None) -> int:
    """How many positions from the first are known to all sequences."""
    return 0 if known_mask is None else int(known_mask.all(0).int().cumprod(0).sum())
