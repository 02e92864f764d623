"""Makes tests/fixtures/VERSION: a tiny checkpoint of this version, and its results.

    PYTHONPATH=src python tests/helpers/make_fixture.py

All later versions must load it and give the same results: `test_checkpoints_of_earlier_releases`
loads every fixture. Run this once per release, and never again for that release.
"""

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

import tarflow_hf
from tarflow_hf import TarFlowLMConfig, TarFlowLMModel
from tarflow_hf.data import character_tokenizer

TEXT = "how vexingly quick daft zebras jump"  # an odd number of characters: the last one is cut off


def make_model() -> TarFlowLMModel:
    """A model with every coupling, direction, context and head, and no parameter at its start."""
    config = TarFlowLMConfig(
        vocab_size=27,
        latent_size=2,
        patch_size=2,
        max_position_embeddings=64,
        hidden_size=8,
        num_attention_heads=2,
        conditional=True,
        posterior_top_k=3,
        flows=[
            {
                "coupling": "mixture_rosenblatt",
                "direction": "left_to_right",
                "num_hidden_layers": 1,
                "patch_head_layers": 1,
            },
            {
                "coupling": "mixture_cdf",
                "direction": "right_to_left",
                "num_hidden_layers": 1,
                "num_components": 3,
                "head_hidden_size": 8,
            },
            {
                "coupling": "mixture_cdf",
                "direction": "right_to_left_within_patch",
                "num_hidden_layers": 1,
                "num_components": 2,
                "autoregressive": False,
            },
            {
                "coupling": "mixture_rosenblatt",
                "direction": "left_to_right",
                "num_hidden_layers": 1,
                "num_components": 4,
            },
            {"coupling": "affine", "direction": "right_to_left", "num_hidden_layers": 1},
        ],
    )
    torch.manual_seed(0)
    model = TarFlowLMModel(config).eval()

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))

    return model


@torch.no_grad()
def main():
    model, tokenizer = make_model(), character_tokenizer()
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    ids = ids[:, : ids.shape[1] // 2 * 2]
    noise = torch.randn(1, ids.shape[1], 2)
    observed = (torch.arange(ids.shape[1]) // 4 % 2)[None]
    folder = Path(__file__).parents[1] / "fixtures" / tarflow_hf.__version__
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for code in folder.glob("*.py"):
        code.unlink()  # the version under test brings its own

    expected = {
        "input_ids": ids,
        "noise": noise,
        "elbo": model(ids, latent_noise=noise).elbo,
        "observed_mask": observed,
        "conditional_elbo": model(ids, latent_noise=noise, observed_mask=observed).elbo,
        "tokens": model.generate(noise=noise),
    }
    save_file(expected, folder / "expected.safetensors")
    (folder / "text.txt").write_text(TEXT)


if __name__ == "__main__":
    main()
