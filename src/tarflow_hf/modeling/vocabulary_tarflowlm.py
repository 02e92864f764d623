"""A vocabulary that grows: means of a codebook that keep their distance, and rows of tables.

Shapes: V tokens, d latent size of a token, w hidden size, P patch size.
"""

import torch
from torch import Tensor, nn

# Two Gaussians this many standard deviations apart overlap by 1e-9.
MIN_SEPARATION = 12.0

ROWS = 2048  # of the matrix of all distances, at once
ROUNDS = 50


def closest_distance(means: Tensor) -> float:
    """The distance of the closest two of the means (V, d); infinity if there is one only."""
    return _nearest(means.detach().float()).min().item()


def draw_means(
    num_means: int, latent_size: int, spacing: float, generator: torch.Generator
) -> Tensor | None:
    """Draws means (V, d) from N(0, I), and those within `spacing` of another one again.

    Returns None if too many are too close, and drawing again does not help.
    """
    means = torch.randn(num_means, latent_size, generator=generator)
    new = (_nearest(means, spacing) < spacing).nonzero().flatten()
    num_drawn = num_means
    for _ in range(ROUNDS):
        if not len(new):
            return means
        if len(new) > max(0.9 * num_drawn, 0.01 * num_means):
            return None

        num_drawn = len(new)
        means[new] = torch.randn(num_drawn, latent_size, generator=generator)
        new = new[_is_close(means, new, spacing)]

    return None


def _nearest(means: Tensor, within: float | None = None) -> Tensor:
    """The distance (V,) of each mean to the nearest of those with a larger first coordinate.

    Those whose first coordinates differ by more than `within` are left out. Without it only the
    smallest of all the distances is right.
    """
    order = means[:, 0].argsort()
    means = means[order]
    distances = torch.full((len(means),), float("inf"), device=means.device)
    limit = float("inf") if within is None else within
    for first in range(0, len(means), ROWS):
        rows = means[first : first + ROWS]
        last = first + int((means[first:, 0] <= rows[-1, 0] + limit).sum())
        squares = _square_distances(rows, means[first:last])
        is_behind = torch.ones(len(rows), len(rows), dtype=torch.bool, device=means.device).tril()
        squares[:, : len(rows)].masked_fill_(is_behind, float("inf"))

        smallest, index = squares.min(-1)
        exact = (rows - means[first + index]).norm(dim=-1)
        distances[first : first + ROWS] = torch.where(smallest.isinf(), smallest, exact)
        if within is None:
            limit = min(limit, distances.min().item())

    return torch.empty_like(distances).index_copy_(0, order, distances)


@torch.no_grad()
def add_tokens(model: nn.Module, num_new: int) -> None:
    """Adds tokens to a model's vocabulary, in place: see `resize_token_embeddings`."""
    config = model.config
    flow = model.flow.layers[0]
    codebook = model.codebook
    head = flow.head
    vocab_size = config.vocab_size
    is_tied = config.tie_word_embeddings
    averages_all = config.posterior_top_k is None

    codebook.mean, codebook.log_scale = _codebook_with(num_new, codebook)
    if flow.embedding is not None:
        flow.embedding = _with_rows(flow.embedding, num_new, vocab_size)

    for layer in model.flow.layers:
        if (observed := layer.observed_embedding) is not None:
            table = observed.embedding
            table.weight = _with_rows(table.weight, num_new, vocab_size)
            table.num_embeddings, observed.vocab_size = len(table.weight), vocab_size + num_new

    if config.flows[0].get("tie_codebook"):
        # Flows above would see their input move by the new tokens' share, so that is made small.
        shift = 0.0 if len(config.flows) == 1 else -12.0
        head.projection.weight = _with_rows(head.projection.weight, num_new, vocab_size)
        if head.projection.bias is not None:
            head.projection.bias = _with_rows(head.projection.bias, num_new, vocab_size, shift)
        if head.patch_decoder is not None and head.patch_decoder.embedding is not None:
            table = head.patch_decoder.embedding
            head.patch_decoder.embedding = _with_rows(table, num_new, vocab_size)

        head.num_components = head.projection.num_components = vocab_size + num_new
        if is_tied:
            head.projection.weight = flow.embedding

    # The number of the first flow's components follows from it; codebooks of the others' own stay.
    num_components = [layer.get("num_components") for layer in config.flows]
    config.vocab_size = model.flow.vocab_size = vocab_size + num_new
    for layer, number in zip(config.flows, num_components, strict=True):
        if layer.get("tie_codebook") is False:
            layer["num_components"] = number

    if averages_all:
        config.posterior_top_k = vocab_size + num_new  # however many


def _codebook_with(num_new: int, codebook: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    """The codebook's parameters with new entries, far from all others."""
    mean, log_scale = codebook.mean, codebook.log_scale
    new_log_scale = log_scale.mean().expand(num_new)
    spacing = MIN_SEPARATION * log_scale.max().exp().item()
    new_mean = _means_far_away(mean, num_new, spacing)

    return (
        _parameter(torch.cat([mean, new_mean]), mean),
        _parameter(torch.cat([log_scale, new_log_scale]), log_scale),
    )


def _means_far_away(means: Tensor, num_new: int, spacing: float) -> Tensor:
    """New means (n, d), each at least `spacing` from all others.

    They are drawn from a normal distribution that widens until there is room.
    """
    known = means.detach().float().cpu()
    num_all = len(known) + num_new
    deviation = known.square().mean().sqrt().clamp_min(1e-3)
    while len(known) < num_all:
        drawn = deviation * torch.randn(num_all - len(known), known.shape[1])
        together = torch.cat([known, drawn])
        is_close = _is_close(together, torch.arange(len(known), len(together)), spacing)
        known = torch.cat([known, drawn[~is_close]])
        deviation = 1.1 * deviation

    return known[len(means) :].to(means)


def _with_rows(table: nn.Parameter, num_new: int, vocab_size: int, shift: float = 0.0):
    """A table (n V, ...) of one or more groups of V rows, each with new rows: the mean of its old.

    `shift` is added to the new rows.
    """
    groups = table.unflatten(0, (-1, vocab_size))  # (n, V, ...)
    mean = groups.float().mean(1, keepdim=True).to(table.dtype) + shift
    new = mean.expand(-1, num_new, *mean.shape[2:])
    return _parameter(torch.cat([groups, new], 1).flatten(0, 1), table)


def _parameter(value: Tensor, like: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(value.contiguous(), requires_grad=like.requires_grad)


def _is_close(means: Tensor, index: Tensor, spacing: float) -> Tensor:
    """True for each of the means at the (sorted) index that has another within the spacing.

    If both of a pair are at the index, only the later one counts.
    """
    is_other = torch.ones(len(means), dtype=torch.bool)
    is_other[index] = False
    others = means[is_other]
    found = []
    for rows in index.split(ROWS):
        mine = means[rows]
        is_close = torch.zeros(len(rows), dtype=torch.bool)
        if len(others):
            is_close |= (_square_distances(mine, others) < spacing**2).any(-1)

        earlier = index[index <= rows[-1]]
        is_near = _square_distances(mine, means[earlier]) < spacing**2
        is_later = earlier.unsqueeze(0) < rows.unsqueeze(-1)
        found.append(is_close | (is_near & is_later).any(-1))

    return torch.cat(found)


def _square_distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances (n, m), from a matrix product: up to its rounding, 1e-6 of |a|^2 + |b|^2."""
    squares_of_a, squares_of_b = a.square().sum(-1, True), b.square().sum(-1, True)
    left = torch.cat([-2 * a, squares_of_a, torch.ones_like(squares_of_a)], 1)
    right = torch.cat([b, torch.ones_like(squares_of_b), squares_of_b], 1)
    return left @ right.T
