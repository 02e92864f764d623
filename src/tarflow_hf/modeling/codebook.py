"""The codebook: the bridge between tokens and latents, q(z | x) and p(x | z)."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .coupling import mixture_rosenblatt_log_prob
from .normal import LOG_SQRT_2PI


class Gaussians(NamedTuple):
    """K isotropic Gaussians N(mean_k, exp(log_scale_k)^2 I), and what encoder and decoder ask of
    them.
    """

    mean: Tensor  # (K, d)
    log_scale: Tensor  # (K,)

    def sample(
        self, index: Tensor, generator: torch.Generator | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """A reparametrised sample of the index-th Gaussian, (...) to (..., d), of the given N(0, I)
        noise if any.
        """
        loc = F.embedding(index, self.mean)
        if noise is None and generator is None:
            noise = torch.randn_like(
                loc
            )  # which torch.compile takes at any length; not so a generator, even if None
        elif noise is None:
            noise = torch.randn(
                loc.shape, generator=generator, dtype=loc.dtype, device=generator.device
            )

        return loc + self.log_scale[index].exp().unsqueeze(-1) * noise.to(loc.device)

    def log_prob(self, latents: Tensor, index: Tensor) -> Tensor:
        """log N_k(z) in nats, (...), of latents (..., d) and indices k (...)."""
        log_scale = self.log_scale[index]
        t = (latents - F.embedding(index, self.mean)) * torch.exp(-log_scale).unsqueeze(-1)
        return -0.5 * t.square().sum(-1) - latents.shape[-1] * (log_scale + LOG_SQRT_2PI)

    def log_prob_all(self, latents: Tensor) -> Tensor:
        """log N_k(z) for every k: latents (..., d) to (..., K)."""
        inverse_scale = torch.exp(-self.log_scale)
        if (
            latents[..., 0].numel() * self.mean.numel() <= 2**16
        ):  # a step of generation: as few calls as can be
            square = (latents.unsqueeze(-2) - self.mean).square().sum(-1)
        else:
            square = 0.0
            for i in range(self.mean.shape[1]):  # (..., K) at a time, never (..., K, d)
                square = square + (latents[..., i, None] - self.mean[:, i]).square()

        return -0.5 * square * inverse_scale * inverse_scale - self.mean.shape[1] * (
            self.log_scale + LOG_SQRT_2PI
        )

    def log_total(self, latents: Tensor) -> Tensor:
        """log sum_k N_k(z): latents (..., d) to (...), streamed over k."""
        num_components = len(self.mean)
        uniform = latents.new_zeros(()).expand(*latents.shape[:-1], num_components)
        return mixture_rosenblatt_log_prob(latents, uniform, self.mean, self.log_scale) + math.log(
            num_components
        )

    def posterior_average(self, latents: Tensor, table: Tensor, top_k: int | None = None) -> Tensor:
        """sum_p sum_k p(k | z_p) table_(p, k): latents of patches (..., P, d) and tables (P K, w)
        to (..., w).

        With `top_k` the sum runs over the top_k most likely k of each latent, their probabilities
        renormalised.
        """
        num_components = len(self.mean)
        if top_k is None or top_k >= num_components:
            return torch.softmax(self.log_prob_all(latents), -1).flatten(-2).to(table.dtype) @ table

        patches = latents.reshape(-1, *latents.shape[-2:])  # (n, P, d)
        patch_size = patches.shape[1]

        with torch.no_grad():
            rows = max(1, 2**24 // len(table))
            index = torch.cat(
                [self.log_prob_all(chunk).topk(top_k).indices for chunk in patches.split(rows)]
            )  # (n, P, top_k)

        weights = torch.softmax(self.log_prob(patches.unsqueeze(-2), index), -1).to(table.dtype)
        index = index + num_components * torch.arange(patch_size, device=index.device).unsqueeze(-1)
        average = F.embedding_bag(
            index.flatten(1), table, per_sample_weights=weights.flatten(1), mode="sum"
        )

        return average.reshape(*latents.shape[:-2], table.shape[-1])


class Codebook(nn.Module):
    """The parameters of `Gaussians`, one for each entry; in the encoder's codebook one entry per
    token.

    As encoder, q(z | x = k) is the k-th Gaussian. The decoder follows by Bayes' rule under a
    uniform prior: p(x = k | z) = N_k(z) / sum_j N_j(z). Hence log p(x | z) - log q(z | x) = -log
    sum_j N_j(z), whatever x is.

    The parameters are read by calling the module, here and nowhere else, so that hooks (offloading,
    sharding) see every use; what it returns are tensors, in float32 or better.
    """

    def __init__(self, num_entries: int, latent_size: int):
        super().__init__()
        self.mean = nn.Parameter(torch.randn(num_entries, latent_size))
        self.log_scale = nn.Parameter(torch.zeros(num_entries))

    def forward(self) -> Gaussians:
        dtype = torch.promote_types(self.mean.dtype, torch.float32)
        return Gaussians(self.mean.to(dtype), self.log_scale.to(dtype))
