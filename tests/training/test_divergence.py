"""A divergence is traced to its step and its place."""

from itertools import count

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from helpers.training import STACK, config, run
from tarflow_hf import TarFlowLMModel
from tarflow_hf.training import compute_loss
from tarflow_hf.training.divergence import FirstFault

DIVERGENCES = [  # a parameter whose value, or gradient, diverges, or the loss itself; what is said of it
    ("codebook", "value", "the latents"),
    ("layers.0.head", "value", "the output of flow 1"),
    ("layers.1.head", "value", "the output of flow 2"),
    ("layers.2.head", "gradient", "the gradient of flow 3"),
    ("layers.1.head", "gradient", "the gradient of flow 2"),
    ("codebook", "gradient", "the gradient of the codebook"),
    ("", "loss", "the loss"),
    ("model.norm", "gradient", "the gradient of the model"),
]


@pytest.mark.parametrize("place, what, said", DIVERGENCES)
def test_a_divergence_is_traced(tmp_path, data, tokenizer, monkeypatch, place, what, said):
    """The divergence begins at step 63, in the second epoch.

    The log looks at step 70, when all weights are NaN.
    """
    from tarflow_hf.training import loop as module

    steps = count(1)

    def diverging_loss(model, *arguments):
        if next(steps) != 63:
            return compute_loss(model, *arguments)

        parameter = next(parameter for name, parameter in model.named_parameters() if place in name)
        if what == "value":
            parameter.data.fill_(torch.inf)

        if what == "gradient":
            parameter.register_hook(lambda grad: grad * torch.nan)

        loss = compute_loss(model, *arguments)
        return loss * torch.nan if what == "loss" else loss

    monkeypatch.setattr(module, "compute_loss", diverging_loss)
    first = 62 * 4 - len(data) // 4 * 4
    assert 0 < first < len(data)
    message = f"At step 63, {said} is the first .* 4 sequences, from number {first} of epoch 1 on"
    options = {
        "num_steps": 80,
        "save_every": 30,
        "log_every": 10,
        "baseline": place == "model.norm",
    }
    with pytest.raises(FloatingPointError, match=message):
        run(tmp_path, data, tokenizer, config(flows=STACK), **options)

    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-30",
        "checkpoint-60",
        "log.jsonl",
    ]
    assert all(
        w.isfinite().all()
        for w in load_file(tmp_path / "checkpoint-60" / "model.safetensors").values()
    )


def test_parameters_without_entries_do_not_diverge(tmp_path, data, tokenizer):
    """A head of one dimension has empty weights between dimensions."""
    model, losses = run(
        tmp_path, data, tokenizer, config(latent_size=1), num_steps=2, eval_sequences=2
    )
    assert any(parameter.numel() == 0 for parameter in model.parameters()) and len(losses) == 2


def test_a_divergence_in_the_last_step_is_not_saved(tmp_path, data, tokenizer, monkeypatch):
    """The loss is finite; the gradients and with them the weights are not."""
    from tarflow_hf.training import loop as module

    def diverging_loss(model, *arguments):
        loss = compute_loss(model, *arguments)
        model.flow.codebook.log_scale.register_hook(lambda grad: grad / 0)
        return loss

    monkeypatch.setattr(module, "compute_loss", diverging_loss)
    with pytest.raises(FloatingPointError, match="step 1, the gradient of the codebook"):
        run(tmp_path, data, tokenizer, num_steps=1)

    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


@pytest.fixture
def one_process(tmp_path):
    """A process group of this process only."""
    distributed.init_process_group("gloo", f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_gradients_of_sharded_weights_are_watched(one_process):
    """Sharding (FSDP2) replaces a model's parameters after the watch has begun."""
    model = TarFlowLMModel(config())
    accelerator = Accelerator(cpu=True)
    fault = FirstFault(model, accelerator)
    fully_shard(model, mesh=one_process)

    ids = torch.randint(27, (2, 8))
    model(ids, labels=ids).loss.backward()
    fault.see_gradients()
    fault.end_step(1)
    fault.check({})

    next(model.flow.layers[1].parameters()).grad.fill_(torch.nan)
    fault.see_gradients()
    fault.end_step(2)
    with pytest.raises(FloatingPointError, match="At step 2, the gradient of flow 2"):
        fault.check({2: "two sequences"})
