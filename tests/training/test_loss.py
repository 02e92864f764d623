"""The loss, its noise and its masks."""

import pytest
import torch
from transformers import set_seed

from helpers.training import config
from tarflow_hf import TarFlowLMModel
from tarflow_hf.training import RowNoise, compute_loss, draw_observed_mask, draw_step


def test_loss_is_nats_per_token():
    set_seed(0)
    model = TarFlowLMModel(config())
    input_ids = torch.randint(27, (4, 16))
    generator = torch.Generator().manual_seed(1)
    loss = compute_loss(model, input_ids, draw_step(model, (4, 16), generator))
    elbo = model(input_ids, generator=generator.manual_seed(1)).elbo
    torch.testing.assert_close(loss, -elbo.sum() / 64)
    others = draw_step(model, (4, 16), generator)
    assert not torch.equal(loss, compute_loss(model, input_ids, others))


def test_loss_of_a_conditional_model_is_nats_per_missing_token():
    """The step's generator draws the observed tokens anew, before the latents."""
    model = TarFlowLMModel(config(conditional=True, patch_size=2))
    input_ids = torch.randint(27, (8, 16))
    draws = draw_step(model, (8, 16), torch.Generator().manual_seed(3))
    loss = compute_loss(model, input_ids, draws)
    generator = torch.Generator().manual_seed(3)
    mask = draw_observed_mask((8, 16), 2, generator)
    assert 0 < mask.sum() < 8 * 16
    expected = -model(input_ids, observed_mask=mask, generator=generator).elbo.sum() / (~mask).sum()
    torch.testing.assert_close(loss, expected)
    others = draw_step(model, (8, 16), torch.Generator().manual_seed(4))
    assert not torch.equal(loss, compute_loss(model, input_ids, others))
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_sequence_draws_noise_of_its_own():
    """Halves of a step's four sequences draw the latents and masks of the whole."""
    model = TarFlowLMModel(config())
    input_ids = torch.randint(27, (4, 16))
    whole = RowNoise(1, 4, 0, torch.device("cpu"))
    loss = compute_loss(model, input_ids, draw_step(model, (4, 16), whole.at(7, 0)))
    noise = torch.stack([torch.randn(16, 2, generator=generator) for generator in whole.at(7, 0)])
    expected = model(input_ids, latents=model.encode(input_ids, noise=noise), labels=input_ids).loss
    torch.testing.assert_close(loss, expected)
    parts = RowNoise(1, 2, 0, torch.device("cpu"))

    other_process = RowNoise(1, 2, 2, torch.device("cpu"))
    for second in (lambda: parts.at(7, 2), lambda: other_process.at(7, 0)):
        halves = (
            compute_loss(model, input_ids[:2], draw_step(model, (2, 16), parts.at(7, 0))),
            compute_loss(model, input_ids[2:], draw_step(model, (2, 16), second())),
        )
        torch.testing.assert_close(sum(halves) / 2, loss)
        mask = draw_observed_mask((4, 16), 2, whole.at(7, 0))
        assert torch.equal(mask[2:], draw_observed_mask((2, 16), 2, second()))

    others = draw_step(model, (4, 16), whole.at(8, 0))
    assert not torch.equal(loss, compute_loss(model, input_ids, others))


@pytest.mark.parametrize("patch_size", [1, 4])
def test_observed_masks_are_of_three_kinds(patch_size):
    mask = draw_observed_mask((6000, 32 * patch_size), patch_size, torch.Generator().manual_seed(0))
    patches = mask.unflatten(1, (32, patch_size))
    assert torch.equal(patches.all(-1), patches.any(-1)) and not mask.all(-1).any()
    observed = patches.all(-1)
    length = observed.sum(-1)
    is_prefix = (observed == (torch.arange(32) < length[:, None])).all(-1)

    # A third is nothing, a third a prefix of any length alike; spans are a third, and few of them
    # look like the others.
    is_nothing = length == 0
    for kind in (is_nothing, is_prefix & ~is_nothing, ~is_prefix):
        assert 0.25 < kind.float().mean() < 0.45

    counts = torch.bincount(length[is_prefix & ~is_nothing], minlength=32)[1:]
    assert counts.min() > 0.5 * counts.float().mean()
    spans = observed[~is_prefix]
    assert (spans.float().mean(0) - 0.5).abs().max() < 0.06  # wherever it is
    num_spans = (spans.diff(dim=-1) != 0).sum(-1)
    assert num_spans.min() <= 2 and num_spans.max() >= 16
    assert not draw_observed_mask(
        (5, patch_size), patch_size
    ).any()  # one position is never observed
