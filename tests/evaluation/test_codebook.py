"""Reconstruction and the codebook, by hand."""

import math

import pytest
import torch

from helpers.models import STACKS, make
from tarflow_hf import evaluation
from tarflow_hf.evaluation import codebook_state, cut_text, nearest_distances, reconstruction
from tarflow_hf.modeling import codebook as codebook_module
from tarflow_hf.modeling.codebook import Gaussians


def test_reconstruction_by_hand(monkeypatch):
    """Two entries 2 r scales apart are confused with probability Phi(-r).

    A third entry is far away.
    """
    model = make(STACKS["affine"], vocab_size=4, latent_size=1)
    model.codebook.mean.data[:, 0] = torch.tensor([0.0, 1.0, 50.0, 50.0])
    model.codebook.log_scale.data[:] = math.log(0.5)
    ids = torch.tensor([0, 1] * 10_000)
    result = reconstruction(model, cut_text(ids, 1000))
    assert (
        result.accuracy == pytest.approx(0.8413, abs=4 * result.standard_error)
        and result.num_tokens == 20_000
    )
    assert 0.001 < result.standard_error < 0.005
    assert (result.num_text_tokens, result.num_used_tokens) == (2, 2)
    whole = reconstruction(model, cut_text(ids[:100], 50))
    monkeypatch.setattr(codebook_module, "MAX_SCORES", 28)  # seven tokens at a time
    assert reconstruction(model, cut_text(ids[:100], 50)) == whole

    # Entries that have fallen together: only one of them ever comes back.
    fallen = reconstruction(model, cut_text(torch.tensor([2, 3] * 50), 10))
    assert (fallen.accuracy, fallen.num_text_tokens, fallen.num_used_tokens) == (0.5, 2, 1)

    # What fills a patch is no text.
    assert reconstruction(model, cut_text(torch.tensor([2, 2, 2]), 4, patch_size=4)).num_tokens == 3
    with pytest.raises(ValueError, match="no sequence"):
        reconstruction(model, [])


def test_nearest_distances(monkeypatch):
    torch.manual_seed(0)
    codebook = Gaussians(torch.randn(23, 3), torch.randn(23))
    expected = []

    for j in range(23):
        others = [k for k in range(23) if k != j]
        units = [(codebook.log_scale[j].exp() + codebook.log_scale[k].exp()) / 2 for k in others]
        away = [torch.linalg.norm(codebook.mean[j] - codebook.mean[k]) for k in others]
        expected.append(min(distance / unit for distance, unit in zip(away, units, strict=True)))

    for limit in (2**24, 50):
        monkeypatch.setattr(evaluation.codebook, "MAX_SCORES", limit)
        torch.testing.assert_close(nearest_distances(codebook), torch.stack(expected))

    state = codebook_state(codebook)
    assert state.nearest_distance_min == pytest.approx(min(expected).item())
    assert state.scale_min <= state.scale_mean <= state.scale_max and (
        state.num_entries,
        state.latent_size,
    ) == (23, 3)
    assert math.isnan(
        codebook_state(Gaussians(torch.zeros(1, 2), torch.zeros(1))).nearest_distance_min
    )
