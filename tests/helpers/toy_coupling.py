"""A coupling from outside the package: the sinh-arcsinh transformation, element by element.

    u = sinh(exp(s) arcsinh(h) - m),   log|du/dh| = s + log cosh(exp(s) arcsinh(h) - m) - log sqrt(1 + h^2)

m and s are a linear map of the decoder's output, and s stays within `max_log_tail`.

Reference: Jones & Pewsey, *Sinh-arcsinh distributions*, Biometrika 96(4), 2009.
"""

import torch
from torch import nn
from transformers import initialization as init

from tarflow_hf.modeling.coupling_head import CouplingHead
from tarflow_hf.modeling.coupling_heads import COUPLING_HEADS


class SinhArcsinhHead(CouplingHead):
    title = "sinh-arcsinh"
    options = {"max_log_tail": 0.5}

    def __init__(self, config, flow):
        super().__init__()
        self.max_log_tail = flow["max_log_tail"]
        size = config.patch_size * config.latent_size
        self.weight = nn.Parameter(torch.empty(2 * size, config.hidden_size))

    @classmethod
    def complete(cls, flow, index, config):
        super().complete(flow, index, config)
        if flow["max_log_tail"] <= 0:
            raise ValueError(
                f"flows[{index}].max_log_tail must be positive, not {flow['max_log_tail']}."
            )

    def init_weights(self, std):
        init.normal_(self.weight, std=std)

    def _loc_and_tail(self, context):
        loc, raw = nn.functional.linear(context, self.weight).chunk(2, -1)
        return loc, torch.exp(self.max_log_tail * torch.tanh(raw))

    def transform(self, h, context, codebook):
        loc, tail = self._loc_and_tail(context)
        argument = tail * torch.asinh(h) - loc
        log_det = tail.log() + argument.cosh().log() - 0.5 * torch.log1p(h * h)
        return argument.sinh(), log_det.sum(-1)

    def inverse(self, u, context, codebook):
        loc, tail = self._loc_and_tail(context)
        return torch.sinh((torch.asinh(u) + loc) / tail)

    @classmethod
    def paper_flops(cls, flow, width, latent_size, patch_size):
        return 2 * width * 2 * patch_size * latent_size


COUPLING_HEADS["sinh_arcsinh"] = SinhArcsinhHead
