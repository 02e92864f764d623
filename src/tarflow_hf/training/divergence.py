"""The first thing that a step computes and that is not finite."""

from collections.abc import Mapping
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..baseline import flows_of


class FirstFault:
    """Records on the device, in every step, what is not finite, without a synchronisation.

    `check` looks at the notes.

    A step computes the latents, the output of one flow after the other, and the loss; then the
    gradients of the flows, from the last one back, and of the codebook (of a discrete model: the
    loss, then the gradients). Everything behind a fault is not finite either, and after the
    optimiser's step nor are the weights: only the first one tells.

    Call `see_loss` for each part of a step, `see_gradients` behind the last part's backward pass,
    then `end_step`.
    """

    def __init__(self, model: PreTrainedModel, accelerator: Accelerator):
        self.accelerator = accelerator
        layers = dict(enumerate(flows_of(model), 1))
        trained: dict[str, nn.Module] = {
            f"flow {number}": layers[number] for number in reversed(layers)
        }
        trained |= {"the codebook": model.codebook} if layers else {"the model": model}
        self.trained = list(trained.values())  # sharding will replace their parameters
        self.names = (
            ["the latents", *(f"the output of flow {number}" for number in layers)]
            if layers
            else []
        )
        self.num_outputs = len(self.names)
        self.names += ["the loss", *(f"the gradient of {name}" for name in trained)]
        self.is_finite = torch.ones(
            len(self.names), dtype=torch.bool, device=accelerator.device
        )  # in this step
        self.none = torch.iinfo(torch.int64).max
        self.fault = torch.full(
            (), self.none, device=accelerator.device
        )  # step times number of names, plus index
        self.hooks = [
            layer.register_forward_hook(partial(self._see, number))
            for number, layer in layers.items()
        ]

    def _see(
        self, number: int, layer: nn.Module, arguments: tuple, output: Tensor | tuple[Tensor, ...]
    ) -> None:
        if torch.is_grad_enabled():  # a step, and no evaluation
            if number == 1:
                self._note(0, arguments[0])
            self._note(number, *(output if isinstance(output, tuple) else (output,)))

    def _note(self, index: int, *tensors: Tensor) -> None:
        for x in tensors:
            self.is_finite[index].logical_and_(x.detach().isfinite().all())

    def see_loss(self, loss: Tensor) -> None:
        self._note(self.num_outputs, loss)

    def see_gradients(self) -> None:
        """Before they are clipped, which makes NaN of all of them where one is."""
        if self.accelerator.scaler is not None:
            return  # in fp16 gradients may overflow: such a step is not taken, and their scale is lowered

        for index, module in enumerate(self.trained, self.num_outputs + 1):
            gradients = [p.grad for p in module.parameters() if p.grad is not None]
            if gradients:
                norm = nn.utils.get_total_norm(gradients)
                self._note(index, norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def end_step(self, step: int) -> None:
        fault = step * len(self.names) + self.is_finite.int().argmin()  # the first that is False
        self.fault = torch.minimum(self.fault, torch.where(self.is_finite.all(), self.none, fault))
        self.is_finite.fill_(True)

    def check(self, batches: Mapping[int, str]) -> None:
        """Waits for the device. `batches` says, of each step since the last check, what was in it.

        Raises:
            FloatingPointError: There was a fault, in any process; it is raised in all of them.
        """
        fault = self.accelerator.gather(self.fault).min().item()
        if fault != self.none:
            step, index = divmod(fault, len(self.names))
            raise FloatingPointError(
                f"At step {step}, {self.names[index]} is the first thing that is not finite. The step's batch: "
                f"{batches[step]}. Checkpoints made before it are intact."
            )

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()
