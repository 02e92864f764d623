"""Small models in float32 that are saved, published and loaded again."""

from pathlib import Path

import torch

import tarflow_hf
from helpers.models import flow
from tarflow_hf import TarFlowLMConfig, TarFlowLMModel

SOURCE = Path(tarflow_hf.__file__).parents[1]

# The specification stays at home: no model calls it.
CODE = {
    path.name: path
    for path in (SOURCE / "tarflow_hf" / "modeling").glob("*.py")
    if path.name not in ("__init__.py", "coupling_naive.py")
}

SAVED = {"config.json", "generation_config.json", "model.safetensors"} | set(CODE)
MIX_D, MIX_1 = flow("mixture_rosenblatt"), flow("mixture_cdf", "right_to_left", num_components=2)
WITHIN_PATCH = "right_to_left_within_patch"


def make(seed=0, **options):
    """A small model whose every parameter matters."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 27, "latent_size": 2, "max_position_embeddings": 16}
    model = TarFlowLMModel(
        TarFlowLMConfig(**{**sizes, "hidden_size": 16, "num_attention_heads": 2, **options})
    ).eval()

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))

    return model


def observe(model):
    """Returns the bound at given latents and the tokens of given noise.

    Every copy of a model must reproduce both.
    """
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(model.config.vocab_size, (2, 8), generator=generator)
    latents, noise = torch.randn(2, 2, 8, model.config.latent_size, generator=generator)

    with torch.no_grad():
        return {
            "elbo": model(input_ids, latents=latents).elbo,
            "tokens": model.generate(noise=noise),
        }


def assert_same_output(model, expected):
    actual = model if isinstance(model, dict) else observe(model)
    torch.testing.assert_close(actual["elbo"], expected["elbo"], rtol=1e-5, atol=1e-5)
    assert torch.equal(actual["tokens"], expected["tokens"])


def assert_same_state(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name
