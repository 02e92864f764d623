"""Checkpoints of earlier releases give the results of their day.

`helpers/make_fixture.py` adds one for each release.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

import tarflow_hf
from helpers.make_fixture import make_model
from tarflow_hf import TarFlowLMModel

FIXTURES = sorted(path for path in (Path(__file__).parent / "fixtures").iterdir() if path.is_dir())


@pytest.mark.parametrize("folder", FIXTURES, ids=lambda folder: folder.name)
def test_checkpoints_of_earlier_releases(folder):
    try:
        model = TarFlowLMModel.from_pretrained(folder).eval()
    except Exception as error:
        pytest.fail(
            f"Checkpoints of {folder.name} do not load any more: keep their names, or translate them. {error}"
        )

    expected = load_file(folder / "expected.safetensors")
    ids, noise, tokens = expected["input_ids"], expected["noise"], expected["tokens"]

    tokenized = AutoTokenizer.from_pretrained(folder)((folder / "text.txt").read_text()).input_ids
    assert tokenized[: ids.shape[1]] == ids[0].tolist()

    with torch.no_grad():
        elbo = model(ids, latent_noise=noise).elbo
        conditional_elbo = model(
            ids, latent_noise=noise, observed_mask=expected["observed_mask"]
        ).elbo

    torch.testing.assert_close(elbo, expected["elbo"], rtol=1e-4, atol=0)
    torch.testing.assert_close(conditional_elbo, expected["conditional_elbo"], rtol=1e-4, atol=0)
    assert torch.equal(model.generate(noise=noise), tokens) and len(tokens.unique()) > 3


def test_this_release_has_one():
    assert tarflow_hf.__version__ in {folder.name for folder in FIXTURES}


def test_a_checkpoint_that_is_read_otherwise_would_be_noticed():
    """The recorded likelihood depends on every weight."""
    expected = load_file(FIXTURES[0] / "expected.safetensors")
    model = make_model()
    arguments = {"latent_noise": expected["noise"], "observed_mask": expected["observed_mask"]}
    model(expected["input_ids"], **arguments).elbo.sum().backward()
    untouched = [
        name
        for name, parameter in model.named_parameters()
        if not (parameter.grad is not None and parameter.grad.any())
    ]
    assert untouched == []
