"""The affine coupling, `u = (h - m) exp(-s)`: m and s are a linear map of the decoder's output."""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers import initialization as init

from .codebook import Gaussians
from .coupling import affine, affine_inverse
from .coupling_head import CouplingHead, bounded
from .normal import normal_log_prob


class AffineHead(CouplingHead):
    title = "affine"
    is_smooth = True

    def __init__(self, config: PreTrainedConfig, flow: dict[str, Any]):
        super().__init__()
        self.projection = nn.Linear(config.hidden_size, 2 * config.patch_size * config.latent_size)

    def start_as_identity(self) -> None:
        init.zeros_(self.projection.weight)
        init.zeros_(self.projection.bias)

    def transform(self, h: Tensor, context: Tensor, codebook: Gaussians | None):
        u, log_det = affine(h, *self._loc_and_log_scale(context))
        return u, log_det.sum(-1)

    def inverse(self, u: Tensor, context: Tensor, codebook: Gaussians | None) -> Tensor:
        return affine_inverse(u, *self._loc_and_log_scale(context))

    def log_prob(self, h: Tensor, context: Tensor, codebook: Gaussians | None) -> Tensor:
        u, log_det = affine(h, *self._loc_and_log_scale(context))
        return (log_det + normal_log_prob(u)).sum(-1)

    def _loc_and_log_scale(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """The locations m and log scales s, both (B, N, D)."""
        loc, log_scale = self.projection(context).chunk(2, -1)
        return loc, bounded(log_scale)

    @classmethod
    def paper_flops(
        cls, flow: dict[str, Any], width: int, latent_size: int, patch_size: int
    ) -> int:
        return 2 * width * 2 * patch_size * latent_size
