"""The codebook: the bridge between tokens and latents, q(z | x) and p(x | z)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .coupling import mixture_rosenblatt_log_prob
from .normal import LOG_SQRT_2PI


class Codebook(nn.Module):
    """A Gaussian N(mean_k, exp(log_scale_k)^2 I) for each of K entries; one entry per token in the encoder's codebook.

    As encoder, q(z | x = k) is the k-th Gaussian. The decoder follows by Bayes' rule under a uniform prior:
    p(x = k | z) = N_k(z) / sum_j N_j(z). Hence log p(x | z) - log q(z | x) = -log sum_j N_j(z), whatever x is.

    Calling the module returns `mean` (K, d) and `log_scale` (K,) in float32 or better.
    """

    def __init__(self, num_entries: int, latent_size: int):
        super().__init__()
        self.mean = nn.Parameter(torch.randn(num_entries, latent_size))
        self.log_scale = nn.Parameter(torch.zeros(num_entries))

    def forward(self) -> tuple[Tensor, Tensor]:
        # Everything below reads the parameters through here, so that hooks (offloading, sharding) see every use.
        dtype = torch.promote_types(self.mean.dtype, torch.float32)
        return self.mean.to(dtype), self.log_scale.to(dtype)

    def sample(
        self, input_ids: Tensor, generator: torch.Generator | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """A reparametrised sample of q(z | x), ids (...) to latents (..., d), of the given N(0, I) noise if any."""
        mean, log_scale = self()
        loc = F.embedding(input_ids, mean)
        if noise is None:
            device = mean.device if generator is None else generator.device
            noise = torch.randn(loc.shape, generator=generator, dtype=loc.dtype, device=device)
        return loc + log_scale[input_ids].exp().unsqueeze(-1) * noise.to(loc.device)

    def log_prob(self, latents: Tensor, input_ids: Tensor) -> Tensor:
        """log q(z | x) in nats, (...), of latents (..., d) and entries (...)."""
        mean, log_scale = self()
        log_scale = log_scale[input_ids]
        t = (latents - F.embedding(input_ids, mean)) * torch.exp(-log_scale).unsqueeze(-1)
        return -0.5 * t.square().sum(-1) - latents.shape[-1] * (log_scale + LOG_SQRT_2PI)

    def log_prob_all(self, latents: Tensor) -> Tensor:
        """log N_k(z) for every entry k: latents (..., d) to (..., K)."""
        mean, log_scale = self()
        square = 0.0
        for i in range(mean.shape[1]):  # (..., K) at a time, never (..., K, d)
            square = square + ((latents[..., i, None] - mean[:, i]) * torch.exp(-log_scale)).square()
        return -0.5 * square - mean.shape[1] * (log_scale + LOG_SQRT_2PI)

    def log_total(self, latents: Tensor) -> Tensor:
        """log sum_k N_k(z): latents (..., d) to (...), streamed over the entries."""
        mean, log_scale = self()
        uniform = latents.new_zeros(()).expand(*latents.shape[:-1], len(mean))
        return mixture_rosenblatt_log_prob(latents, uniform, mean, log_scale) + math.log(len(mean))

    def posterior_average(self, latents: Tensor, table: Tensor, top_k: int | None = None) -> Tensor:
        """sum_k p(k | z) table_k: latents (..., d) and a table (K, w) to (..., w).

        With `top_k` the sum runs over the top_k most likely entries of each latent, their probabilities renormalised.
        """
        if top_k is None or top_k >= len(table):
            return torch.softmax(self.log_prob_all(latents), -1).to(table.dtype) @ table
        flat = latents.reshape(-1, latents.shape[-1])
        with torch.no_grad():
            rows = max(1, 2**24 // len(table))
            entries = [self.log_prob_all(chunk).topk(top_k).indices for chunk in flat.split(rows)]
        entries = torch.cat(entries)  # (n, top_k)
        log_prob = self.log_prob(flat.unsqueeze(1), entries)
        weights = torch.softmax(log_prob, -1).to(table.dtype)
        average = F.embedding_bag(entries, table, per_sample_weights=weights, mode="sum")
        return average.reshape(*latents.shape[:-1], table.shape[-1])
