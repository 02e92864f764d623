"""Likelihoods of every sequence of a small model, by quadrature."""

import itertools

import numpy as np
import torch


def enumerate_likelihoods(model, length, points=400, observed=None):
    """Returns log p(x) and the ELBO of all V^T sequences of a model with d = 1.

    Integrates by quadrature on a grid over all T latents. With `observed`, {position: token},
    returns them for all completions given these tokens, integrated over the latents of the others.
    """
    observed = observed or {}
    missing = [n for n in range(length) if n not in observed]
    ids = torch.tensor([observed.get(n, 0) for n in range(length)])
    mask = torch.tensor([n in observed for n in range(length)])

    def flow(values, **options):
        """Applies the stack to latents (or noise) of the missing tokens; returns theirs."""
        full = torch.zeros(len(values), length, 1, dtype=torch.float64)
        full[:, missing] = values

        if observed:
            options |= {
                "observed_ids": ids.expand(len(full), -1),
                "observed_mask": mask.expand(len(full), -1),
            }

        return model.flow(full, **options)

    mean, log_scale = model.codebook()
    corners = torch.cartesian_prod(*[torch.linspace(-7, 7, 9, dtype=torch.float64)] * len(missing))
    with torch.no_grad():  # where the prior or an encoder has mass
        prior_range = flow(corners.reshape(-1, len(missing), 1), reverse=True).latents

    low = min(prior_range.min().item(), (mean[:, 0] - 7 * log_scale.exp()).min().item())
    high = max(prior_range.max().item(), (mean[:, 0] + 7 * log_scale.exp()).max().item())
    nodes, weights = gauss_legendre(points, low, high)
    z = torch.cartesian_prod(*[nodes] * len(missing)).reshape(-1, len(missing), 1)
    log_weight = (
        torch.cartesian_prod(*[weights.log()] * len(missing)).reshape(-1, len(missing)).sum(-1)
    )

    with torch.no_grad():
        prior = torch.cat([flow(part, output_noise=False).log_prob for part in z.split(8192)])
        decoder = model.decode(z)
        encoder = model.codebook().log_prob_all(z)

    log_likelihood, elbo = {}, {}
    for x in itertools.product(range(model.config.vocab_size), repeat=len(missing)):
        index = torch.tensor(x).expand(len(z), len(missing))[..., None]
        likelihood = decoder.gather(-1, index).sum((1, 2))
        posterior = encoder.gather(-1, index).sum((1, 2))
        log_likelihood[x] = torch.logsumexp(log_weight + prior + likelihood, 0).item()
        elbo[x] = ((log_weight + posterior).exp() * (likelihood + prior - posterior)).sum().item()

    return log_likelihood, elbo


def gauss_legendre(points, low, high):
    """Returns nodes and weights of an integral from `low` to `high`."""
    nodes, weights = map(torch.from_numpy, np.polynomial.legendre.leggauss(points))
    return 0.5 * (high - low) * (nodes + 1) + low, 0.5 * (high - low) * weights
