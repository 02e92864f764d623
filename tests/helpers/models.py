"""Small models in float64, and the stacks of flows that the tests run through."""

import torch

from tarflow_hf import TarFlowLMConfig, TarFlowLMModel
from tarflow_hf.modeling.mixture_cdf_head import AutoregressiveMixtureCDFHead


def flow(coupling, direction="left_to_right", **options):
    return {"coupling": coupling, "direction": direction, "num_hidden_layers": 1, **options}


# Every stack inherits every test.
STACKS = {
    "affine": [flow("affine")],
    "affine, right to left": [flow("affine", "right_to_left")],
    "mix-1": [flow("mixture_cdf", num_components=3)],
    "mix-1, independent dimensions": [flow("mixture_cdf", num_components=3, autoregressive=False)],
    "mix-1, right to left, posterior": [flow("mixture_cdf", "right_to_left", context="posterior")],
    "mix-d": [flow("mixture_rosenblatt")],
    "mix-d, latent": [flow("mixture_rosenblatt", context="latent")],
    "mix-d, own codebook": [
        flow("mixture_rosenblatt", "right_to_left", tie_codebook=False, num_components=3)
    ],
    "affine, right to left within a patch": [flow("affine", "right_to_left_within_patch")],
    "mix-d, mix-1 right to left within a patch": [
        flow("mixture_rosenblatt"),
        flow("mixture_cdf", "right_to_left_within_patch", num_components=2),
    ],
    "mix-d, mix-1, mix-1": [
        flow("mixture_rosenblatt"),
        flow("mixture_cdf", "right_to_left", num_components=2),
        flow("mixture_cdf", "left_to_right", num_components=3),
    ],
    "one of each": [
        flow("affine", "right_to_left"),
        flow("mixture_rosenblatt", "left_to_right", tie_codebook=False, num_components=4),
        flow("mixture_cdf", "right_to_left", num_components=2),
    ],
}


def make(flows, patch_size=1, latent_size=2, vocab_size=5, seed=0, noise=0.1, **options):
    """A small model in float64 in which every parameter matters.

    Its flows are not steeper than trained ones.
    """
    torch.manual_seed(seed)
    config = TarFlowLMConfig(
        vocab_size=vocab_size,
        latent_size=latent_size,
        patch_size=patch_size,
        hidden_size=16,
        num_attention_heads=2,
        flows=flows,
        **{"max_position_embeddings": 18, **options},
    )
    model = TarFlowLMModel(config).double().eval()

    with torch.no_grad():
        for module in model.modules():
            # Its hidden units begin large, for a last layer that begins small.
            if isinstance(module, AutoregressiveMixtureCDFHead):
                for weight in (
                    module.from_context.weight,
                    module.features_weight,
                    module.from_features,
                ):
                    weight.mul_(0.1)

        for parameter in model.parameters():
            parameter.add_(noise * torch.randn_like(parameter))

    return model


# Those that need several tokens to a patch.
PATCH_STACKS = {
    "mix-d, patch head": [flow("mixture_rosenblatt", patch_head_layers=1)],
    "mix-d, patch head, latent": [
        flow("mixture_rosenblatt", context="latent", patch_head_layers=2)
    ],
    "mix-1, mix-d with patch head": [
        flow("mixture_cdf", num_components=2),
        flow(
            "mixture_rosenblatt",
            "right_to_left_within_patch",
            num_components=3,
            patch_head_layers=1,
        ),
    ],
}

# Stacks that continue a prompt exactly.
CAUSAL = {
    "left to right": [
        flow("mixture_rosenblatt"),
        flow("mixture_cdf", num_components=2),
        flow("affine"),
    ],
    "right to left within patches": [
        flow("mixture_rosenblatt"),
        flow("mixture_cdf", "right_to_left_within_patch", num_components=2),
        flow("affine", "right_to_left_within_patch"),
    ],
}


def separated(flows, **options):
    """A model with a separated codebook: encoding and decoding a text gives it back."""
    model = make(flows, **{"vocab_size": 27, "max_position_embeddings": 32, **options}).float()
    with torch.no_grad():
        model.codebook.log_scale.fill_(-7.0)
    return model
