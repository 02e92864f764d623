"""The stages of a run: what is trained, for how long, and with which optimiser."""

from dataclasses import dataclass

import torch
from transformers import (
    PreTrainedModel,
)

from ..modeling.modeling_tarflowlm import TarFlowLMModel
from .checkpointing import Progress
from .config import TrainingConfig


@dataclass(frozen=True)
class Stage:
    """A part of a run, with a warm-up and a schedule of its own: the stack cut after `num_flows`
    flows is trained.

    All of it, or its last flow alone (in the first stage with the codebook), while those before it
    are frozen. Cut there, the stack is a model of its own: `model(..., num_flows=num_flows)` scores
    it.
    """

    name: str
    num_flows: int | None  # None: all; also of a discrete model
    num_steps: int  # at most: `patience` may end it earlier
    learning_rate: float
    is_joint: bool

    def choose_parameters(self, model: PreTrainedModel) -> None:
        """Marks what is trained, and sets the modes: what is frozen drops nothing out and
        recomputes nothing.
        """
        if self.is_joint or self.num_flows is None:
            model.requires_grad_(True).train()
            return

        model.requires_grad_(False).eval()
        model.flow.layers[self.num_flows - 1].requires_grad_(True).train()
        if self.num_flows == 1:
            model.codebook.requires_grad_(True).train()


def make_stages(model: PreTrainedModel, config: TrainingConfig) -> list[Stage]:
    """The stages of a run.

    Raises:
        ValueError: A discrete model has no flows to train one by one, or there is not one value for
            each stage.

    Example:
        >>> from tarflow_hf import TarFlowLMConfig
        >>> model = TarFlowLMModel(TarFlowLMConfig(
        ...     vocab_size=3, latent_size=1, hidden_size=8, num_attention_heads=1,
        ...     flows=[{"coupling": "affine", "direction": "left_to_right", "num_hidden_layers": 1}] * 2))
        >>> config = TrainingConfig(mode="progressive_then_joint", stage_steps=[400, 100, 50])
        >>> [(stage.name, stage.num_flows, stage.num_steps) for stage in make_stages(model, config)]
        [('flow 1', 1, 400), ('flow 2', 2, 100), ('joint', 2, 50)]
    """
    is_flow = isinstance(model, TarFlowLMModel)
    num_flows = len(model.config.flows) if is_flow else None
    if config.mode != "joint" and not is_flow:
        raise ValueError(f"mode must be joint, not {config.mode}: a discrete model has no flows.")

    cuts: list[int | None] = (
        [] if config.mode == "joint" else list(range(1, len(model.config.flows) + 1))
    )
    names = [f"flow {cut}" for cut in cuts] + ["joint"] * (config.mode != "progressive")
    cuts = cuts + [num_flows] * (config.mode != "progressive")

    steps, rates = config.stage_steps, config.stage_learning_rates
    if steps is None:
        share, rest = divmod(config.num_steps, len(names))
        if share == 0:
            raise ValueError(
                f"num_steps {config.num_steps} is less than one for each of {len(names)} stages."
            )

        steps = [share + (index < rest) for index in range(len(names))]

    rates = [config.learning_rate] * len(names) if rates is None else rates
    for name, values in (("stage_steps", steps), ("stage_learning_rates", rates)):
        if len(values) != len(names):
            raise ValueError(
                f"{name} must have one value for each stage ({', '.join(names)}), not {values!r}."
            )

    is_joint = [name == "joint" for name in names]
    return [Stage(*stage) for stage in zip(names, cuts, steps, rates, is_joint, strict=True)]


def make_optimizer(
    model: PreTrainedModel, config: TrainingConfig, learning_rate: float | None = None
) -> torch.optim.Optimizer:
    """AdamW of what is trained; weight decay pulls on matrices, but not on the codebook, whose size
    means something.
    """
    decayed, kept = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_matrix = parameter.ndim >= 2 and not name.endswith("bias")
            (decayed if is_matrix and "codebook" not in name else kept).append(parameter)

    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    learning_rate = config.learning_rate if learning_rate is None else learning_rate

    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, config.adam_beta2))


def is_stage_over(progress: Progress, stage: Stage, config: TrainingConfig) -> bool:
    """Whether its budget is used up, or validation has stopped improving."""
    return progress.stage_step >= stage.num_steps or 0 < config.patience <= progress.stale
