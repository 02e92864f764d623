"""A coupling that is registered from outside the package works everywhere.

`tests/helpers/toy_coupling.py` is the file that docs/new_coupling.md shows: one class and one line.
"""

import runpy

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers import ROOT
from helpers.models import flow, make
from helpers.training import TEXT, run
from tarflow_hf import TarFlowLMConfig, TarFlowLMModel
from tarflow_hf.data import PackedTokens, character_tokenizer
from tarflow_hf.evaluation import likelihood
from tarflow_hf.evaluation.flops import count_flops
from tarflow_hf.hub import model_card
from tarflow_hf.modeling.coupling_heads import COUPLING_HEADS

TOY = ROOT / "tests" / "helpers" / "toy_coupling.py"
NAME = "sinh_arcsinh"

STACKS = {
    "alone": [flow(NAME)],
    "right to left": [flow(NAME, "right_to_left", max_log_tail=1.0)],
    "in a stack": [flow("mixture_rosenblatt"), flow(NAME), flow("affine")],
    "both ways": [flow(NAME), flow(NAME, "right_to_left"), flow("mixture_cdf", num_components=2)],
}


@pytest.fixture(autouse=True)
def registered():
    """Runs the file, whose last line adds to the table, and takes the line out again."""
    runpy.run_path(str(TOY))
    yield
    del COUPLING_HEADS[NAME]


def one_flow(**options):
    sizes = {"vocab_size": 5, "latent_size": 2, "hidden_size": 16, "num_attention_heads": 2}
    return TarFlowLMConfig(**sizes, flows=[flow(NAME, **options)])


def test_toy_coupling_in_a_configuration(tmp_path):
    config = one_flow()
    assert config.flows == [flow(NAME, max_log_tail=0.5, context="latent")]

    config.save_pretrained(tmp_path)
    assert TarFlowLMConfig.from_pretrained(tmp_path).flows == config.flows


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_log_tail": 0}, r"flows\[0\].max_log_tail must be positive, not 0"),
        ({"num_components": 3}, r"unknown options \['num_components'\]: a flow of sinh_arcsinh"),
    ],
    ids=str,
)
def test_toy_coupling_refuses_what_it_cannot_take(options, message):
    with pytest.raises(ValueError, match=message):
        one_flow(**options)


def test_toy_coupling_is_unknown_before_it_is_registered():
    head = COUPLING_HEADS.pop(NAME)
    try:
        with pytest.raises(ValueError, match="coupling must be one of affine, mixture_cdf"):
            one_flow()
    finally:
        COUPLING_HEADS[NAME] = head


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("stack", STACKS)
def test_toy_coupling_has_the_likelihood_of_its_jacobian(stack, patch_size):
    """log_det against autodiff, and the telescoped log p(z) against the sum of the log_dets."""
    model = make(STACKS[stack], patch_size)
    z = model.encode(torch.randint(5, (1, 4)))

    def noise(flat):
        return model.flow(flat.reshape(z.shape)).noise.flatten()

    jacobian = torch.autograd.functional.jacobian(noise, z.flatten())
    flow_output = model.flow(z)
    expected = torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(flow_output.log_det[0], expected, atol=1e-6, rtol=0)

    cheap = model.flow(z, output_noise=False)
    torch.testing.assert_close(cheap.log_prob, flow_output.log_prob, atol=1e-9, rtol=0)


@pytest.mark.parametrize("stack", STACKS)
def test_toy_coupling_inverts(stack):
    model = make(STACKS[stack])
    u = torch.randn(3, 6, 2, dtype=torch.float64)
    z = model.flow(u, reverse=True).latents
    torch.testing.assert_close(model.flow(z).noise, u, atol=1e-8, rtol=1e-8)


def test_toy_coupling_generates():
    model = make(STACKS["in a stack"])
    noise = torch.randn(2, 8, 2, dtype=torch.float64)
    tokens = model.generate(noise=noise, top_k=3)
    assert torch.equal(tokens, model.generate(noise=noise, top_k=3))

    prompt = torch.randint(5, (2, 4))
    assert torch.equal(model.generate(prompt, max_new_tokens=4)[:, :4], prompt)

    alone = make(STACKS["alone"])
    with pytest.raises(ValueError, match="steer mixture_rosenblatt flows"):
        alone.generate(top_k=3)


def test_toy_coupling_initialises_and_trains_stage_by_stage(tmp_path):
    tokenizer = character_tokenizer()
    data = PackedTokens([TEXT], tokenizer, 16)
    sizes = {"vocab_size": 27, "latent_size": 2, "hidden_size": 16, "num_attention_heads": 2}
    flows = [flow(NAME), flow(NAME, "right_to_left")]
    config = TarFlowLMConfig(**sizes, max_position_embeddings=16, flows=flows)
    before = likelihood(TarFlowLMModel(config), data, max_sequences=8).nats_per_token

    options = {"mode": "progressive", "num_steps": 40, "learning_rate": 1e-2}
    model, losses = run(tmp_path, data, tokenizer, config, **options)
    assert len(losses) == 40 and all(torch.tensor(list(losses.values())).isfinite())
    after = likelihood(model, data, max_sequences=8).nats_per_token
    assert after < before - 0.1

    for layer in model.flow.layers:
        assert layer.head.weight.std() > 0.01


def test_toy_coupling_counts_its_flops():
    """Its two linear maps cost what an affine coupling's do."""
    affine = TarFlowLMConfig(
        vocab_size=5, latent_size=2, hidden_size=16, num_attention_heads=2, flows=[flow("affine")]
    )
    toy = one_flow()
    assert count_flops(toy) == count_flops(affine)


def test_toy_coupling_is_named_on_a_model_card():
    card = str(model_card(one_flow(), repo_id="USER/toy"))
    assert "| 1 | sinh-arcsinh | left to right | 1 |" in card


def test_toy_coupling_saves_and_loads(tmp_path):
    model = make(STACKS["both ways"])
    ids = torch.randint(5, (2, 6))
    noise = torch.randn(2, 6, 2, dtype=torch.float64)
    model.save_pretrained(tmp_path)

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert isinstance(loaded, TarFlowLMModel)
    assert torch.equal(loaded(ids, latent_noise=noise).elbo, model(ids, latent_noise=noise).elbo)
