"""Arguments of another shape or kind are errors of the project's own, and never taken for something else."""

import pytest
import torch

from tarflow_hf import TarFlowLMConfig, TarFlowLMModel
from tarflow_hf.watermark import NoiseWatermark

FLOW = {"coupling": "mixture_rosenblatt", "direction": "left_to_right", "num_hidden_layers": 1}
IDS = torch.tensor([[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]])


def make(**changes) -> TarFlowLMModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "latent_size": 2, "hidden_size": 16, "num_attention_heads": 2}
    config = TarFlowLMConfig(**sizes, max_position_embeddings=16, flows=[FLOW], **changes)
    return TarFlowLMModel(config).eval()


def masks(*shape: int) -> torch.Tensor:
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[..., :2] = True
    return mask


KNOWN = torch.zeros(2, 6, 2)
OF_KNOWN = [
    (KNOWN[:, :5], masks(2, 6), r"known must have shape \(2, 6, 2\), not \(2, 5, 2\)"),
    (KNOWN[..., :1], masks(2, 6), r"known must have shape \(2, 6, 2\), not \(2, 6, 1\)"),
    (KNOWN[:1], masks(2, 6), r"known must have shape \(2, 6, 2\), not \(1, 6, 2\)"),
    (KNOWN.tolist(), masks(2, 6), "known must be a tensor, not list"),
    (KNOWN, masks(1, 6), r"known_mask must have shape \(2, 6\), not \(1, 6\)"),
    (KNOWN, masks(2, 5), r"known_mask must have shape \(2, 6\), not \(2, 5\)"),
    (KNOWN, 0.5 * masks(2, 6), "known_mask must be boolean, or 0 and 1"),
]


@pytest.mark.parametrize("method", ["parallel", "sequential"])
@pytest.mark.parametrize(("known", "mask", "message"), OF_KNOWN)
@torch.no_grad()
def test_known_latents_of_another_shape(known, mask, message, method):
    noise = torch.randn(2, 6, 2)
    with pytest.raises(ValueError, match=message):
        make().flow(noise, reverse=True, known=known, known_mask=mask, inverse_method=method)


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        (torch.zeros(3), r"noise must have shape \(2, 6, 2\), not \(3,\)"),
        (torch.zeros(1, 1, 2), r"noise must have shape \(2, 6, 2\), not \(1, 1, 2\)"),
        ([0.0], "noise must be a tensor, not list"),
    ],
)
def test_noise_of_latents_of_another_shape(noise, message):
    with pytest.raises(ValueError, match=message):
        make().encode(IDS, noise=noise)


@torch.no_grad()
def test_observed_ids_of_any_integer_type():
    model, latents = make(conditional=True), torch.randn(2, 6, 2)
    expected = model.flow(latents, observed_ids=IDS, observed_mask=masks(2, 6)).noise
    for dtype in (torch.uint8, torch.int8, torch.int32):
        found = model.flow(latents, observed_ids=IDS.to(dtype), observed_mask=masks(2, 6)).noise
        assert torch.equal(found, expected)

    for ids, message in (
        (IDS.float(), "observed_ids must be token ids, integers, not torch.float32"),
        (IDS.tolist(), "observed_ids must be a tensor, not list"),
        (None, "observed_ids must be a tensor, not NoneType"),
    ):
        with pytest.raises(ValueError, match=message):
            model.flow(latents, observed_ids=ids, observed_mask=masks(2, 6))


@pytest.mark.parametrize("reverse", [False, True])
def test_a_batch_of_nothing(reverse):
    with pytest.raises(ValueError, match=r"must not be empty: \(0, 6, 2\)"):
        make().flow(torch.zeros(0, 6, 2), reverse=reverse)


@pytest.mark.parametrize("num_samples", [0, 1.5, "3", True])
def test_numbers_of_samples(num_samples):
    with pytest.raises(ValueError, match="num_samples must be an integer of at least 1"):
        make().importance_weighted_bound(IDS, num_samples=num_samples)


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (lambda ids, scores: None, "must be a tensor, not NoneType"),
        (lambda ids, scores: scores[:, :3], r"of the shape \(2, 11\) .* not \(2, 3\)"),
        (lambda ids, scores: scores[:, :1], r"of the shape \(2, 11\) .* not \(2, 1\)"),
    ],
)
def test_what_a_logits_processor_returns(processor, message):
    with pytest.raises(ValueError, match=message):
        make().generate(IDS, max_new_tokens=3, logits_processor=[processor])


@pytest.mark.parametrize(
    "options",
    [{"forced_eos_token_id": 99}, {"prefix_allowed_tokens_fn": lambda row, ids: [99]}],
    ids=lambda options: next(iter(options)),
)
def test_a_token_that_does_not_exist(options):
    with pytest.raises(ValueError, match=r"names a token outside 0, \.\.\., 10"):
        make().generate(IDS, max_new_tokens=3, **options)


def test_a_watermark_is_an_object():
    with pytest.raises(
        TypeError, match=r"must be a tarflow_hf.watermark.NoiseWatermark, not <class"
    ):
        make().generate(IDS, max_new_tokens=3, watermark=NoiseWatermark)
