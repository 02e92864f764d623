"""Two models, one noise: the differences are those of the models' own texts and scores."""

import copy
import math

import pytest
import torch

from helpers.models import STACKS, make
from tarflow_hf.evaluation import compare, round_to_int8

IDS = torch.arange(36).remainder(27).reshape(4, 9)


@pytest.fixture(scope="module")
def rounded(flow):
    other = copy.deepcopy(flow)
    round_to_int8(other)
    return other


def test_a_model_and_itself(flow):
    found = compare(flow, flow, num_texts=3, num_tokens=8, texts=IDS)
    assert found.is_same.all() and found.rate == 0 and found.difference == 0
    assert found.standard_error == 0 < found.unpaired_standard_error


def test_models_are_compared_in_evaluation_mode():
    """Whatever mode they are in, and whatever a saved config asks for."""
    block = {"model_type": "gpt_neox", "hidden_dropout": 0.5, "intermediate_size": 32}
    block |= {"hidden_size": 16, "num_attention_heads": 2}
    model = make(STACKS["mix-d"], block_config=block).train()
    model.generation_config.return_dict_in_generate = True
    found = compare(model, model, num_texts=3, num_tokens=8)
    assert found.is_same.all() and found.difference == 0 and model.training


def test_a_wrapped_model_is_compared_and_another_thing_is_not(flow):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    adapted = peft.get_peft_model(copy.deepcopy(flow), lora)
    assert compare(flow, adapted, num_texts=3, num_tokens=8).difference == 0  # not trained yet
    with pytest.raises(ValueError, match="compare takes two TarFlowLMModel, not int"):
        compare(flow, 3)


def test_scores_are_bits_of_the_bound_under_one_noise(flow, rounded):
    found = compare(flow, rounded, num_texts=2, num_tokens=8, texts=IDS, batch_size=3, seed=5)
    for model, scores in zip((flow, rounded), found.scores, strict=True):
        generator = torch.Generator().manual_seed(5)
        elbo = torch.cat([model(part, generator=generator).elbo for part in IDS.split(3)])
        torch.testing.assert_close(scores, -elbo.double() / 9 / math.log(2))

    assert 0 < found.standard_error < found.unpaired_standard_error


def test_texts_are_written_from_one_noise(flow, rounded):
    """Each model's texts are those it writes alone from the noise; by default A's are scored."""
    found = compare(flow, rounded, num_texts=4, num_tokens=8, batch_size=3, seed=5)
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(4, 8, flow.config.latent_size, generator=generator)
    for model, written in zip((flow, rounded), found.written, strict=True):
        assert torch.equal(written, model.generate(noise=noise))

    again = compare(flow, rounded, num_texts=4, num_tokens=8, texts=found.written[0], seed=5)
    torch.testing.assert_close(again.scores, found.scores, rtol=1e-5, atol=0)


@pytest.mark.parametrize("options", [{"num_texts": 1}, {"texts": IDS[:1]}], ids=str)
def test_one_text_has_no_standard_error(flow, options):
    with pytest.raises(ValueError, match="at least two texts, not 1"):
        compare(flow, flow, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tokens": 0}, "num_tokens must be an integer of at least 1, not 0"),
        ({"num_texts": 0}, "num_texts must be an integer of at least 1, not 0"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, not 0"),
        ({"texts": ["a", "b"]}, r"texts must be token ids, a tensor \(m, T\) of .*, not list"),
        ({"texts": IDS.float()}, "texts must be token ids, .*, not torch.float32"),
        ({"texts": IDS[0]}, r"texts must be token ids, .*, not torch.int64, \(9,\)"),
    ],
    ids=str,
)
def test_what_cannot_be_compared_is_said(flow, options, message):
    with pytest.raises(ValueError, match=message):
        compare(flow, flow, **options)


def test_a_text_has_a_patch_at_least():
    model = make(STACKS["mix-d"], patch_size=2)
    with pytest.raises(ValueError, match="a patch of 2 tokens at least, not 1"):
        compare(model, model, num_tokens=1)
