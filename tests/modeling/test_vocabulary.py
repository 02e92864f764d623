"""A vocabulary that grows, and means that keep their distance."""

import pytest
import torch

from helpers.causal_lms import TIED, VOCABULARY, tiny_causal_lm
from helpers.checkpoints import MIX_1, MIX_D, WITHIN_PATCH, flow, make
from tarflow_hf import TarFlowLMModel
from tarflow_hf.conversion import from_causal_lm, next_token_log_probs, to_causal_lm
from tarflow_hf.modeling.vocabulary_tarflowlm import closest_distance, draw_means

pytestmark = pytest.mark.usefixtures("one_thread")

PATCH_HEAD = {**MIX_D, "patch_head_layers": 1}
STACKS = {
    "converted": lambda: from_causal_lm(tiny_causal_lm("llama")),
    "converted, tied": lambda: from_causal_lm(tiny_causal_lm("gemma", **TIED)),
    "converted, with bias": lambda: from_causal_lm(tiny_causal_lm("phi")),
    "converted, bfloat16": lambda: from_causal_lm(tiny_causal_lm("llama", torch.bfloat16)),
    "converted, conditional": lambda: from_causal_lm(tiny_causal_lm("llama"), conditional=True),
    "mix-d": lambda: make(flows=[MIX_D]),
    "mix-d, mix-1": lambda: make(flows=[MIX_D, MIX_1]),
    "own codebooks": lambda: make(flows=[MIX_D, flow("mixture_rosenblatt", "right_to_left")]),
    "affine": lambda: make(flows=[flow("affine")]),
    "patches": lambda: make(flows=[PATCH_HEAD, flow("mixture_cdf", WITHIN_PATCH)], patch_size=2),
    "conditional": lambda: make(flows=[MIX_D, MIX_1], conditional=True),
}


def share_of_new(model, latents, num_old):
    """The log-probability (B, T) of a token being an old one, where one flow is all there is."""
    layer, codebook = model.flow.layers[0], model.codebook()
    context = layer.context(layer.inputs(latents, codebook))
    (weight, bias), *_ = layer.head.projection()
    logits = torch.nn.functional.linear(context, weight, bias).float().log_softmax(-1)
    return logits[..., :num_old].logsumexp(-1)


@pytest.mark.parametrize("stack", STACKS)
@torch.no_grad()
def test_old_tokens_keep_their_likelihood(stack, tmp_path):
    model = STACKS[stack]()
    vocab_size = model.config.vocab_size
    ids = torch.randint(vocab_size, (2, 8), generator=torch.Generator().manual_seed(0))
    latents = model.encode(ids)
    before = model(ids, latents=latents).elbo
    dtypes = {name: weight.dtype for name, weight in model.named_parameters()}

    assert model.resize_token_embeddings(vocab_size + 3) is model.codebook
    assert model.config.vocab_size == len(model.codebook.mean) == vocab_size + 3
    assert {name: weight.dtype for name, weight in model.named_parameters()} == dtypes

    after = model(ids, latents=latents).elbo
    is_alone = len(model.config.flows) == 1 and "affine" not in stack
    share = share_of_new(model, latents, vocab_size).sum(-1) if is_alone else 0.0
    assert is_alone or "affine" in stack or not torch.equal(after, before)
    torch.testing.assert_close(after, before + share, rtol=0, atol=1e-3)

    new = torch.full_like(ids, vocab_size + 2)
    assert model(new).elbo.isfinite().all()
    assert torch.equal(model.decode(model.encode(new)).argmax(-1), new)

    model.save_pretrained(tmp_path)
    loaded = TarFlowLMModel.from_pretrained(tmp_path)
    assert loaded.num_parameters() == model.num_parameters()
    assert torch.equal(loaded(ids, latents=latents).elbo, after)


@torch.no_grad()
def test_a_model_with_new_tokens_goes_back_to_a_causal_lm():
    model = from_causal_lm(tiny_causal_lm("llama", **TIED))
    model.resize_token_embeddings(VOCABULARY + 1, pad_to_multiple_of=8)
    back = to_causal_lm(model)
    assert back.config.vocab_size == VOCABULARY + 8
    ids = torch.tensor([[1, VOCABULARY + 1, 5, 3]])
    torch.testing.assert_close(
        back(ids).logits[:, :-1].log_softmax(-1),
        next_token_log_probs(model, ids[:, 1:]),
        rtol=0,
        atol=1e-4,
    )


def test_new_tokens_are_trained():
    model = from_causal_lm(tiny_causal_lm("llama", **TIED))
    model.resize_token_embeddings(VOCABULARY + 2)
    ids = torch.tensor([[VOCABULARY, VOCABULARY + 1] * 4])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(10):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    assert losses[-1] < 0.5 * losses[0]
    layer = model.flow.layers[0]
    assert layer.embedding is layer.head.projection.weight


def test_a_vocabulary_does_not_shrink():
    model = make(flows=[MIX_D])
    assert model.resize_token_embeddings() is model.codebook and model.config.vocab_size == 27
    with pytest.raises(ValueError, match="27 tokens and cannot shrink to 20"):
        model.resize_token_embeddings(20)
    with pytest.raises(ValueError, match="mean_resizing"):
        model.resize_token_embeddings(30, mean_resizing=False)


def test_means_keep_their_distance():
    generator = torch.Generator().manual_seed(0)
    assert closest_distance(torch.randn(3000, 4, generator=generator)) < 0.1
    means = draw_means(3000, 4, 0.1, generator)
    distances = torch.cdist(means.double(), means.double()).fill_diagonal_(torch.inf)
    assert closest_distance(means) == pytest.approx(distances.min().item(), rel=1e-5) and (
        distances.min() >= 0.1
    )
    assert draw_means(3000, 1, 0.1, generator) is None
    assert closest_distance(means[:1]) == torch.inf
