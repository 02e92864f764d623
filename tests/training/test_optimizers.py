"""Muon against the singular value decomposition and torch's own; who gets it."""

import copy

import pytest
import torch
from torch import nn
from transformers import GPT2Config

from helpers.training import config
from tarflow_hf import TarFlowLMModel
from tarflow_hf.training import (
    MuonAdamW,
    TrainingConfig,
    discrete_baseline,
    make_optimizer,
    nearest_orthogonal,
)

MUON = TrainingConfig(optimizer="muon", learning_rate=0.01)


@pytest.mark.parametrize("shape", [(6, 6), (3, 8), (8, 3), (2, 5, 7), (1, 4)])
def test_nearest_orthogonal_has_the_singular_vectors(shape):
    """The directions are the matrix's; the singular values come near 1, however unequal before."""
    random = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    left, values, right = torch.linalg.svd(random, full_matrices=False)
    values = torch.linspace(2, 0.1, values.shape[-1], dtype=torch.float64)

    found = left.mT @ nearest_orthogonal(left * values @ right) @ right.mT
    diagonal = found.diagonal(dim1=-2, dim2=-1)
    assert diagonal.min() > 0.65 and diagonal.max() < 1.25
    torch.testing.assert_close(found, torch.diag_embed(diagonal), atol=1e-10, rtol=0)


def test_steps_are_those_of_torch():
    """Three steps are torch's Muon's up to its bfloat16, and torch's AdamW's exactly."""
    torch.manual_seed(0)
    start = [nn.Parameter(torch.randn(shape)) for shape in [(8, 8), (4, 8), (8, 8), (12, 4), (5,)]]
    expected = copy.deepcopy(start)

    adamw = torch.optim.AdamW([{"params": start[4:]}], lr=0.01, betas=(0.9, 0.95))
    ours = MuonAdamW({"params": start[:4], "weight_decay": 0.1}, adamw)
    theirs = [
        torch.optim.Muon(expected[:4], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(expected[4:], lr=0.01, betas=(0.9, 0.95)),
    ]
    for _ in range(3):
        for a, b in zip(start, expected, strict=True):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()

        for optimizer in (ours, *theirs):
            optimizer.step()

    for a, b in zip(start[:4], expected, strict=False):
        torch.testing.assert_close(a, b, atol=5e-4, rtol=0)

    assert torch.equal(start[4], expected[4])


def test_who_gets_muon():
    """Matrices of linear maps in the blocks; positions, embeddings, heads, the codebook do not."""
    model = TarFlowLMModel(
        config(block_config=GPT2Config(n_embd=16, n_head=2, n_positions=32, vocab_size=27))
    )
    for either in (model, discrete_baseline(model.config)):
        names = {id(parameter): name for name, parameter in either.named_parameters()}
        optimizer = make_optimizer(either, MUON)
        matrices, decayed, kept = (
            {names[id(parameter)] for parameter in group["params"]}
            for group in optimizer.param_groups
        )
        linear = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
        assert matrices == {name for name in names.values() if name.endswith(linear)}
        assert len(matrices) + len(decayed) + len(kept) == len(names)
        assert {group["lr"] for group in optimizer.param_groups} == {0.01}


def test_what_is_frozen_gets_no_optimiser():
    model = TarFlowLMModel(config())
    model.flow.layers[0].requires_grad_(False)
    frozen = {id(parameter) for parameter in model.flow.layers[0].parameters()}
    groups = make_optimizer(model, MUON).param_groups
    assert not frozen & {id(parameter) for group in groups for parameter in group["params"]}


def test_bad_input():
    with pytest.raises(ValueError, match="optimizer must be one of adamw, muon, not 'sgd'"):
        TrainingConfig(optimizer="sgd")
