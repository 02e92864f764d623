"""The stages of a run: what is trained, for how long, and at which rate."""

from dataclasses import dataclass

from transformers import PreTrainedModel

from ..baseline import flows_of
from ..modeling.configuration_tarflowlm import TarFlowLMConfig
from .adapters import frozen_parameters
from .config import TrainingConfig

SLOW_VOCABULARY = 500  # tokens, from which flows above a Mix-d flow take most of a step


@dataclass(frozen=True)
class Stage:
    """A part of a run, with a warm-up and a schedule of its own, that trains the first flows.

    It trains them all, or the last of them (in the first stage with the codebook) while those
    before it are frozen. The stack cut there is a model of its own: `model(...,
    num_flows=num_flows)` scores it.

    Attributes:
        num_flows: The number of flows in the cut stack; None for a discrete model.
        num_steps: The most optimiser steps; `patience` may end the stage earlier.
        learning_rate: The peak of its schedule.
        is_joint: True if all parameters are trained.
        frozen: The names of parameters that are not trained in any stage: `frozen_parameters`.
    """

    name: str
    num_flows: int | None
    num_steps: int
    learning_rate: float
    is_joint: bool
    frozen: frozenset[str] = frozenset()

    def choose_parameters(self, model: PreTrainedModel) -> None:
        """Marks what is trained, and sets the modes.

        Frozen flows are in evaluation mode: they drop nothing out and recompute nothing.
        """
        if self.is_joint or self.num_flows is None:
            model.requires_grad_(True).train()
        else:
            model.requires_grad_(False).eval()
            model.flow.layers[self.num_flows - 1].requires_grad_(True).train()
            if self.num_flows == 1:
                model.codebook.requires_grad_(True).train()

        for name, parameter in model.named_parameters():
            if name in self.frozen:
                parameter.requires_grad_(False)


def make_stages(model: PreTrainedModel, config: TrainingConfig) -> list[Stage]:
    """The stages of a run: each flow on its own, all of them jointly, or one after the other.

    Raises:
        ValueError: If a discrete model, which has no flows, is to be trained flow by flow, if the
            stack has fewer than `first_flow`, or if there is not one value for each stage.

    Example:
        >>> from tarflow_hf import TarFlowLMConfig, TarFlowLMModel
        >>> model = TarFlowLMModel(TarFlowLMConfig(
        ...     vocab_size=3, latent_size=1, hidden_size=8, num_attention_heads=1,
        ...     flows=[{"coupling": "affine", "direction": "left_to_right", "num_hidden_layers": 1}] * 2))
        >>> config = TrainingConfig(mode="progressive_then_joint", stage_steps=[400, 100, 50])
        >>> [(stage.name, stage.num_flows, stage.num_steps) for stage in make_stages(model, config)]
        [('flow 1', 1, 400), ('flow 2', 2, 100), ('joint', 2, 50)]
    """
    num_flows = len(flows_of(model))
    if config.mode != "joint" and not num_flows:
        raise ValueError(f"mode must be joint, not {config.mode}: a discrete model has no flows.")
    if num_flows and config.first_flow > num_flows:
        raise ValueError(f"first_flow is {config.first_flow}, but the stack has {num_flows} flows.")

    cuts: dict[str, int | None] = {}  # the number of flows by the name of the stage
    if config.mode != "joint":
        cuts |= {f"flow {cut}": cut for cut in range(config.first_flow, num_flows + 1)}
    if config.mode != "progressive":
        cuts["joint"] = num_flows or None

    steps = config.stage_steps
    if steps is None:
        steps = _share_evenly(config.num_steps, len(cuts))

    rates = config.stage_learning_rates
    if rates is None:
        rates = [config.learning_rate] * len(cuts)

    for name, values in (("stage_steps", steps), ("stage_learning_rates", rates)):
        if len(values) != len(cuts):
            raise ValueError(
                f"{name} must have one value for each stage ({', '.join(cuts)}), not {values!r}."
            )

    frozen = frozen_parameters(model, config)
    return [
        Stage(name, cut, num_steps, rate, name == "joint", frozen)
        for (name, cut), num_steps, rate in zip(cuts.items(), steps, rates, strict=True)
    ]


def slow_vocabulary(config: TarFlowLMConfig) -> str | None:
    """A warning of a stack whose first flow has to transform at a large vocabulary; else None.

    A Mix-d flow with the codebook's components gives its density at the cost of one matrix product.
    Its transform, which flows above it need, takes every component in every dimension.
    """
    first, *above = config.flows
    is_mix_d = first["coupling"] == "mixture_rosenblatt"
    if not (is_mix_d and above and config.vocab_size >= SLOW_VOCABULARY):
        return None

    return (
        f"This will be slow: with {config.vocab_size:,} tokens, the {len(above)} flows above the first take most of "
        "each step, sample and score: the first flow must then compute its transform, not only its density. A stack "
        "of one flow is much faster: --recipe demo_one_flow, or one flow in the file of --config. --test_samples 1 and "
        "a smaller --test_sequences shorten the closing table."
    )


def _share_evenly(num_steps: int, num_stages: int) -> list[int]:
    """The steps of each stage; the first ones take the rest."""
    share, rest = divmod(num_steps, num_stages)
    if share == 0:
        raise ValueError(f"num_steps {num_steps} is less than one for each of {num_stages} stages.")

    return [share + (index < rest) for index in range(num_stages)]
