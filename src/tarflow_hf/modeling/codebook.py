"""The codebook: q(z | x) and p(x | z), the bridge between tokens and latents."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks_tarflowlm import check_generator
from .coupling import mixture_rosenblatt_log_prob
from .coupling_product import log_total, nearest, product_of
from .normal import LOG_SQRT_2PI

MIN_WEIGHT = 2.0**-40
MAX_SCORES = 2**24  # latents by entries of the codebook that are scored at once


class Gaussians(NamedTuple):
    """K isotropic Gaussians N(mean_k, exp(log_scale_k)^2 I), as encoder and decoder use them."""

    mean: Tensor  # (K, d)
    log_scale: Tensor  # (K,)

    def sample(
        self, index: Tensor, generator: torch.Generator | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """Reparametrised samples of the index-th Gaussians.

        Args:
            index: Which Gaussian, (...).
            generator: Draws the noise, if given.
            noise: N(0, I) noise (..., d) to use instead of drawing any.

        Returns:
            Samples (..., d).

        Raises:
            ValueError: If the generator is none.
        """
        check_generator(generator)
        loc = F.embedding(index, self.mean)
        if noise is None and generator is None:
            # torch.compile takes this at any length. It does not take `generator`, even if None.
            noise = torch.randn_like(loc)
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
        is_exported = torch.compiler.is_exporting()  # for any number of latents
        if not is_exported and latents[..., 0].numel() * self.mean.numel() <= 2**16:
            # A step of generation: the number of calls is what takes time.
            square = (latents.unsqueeze(-2) - self.mean).square().sum(-1)
        else:
            square = 0.0
            for i in range(self.mean.shape[1]):  # (..., K) at a time, never (..., K, d)
                square = square + (latents[..., i, None] - self.mean[:, i]).square()

        log_normalizer = self.mean.shape[1] * (self.log_scale + LOG_SQRT_2PI)
        return -0.5 * square * inverse_scale * inverse_scale - log_normalizer

    def log_total(self, latents: Tensor) -> Tensor:
        """log sum_k N_k(z): latents (..., d) to (...), streamed over k."""
        num_components = len(self.mean)
        flat = latents.reshape(-1, latents.shape[-1])
        product = product_of(flat, self.mean, self.log_scale)
        if product is not None:
            total = log_total(product, flat, self.mean, self.log_scale)
            return total.reshape(latents.shape[:-1])

        uniform = latents.new_zeros(()).expand(*latents.shape[:-1], num_components)
        log_mean = mixture_rosenblatt_log_prob(latents, uniform, self.mean, self.log_scale)

        return log_mean + math.log(num_components)

    @torch.no_grad()
    def most_likely(self, latents: Tensor, count: int) -> Tensor:
        """The `count` k of the largest log N_k(z), in this order: (..., d) to (..., count)."""
        flat = latents.reshape(-1, latents.shape[-1])
        product = product_of(flat, self.mean, self.log_scale)
        if product is not None:
            index = nearest(flat, product, count)
        else:
            index = self._most_likely(flat, count)

        return index.reshape(*latents.shape[:-1], count)

    def _most_likely(self, latents: Tensor, count: int) -> Tensor:
        """`most_likely` of latents (n, d), in parts that bound the memory."""
        rows = max(1, MAX_SCORES // len(self.mean))
        if len(latents) > rows:
            parts = latents.split(rows)
            return torch.cat([self._most_likely(part, count) for part in parts])

        log_prob = self.log_prob_all(latents)
        if count == 1:  # faster, and of equals it is the first
            return log_prob.argmax(-1, keepdim=True)

        return log_prob.topk(count).indices

    def most_likely_token(self, latents: Tensor) -> Tensor:
        """argmax_k p(x = k | z) of latents z: (..., d) to (...)."""
        return self.most_likely(latents, 1).squeeze(-1)

    def posterior_average(self, latents: Tensor, table: Tensor, top_k: int | None = None) -> Tensor:
        """sum_p sum_k p(k | z_p) table_(p, k), the expected row of each patch.

        Args:
            latents: Latents of patches, (..., P, d).
            table: Rows for each latent of a patch and each k, (P K, w).
            top_k: Sums over only the `top_k` most likely k of each latent, with their
                probabilities renormalised. On a CPU those below `MIN_WEIGHT` in all latents are
                left out: less than `top_k` MIN_WEIGHT of the average, and of its gradient.

        Returns:
            Averages (..., w).
        """
        num_components = len(self.mean)
        if top_k is None or top_k >= num_components:
            return torch.softmax(self.log_prob_all(latents), -1).flatten(-2).to(table.dtype) @ table

        patches = latents.reshape(-1, *latents.shape[-2:])  # (n, P, d)
        patch_size = patches.shape[1]

        index = self.most_likely(patches, top_k)  # (n, P, top_k)
        weights = torch.softmax(self.log_prob(patches.unsqueeze(-2), index), -1)
        if patches.device.type == "cpu" and not torch.compiler.is_compiling():
            # Mostly a single one has any weight.
            counts = (weights.detach() > MIN_WEIGHT).sum(-1)
            count = max(1, int(counts.max())) if counts.numel() else 1
            index, weights = index[..., :count], weights[..., :count]

        weights = weights.to(table.dtype)
        index = index + num_components * torch.arange(patch_size, device=index.device).unsqueeze(-1)
        average = F.embedding_bag(
            index.flatten(1), table, per_sample_weights=weights.flatten(1), mode="sum"
        )

        return average.reshape(*latents.shape[:-2], table.shape[-1])


class Codebook(nn.Module):
    """The parameters of `Gaussians`, one Gaussian for each entry.

    In the encoder's codebook an entry is a token, and q(z | x = k) is the k-th Gaussian. The
    decoder follows by Bayes' rule under a uniform prior: p(x = k | z) = N_k(z) / sum_j N_j(z).
    Hence log p(x | z) - log q(z | x) = -log sum_j N_j(z), for every x.

    The parameters are read only by calling the module, so that hooks (offloading, sharding) see
    every use. It returns tensors in float32 or better.
    """

    def __init__(self, num_entries: int, latent_size: int):
        super().__init__()
        self.mean = nn.Parameter(torch.randn(num_entries, latent_size))
        self.log_scale = nn.Parameter(torch.zeros(num_entries))

    @property
    def weight(self) -> nn.Parameter:
        """The means, (V, d), by the name of a token table's weight."""
        return self.mean

    def forward(self) -> Gaussians:
        dtype = torch.promote_types(self.mean.dtype, torch.float32)
        return Gaussians(self.mean.to(dtype), self.log_scale.to(dtype))
