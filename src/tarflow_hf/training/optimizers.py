"""The optimisers: AdamW, or Muon for the matrices of the blocks and AdamW for all else."""

from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..modeling.modeling_tarflowlm import TarFlowLMModel
from .config import TrainingConfig

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic of Newton-Schulz, chosen by Jordan
NUM_ITERATIONS = 5
MUON_MOMENTUM = 0.95
ADAMW_RMS = 0.2  # the root mean square of AdamW's updates, on average


def make_optimizer(
    model: PreTrainedModel, config: TrainingConfig, learning_rate: float | None = None
) -> torch.optim.Optimizer:
    """The optimiser `config.optimizer` of the parameters that are trained.

    Weight decay pulls on matrices. It spares the codebook, whose size means something.

    Args:
        learning_rate: In place of `config.learning_rate`.
    """
    in_blocks = {id(matrix) for matrix in _block_matrices(model)}
    matrices, decayed, kept = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue

        is_matrix = parameter.ndim >= 2 and not name.endswith("bias")
        if config.optimizer == "muon" and id(parameter) in in_blocks:
            matrices.append(parameter)
        elif is_matrix and "codebook" not in name:
            decayed.append(parameter)
        else:
            kept.append(parameter)

    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    learning_rate = config.learning_rate if learning_rate is None else learning_rate
    adamw = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, config.adam_beta2))
    if not matrices:
        return adamw

    return MuonAdamW({"params": matrices, "weight_decay": config.weight_decay}, adamw)


def _block_matrices(model: PreTrainedModel) -> Iterator[nn.Parameter]:
    """The matrices of the linear maps in the blocks: no embeddings, no heads, no codebook."""
    for part in model.modules():
        if not isinstance(part, PreTrainedModel) or isinstance(part, TarFlowLMModel):
            continue

        head = part.get_output_embeddings()
        for module in part.modules():
            if module is not head and not isinstance(module, nn.Embedding):
                own = module.parameters(recurse=False)
                yield from (parameter for parameter in own if parameter.ndim == 2)


class MuonAdamW(torch.optim.Optimizer):
    """Muon for one group of matrices, AdamW for the other groups; one state, one schedule.

    Muon adds up a matrix's gradients as momentum does, and takes in place of the sum M = U S V^T
    about the nearest matrix with orthonormal rows or columns, U V^T: every direction counts alike
    (K. Jordan and others, "Muon", 2024). It is found by five steps of Newton and Schulz, of which
    each maps the singular values by a x + b x^3 + c x^5. The update is scaled to the root mean
    square of AdamW's, so that both take the same learning rate (J. Liu and others, "Muon is
    scalable for LLM training", 2025).

    `torch.optim.Muon` takes matrices only, one after the other, and in bfloat16, which is slow on a
    CPU without instructions for it. Here matrices of one shape are one product, in bfloat16 on a
    GPU only.

    Args:
        matrices: A group of `torch.optim`, of parameters (m, n).
        adamw: The optimiser of the others, not used yet. Its learning rate holds for all.
    """

    def __init__(self, matrices: dict, adamw: torch.optim.AdamW):
        super().__init__([matrices, *adamw.param_groups], {"lr": adamw.defaults["lr"]})
        self._share()

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        """Gives the groups and the state, which loading replaces, to AdamW."""
        self._adamw = torch.optim.AdamW(self.param_groups[1:])
        self._adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        by_shape = defaultdict(list)
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                by_shape[parameter.shape, parameter.device].append(parameter)

        for parameters in by_shape.values():
            self._step_of_one_shape(parameters)

        self._adamw.step()
        return loss

    def _step_of_one_shape(self, parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)

        group = self.param_groups[0]
        gradients = [parameter.grad for parameter in parameters]
        momenta = [self.state[parameter]["momentum"] for parameter in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - MUON_MOMENTUM)

        ahead = torch._foreach_lerp(gradients, momenta, MUON_MOMENTUM)  # Nesterov's
        updates = nearest_orthogonal(torch.stack(ahead))
        rate = group["lr"] * ADAMW_RMS * max(parameters[0].shape) ** 0.5

        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, updates.unbind(), alpha=-rate)


def nearest_orthogonal(matrices: Tensor) -> Tensor:
    """About U V^T of each matrix U S V^T: singular values from 0.7 to 1.2 in place of S.

    Args:
        matrices: (..., m, n). On a GPU the products are in bfloat16, which is precise enough.

    Returns:
        (..., m, n), of the same dtype.

    Example:
        >>> import torch
        >>> x = torch.tensor([[3.0, 0.0], [0.0, -0.5]])
        >>> nearest_orthogonal(x).round(decimals=1)
        tensor([[ 0.7000,  0.0000],
                [ 0.0000, -1.0000]])
    """
    x = matrices.to(torch.bfloat16) if matrices.is_cuda else matrices
    is_tall = x.shape[-2] > x.shape[-1]
    if is_tall:
        x = x.mT

    # The largest singular value is at most 1.
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(NUM_ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x

    return (x.mT if is_tall else x).to(matrices.dtype)
