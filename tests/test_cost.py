"""FLOPs of training against torch's own counter and by hand."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from helpers.training import STACK, config
from tarflow_hf import TarFlowLMModel
from tarflow_hf.cost import forward_flops, training_flops
from tarflow_hf.training import TrainingConfig, discrete_baseline, make_stages


@pytest.mark.parametrize("patch_size", [1, 4])
@pytest.mark.parametrize("coupling", ["affine", "mixture_cdf", "mixture_rosenblatt", "baseline"])
def test_flops_are_those_that_torch_counts(coupling, patch_size):
    """The count agrees with torch's within 3%.

    It leaves out rotations and, for the Mix-d coupling, the products with the codebook.
    """
    flow = {"coupling": coupling, "direction": "left_to_right", "num_hidden_layers": 2}
    if coupling == "baseline":
        flow["coupling"] = "affine"

    if coupling == "mixture_rosenblatt" and patch_size > 1:
        flow["patch_head_layers"] = 1

    sizes = {
        "hidden_size": 128,
        "vocab_size": 96,
        "max_position_embeddings": 64,
        "patch_size": patch_size,
    }
    model_config = config(flows=[flow], **sizes)
    model = (
        discrete_baseline(model_config) if coupling == "baseline" else TarFlowLMModel(model_config)
    )
    model.set_attn_implementation("eager")
    model.eval().requires_grad_(False)
    input_ids = torch.randint(96, (2, 64))

    with FlopCounterMode(display=False) as counter:
        if coupling == "baseline":
            model(input_ids)
        else:
            model(input_ids, labels=input_ids)

    assert 2 * sum(forward_flops(model, 64)) == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_training_flops_by_hand():
    """Three flows of one layer of width 16, and feed-forward width 64.

    Attention is over 16 positions.
    """
    model = TarFlowLMModel(config(flows=STACK, intermediate_size=64))
    layer = 2 * 16 * (4 * 16**2 + 3 * 16 * 64) + 4 * 16 * 16**2
    mix_d = (
        layer + 2 * 16 * (16 * 27) + 2 * 16 * 27 * 16
    )  # logits; the posterior's average of embeddings
    affine = layer + 2 * 16 * (2 * 16) + 2 * 16 * (16 * 4)  # input projection; head
    flops = forward_flops(model, 16)
    assert flops[0] == mix_d and flops[2] == affine
    stages = make_stages(model, TrainingConfig(mode="progressive"))
    stages[2].choose_parameters(model)
    assert training_flops(model, 16, 3) == flops[0] + flops[1] + 3 * flops[2]
    stages[0].choose_parameters(model)
    assert training_flops(model, 16, 1) == 3 * flops[0]
