"""`torch.export`: one graph for every length, and every size of a batch."""

import pytest
import torch
from torch import nn

from helpers.models import PATCH_STACKS, STACKS, make

MOST = 18  # tokens

EXPORTED = {
    "one of each, many tokens": (STACKS["one of each"], {"vocab_size": 1500}),
    "mix-d, mix-1, mix-1, conditional": (STACKS["mix-d, mix-1, mix-1"], {"conditional": True}),
    "patches": (PATCH_STACKS["mix-d, patch head"], {"patch_size": 2}),
}


class Bound(nn.Module):
    """The evidence lower bound (B,) of padded sequences."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask, noise):
        return self.model(ids, mask, latent_noise=noise).elbo


def batch(model, rows, length):
    patch_size = model.config.patch_size
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(model.config.vocab_size, (rows, length), generator=generator)
    noise = torch.randn(rows, length, 2, generator=generator)
    mask = torch.ones_like(ids)
    mask[0, max(patch_size, length // 2 // patch_size * patch_size) :] = 0
    return ids, mask, noise


@pytest.mark.parametrize("name", EXPORTED)
@torch.no_grad()
def test_one_graph_for_every_length_and_batch(name):
    flows, options = EXPORTED[name]
    model = make(flows, **options)
    patch_size = model.config.patch_size
    positions = torch.export.Dim("positions", min=2, max=MOST // patch_size)
    shape = {
        0: torch.export.Dim("rows", min=1, max=64),
        1: positions * patch_size if patch_size > 1 else positions,
    }
    program = torch.export.export(
        Bound(model), batch(model, 3, 8), dynamic_shapes=(shape, shape, shape)
    ).module()

    for rows, length in ((3, 8), (5, 2 * patch_size), (2, 10), (7, MOST)):
        ids, mask, noise = batch(model, rows, length)
        expected = model(ids, mask, latent_noise=noise).elbo
        torch.testing.assert_close(program(ids, mask, noise), expected, rtol=1e-9, atol=1e-9)
