"""The options of inverting a stack of flows, and those of each flow.

Shapes: B batch, T tokens, N positions of size D.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from .coupling_head import LogitsProcessor
from .slots_tarflowlm import Order, to_tokens

INVERSE_METHODS = ("auto", "sequential", "parallel")


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
    ) -> list["FlowInverse"]:
        """The options of each flow from the data side.

        Raises:
            ValueError: If an option is unknown or out of range, or has no gradients where they are
                asked for.
        """
        self._check(flows, is_differentiable)
        temperatures = self.flow_temperatures or [1.0] * len(flows)
        methods = choose_inverse_methods(self.inverse_method, flows, u, is_differentiable)
        options = [
            FlowInverse(
                method=method,
                temperature=temperature,
                window=self.inverse_window,
                tolerance=self.inverse_tolerance,
                capture_step=self.capture_step,
                logits_processor=self.logits_processor
                if flow.head.takes_logits_processor
                else None,
            )
            for flow, method, temperature in zip(flows, methods, temperatures, strict=True)
        ]

        first = {name: getattr(self, name) for name in ("on_position", "on_guess", "drafts")}
        if self.token_processor is not None:
            first["logits_processor"] = self._process_tokens

        return [options[0]._replace(**first), *options[1:]]

    def _check(self, flows: Sequence[nn.Module], is_differentiable: bool) -> None:
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

        temperatures = self.flow_temperatures
        if temperatures is None:
            return
        if len(temperatures) != len(flows):
            raise ValueError(
                f"flow_temperatures has {len(temperatures)} entries for {len(flows)} flows: {temperatures}."
            )
        if not all(0 < temperature < math.inf for temperature in temperatures):
            raise ValueError(f"flow_temperatures must be positive and finite, not {temperatures}.")

    def _process_tokens(self, logits: Tensor) -> Tensor:
        logits = self.token_processor(logits)
        return logits if self.logits_processor is None else self.logits_processor(logits)

    def show(self, h: Tensor, patch_size: int) -> None:
        """Hands a flow's output (B, N, D) on to `on_guess`."""
        if self.on_guess is not None:
            self.on_guess(to_tokens(h, patch_size))


class FlowInverse(NamedTuple):
    """The options of inverting one flow; see `InverseOptions`."""

    method: str = "sequential"
    temperature: float = 1.0  # the factor by which its output is multiplied first
    window: int | None = None
    tolerance: float | None = None
    capture_step: bool = False
    logits_processor: LogitsProcessor | None = None
    on_position: Callable[[Tensor], bool | None] | None = None
    on_guess: Callable[[Tensor], None] | None = None
    drafts: Any = None

    def for_slots(self, order: Order) -> "FlowInverse":
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


@dataclass
class InverseReport:
    """The course of the inversion of one flow.

    `residual` is the largest |G(h) - h| / (1 + |h|) over the final states, where G(h) recomputes each
    state from the final states before it: the relative change that one more iteration would make.
    It is 0 for a sequential inverse by construction.
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
