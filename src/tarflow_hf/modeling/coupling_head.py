"""The base of the coupling heads: what a coupling has to say of itself, and to do.

A head maps the decoder's output at a position to the parameters of a coupling, and applies that
coupling to the position. A new coupling is a subclass in a file of its own, and a line in
`COUPLING_HEADS` of `coupling_heads.py`.

Shapes: B batch, N positions of size D = P d, w hidden size, K mixture components.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from .codebook import Gaussians
from .normal import normal_log_prob

LogitsProcessor = Callable[[Tensor], Tensor]

MAX_LOG_SCALE = 10.0


class CouplingHead(nn.Module):
    """One coupling of all positions, with parameters that follow from the decoder's output.

    A subclass is built from the model's configuration and its flow's entry there. It has to define
    `transform` and `inverse`; the rest has defaults.

    Attributes:
        title: The coupling's name in model cards.
        options: The options of a flow with this coupling, with their defaults. An option of default
            None is left out of the flow's entry unless `complete` fills it in.
        takes_logits_processor: True if `transform` and `inverse` take a `logits_processor`, a map
            from the logits (n, K) of a mixture over the codebook to other ones.
        is_smooth: True if a flow's states depend on those before them smoothly enough for the
            parallel inverse to pay; see `choose_inverse_methods`.
    """

    title: str = ""
    options: dict[str, Any] = {}
    takes_logits_processor: bool = False
    is_smooth: bool = False

    @classmethod
    def make(cls, config: PreTrainedConfig, flow: dict[str, Any]) -> "CouplingHead":
        """Returns the head of a flow's entry; a coupling with several heads chooses here."""
        return cls(config, flow)

    @classmethod
    def complete(cls, flow: dict[str, Any], index: int, config: PreTrainedConfig) -> None:
        """Fills in the defaults of a flow's options, in place, and checks them.

        Args:
            flow: The entry; names of options that the coupling has not are refused before.
            index: Its place in `config.flows`, for messages.
            config: The configuration, whose sizes are set already.

        Raises:
            ValueError: If an option is out of range or contradicts another one.
        """
        for name, default in cls.options.items():
            if default is not None:
                flow.setdefault(name, default)

    @classmethod
    def paper_flops(
        cls, flow: dict[str, Any], width: int, latent_size: int, patch_size: int
    ) -> int:
        """The FLOPs of the head at one position, from the decoder's output of width w.

        Raises:
            NotImplementedError: If the coupling does not say.
        """
        raise NotImplementedError(f"{cls.__name__} does not define paper_flops.")

    def init_weights(self, std: float) -> None:
        """Initialises parameters of the head's own; those of the library's modules are not."""

    def start_as_identity(self) -> None:
        """Sets the head's parameters so that it begins as the identity, or close to it.

        A flow that is appended to a trained stack begins so. A coupling that cannot does nothing.
        """

    def transform(
        self, h: Tensor, context: Tensor, codebook: Gaussians | None
    ) -> tuple[Tensor, Tensor]:
        """u (B, N, D) and log|det du/dh| (B, N) in nats, of h (B, N, D) and contexts (B, N, w)."""
        raise NotImplementedError

    def inverse(self, u: Tensor, context: Tensor, codebook: Gaussians | None) -> Tensor:
        """The h (B, N, D) that `transform` maps to u (B, N, D)."""
        raise NotImplementedError

    def log_prob(self, h: Tensor, context: Tensor, codebook: Gaussians | None) -> Tensor:
        """log p(h | context) (B, N) in nats, where u ~ N(0, I)."""
        u, log_det = self.transform(h, context, codebook)
        return log_det + normal_log_prob(u).sum(-1)

    def forward(
        self,
        h: Tensor,
        context: Tensor,
        codebook: Gaussians | None = None,
        task: str = "transform",
        **options: Any,
    ):
        """Runs `transform`, `inverse` or `log_prob`, whichever `task` names.

        All go through `forward`, because the hooks of offloading and sharding see calls of `forward` only.
        """
        return getattr(self, task)(h, context, codebook, **options)


def bounded(log_scale: Tensor) -> Tensor:
    """Keeps predicted log scales where the couplings promise finite results; the identity near 0."""
    log_scale = at_least_float32(log_scale)
    return MAX_LOG_SCALE * torch.tanh(log_scale / MAX_LOG_SCALE)


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32 or better."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def at_least_one(name: str, value: Any) -> int:
    """Returns the value, Python's or NumPy's, if it is an integer of at least 1.

    Raises:
        ValueError: If it is not; the message begins with the name.
    """
    is_integer = hasattr(value, "__index__") and not isinstance(value, (bool, Tensor))
    if not is_integer or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, not {value!r}.")

    return int(value)


def number_between(name: str, value: Any, least: float, most: float) -> float:
    """Returns the value if it is a number between two others.

    Raises:
        ValueError: If it is not; the message begins with the name.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not least <= value <= most:
        raise ValueError(f"{name} must be a number in [{least}, {most}], not {value!r}.")

    return value


def true_or_false(name: str, value: Any) -> bool:
    """Returns the value if it is a boolean.

    Raises:
        ValueError: If it is not; the message begins with the name.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, not {value!r}.")

    return value
