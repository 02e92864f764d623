"""Stage-wise training."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from helpers.training import STACK, assert_same_weights, config, entries, run
from tarflow_hf import TarFlowLMModel
from tarflow_hf.evaluation import Likelihood, likelihood
from tarflow_hf.training import TrainingConfig, check_batches, train


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


@pytest.mark.parametrize("ema_decay", [0.0, 0.5])
def test_progressive_training_freezes_what_is_done(tmp_path, data, tokenizer, ema_decay):
    """Each stage changes its flow and no other weight by one bit.

    The first stage also changes the codebook, and the last one changes all.
    """
    options = {
        "mode": "progressive_then_joint",
        "stage_steps": [3, 2, 2, 2],
        "save_every": 1,
        "keep_checkpoints": 99,
    }
    _, losses = run(tmp_path, data, tokenizer, config(flows=STACK), ema_decay=ema_decay, **options)
    assert list(losses) == list(range(1, 10))
    stages = [entry["stage"] for entry in entries(tmp_path) if "loss" in entry]
    assert stages == ["flow 1"] * 3 + ["flow 2"] * 2 + ["flow 3"] * 2 + ["joint"] * 2
    validations = {
        entry["step"]: entry["num_flows"]
        for entry in entries(tmp_path)
        if "validation_loss" in entry
    }
    assert validations == {3: 1, 5: 2, 7: 3, 9: 3}

    trained = [("flow.layers.0.", "flow.codebook."), ("flow.layers.1.",), ("flow.layers.2.",)]
    ends = [3, 5, 7]
    for prefixes, end in zip(trained, ends, strict=True):
        before, after = (
            weights(tmp_path / f"checkpoint-{end - 1}"),
            weights(tmp_path / f"checkpoint-{end}"),
        )
        for name in before:
            assert torch.equal(before[name], after[name]) != name.startswith(prefixes), name

    last = weights(tmp_path / "checkpoint-8"), weights(tmp_path / "checkpoint-9")
    assert not any(torch.equal(last[0][name], last[1][name]) for name in last[0])
    optimizer = torch.load(tmp_path / "checkpoint-5" / "optimizer.bin", weights_only=True)
    size = sum(w.numel() for name, w in last[0].items() if name.startswith("flow.layers.1."))
    assert sum(state["exp_avg"].numel() for state in optimizer["state"].values()) == size


def test_frozen_flows_run_no_backward(tmp_path, data, tokenizer, monkeypatch):
    """Only a frozen flow would call a CDF's backward pass.

    The trained flow is the last one, and needs none.
    """
    from tarflow_hf.modeling import coupling_torch

    functions = [
        f for f in vars(coupling_torch).values() if isinstance(f, type) and hasattr(f, "backward")
    ]
    transforms = [
        f
        for f in functions
        if issubclass(f, torch.autograd.Function) and "LogProb" not in f.__name__
    ]
    assert transforms
    called = []

    for function in transforms:
        original = function.backward
        watch = staticmethod(
            lambda *a, f=original, n=function.__name__: (called.append(n), f(*a))[1]
        )
        monkeypatch.setattr(function, "backward", watch)

    options = {"stage_steps": [1, 1, 1], "eval_sequences": 4}
    run(tmp_path / "a", data, tokenizer, config(flows=STACK), mode="progressive", **options)
    assert called == []
    run(tmp_path / "b", data, tokenizer, config(flows=STACK), num_steps=1, eval_sequences=4)
    assert called


def test_a_stage_is_the_training_of_the_cut_stack(tmp_path, data, tokenizer):
    """The first stage gives the losses and weights of a model with the first flow only."""
    torch.manual_seed(0)
    stack, first = TarFlowLMModel(config(flows=STACK)), TarFlowLMModel(config(flows=STACK[:1]))
    first.load_state_dict({name: stack.state_dict()[name] for name in first.state_dict()})
    options = {"batch_size": 4, "warmup_steps": 2, "log_every": 1, "eval_sequences": 8}

    for name, model, more in (
        ("stack", stack, {"mode": "progressive", "stage_steps": [6, 1, 1]}),
        ("first", first, {"num_steps": 6}),
    ):
        AcceleratorState._reset_state(reset_partial_state=True)
        train(
            model,
            data,
            data,
            tokenizer,
            TrainingConfig(output_dir=str(tmp_path / name), **options, **more),
        )

    losses = [
        [e.get("loss", e.get("validation_loss")) for e in entries(tmp_path / n)][:7]
        for n in ("stack", "first")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 7
    cut = likelihood(stack, data, max_sequences=8, num_flows=1)
    assert (
        cut == likelihood(first, data, max_sequences=8) != likelihood(stack, data, max_sequences=8)
    )


@pytest.mark.parametrize("end", [2, 3, 5, 8])
def test_a_run_resumes_inside_and_between_stages(tmp_path, data, tokenizer, end):
    options = {
        "mode": "progressive_then_joint",
        "stage_steps": [3, 2, 3],
        "save_every": 1,
        "keep_checkpoints": 99,
    }
    options["mixed_precision"] = "bf16" if end == 3 else "no"
    options |= {"ema_decay": 0.5, "stage_learning_rates": [0.01, 0.02, 0.001], "eval_sequences": 4}
    whole, expected = run(tmp_path, data, tokenizer, **options)
    for step in range(end + 1, 9):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")

    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 9, "lo')  # as a kill leaves it

    resumed, losses = run(tmp_path, data, tokenizer, resume=True, **options)
    assert losses == expected and len(losses) == 8
    assert_same_weights(whole, resumed)


@pytest.mark.parametrize("ema_decay", [0.0, 0.5])
def test_patience(tmp_path, data, tokenizer, monkeypatch, ema_decay):
    """A stage ends with its best weights after two evaluations that were no better.

    It does so also after a resume between them. The codebook and flow 1 are those of step 4, flow 2
    of step 10. The joint stage ends by its budget.
    """
    from tarflow_hf.training import loop as module

    values = {
        2: 3.0,
        4: 2.0,
        6: 2.5,
        8: 2.0,
        10: 1.5,
        12: torch.nan,
        14: 1.6,
        16: 0.9,
        18: 1.0,
    }  # 8: no better
    step, seen = [0], {}
    monkeypatch.setattr(module.Log, "losses", lambda self, done, *_: step.__setitem__(0, done))

    def fake(model, *_):
        seen[step[0]] = {name: weight.clone() for name, weight in model.state_dict().items()}
        return Likelihood(values[step[0]], 1, 0.0)

    monkeypatch.setattr(module, "validate", fake)
    options = {
        "mode": "progressive_then_joint",
        "stage_steps": [12, 12, 4],
        "patience": 2,
        "eval_every": 2,
    }
    options |= {
        "save_every": 6,
        "keep_checkpoints": 9,
        "learning_rate": 0.01,
        "ema_decay": ema_decay,
    }
    whole, _ = run(tmp_path, data, tokenizer, **options)
    assert list(seen) == [2, 4, 6, 8, 10, 12, 14, 16, 18]
    for name, weight in seen[10].items():  # flow 2 was trained on top of the best of stage 1
        assert torch.equal(weight, seen[4][name]) == ("layers.1." not in name)

    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, seen[16][name]) and not torch.equal(weight, seen[18][name])

    assert_same_weights(whole, TarFlowLMModel.from_pretrained(tmp_path / "model"))
    for step_of_checkpoint in (
        6,
        8,
        12,
    ):  # behind the best one; at the end of the stage; in the second one
        for path in tmp_path.glob("checkpoint-*"):
            if int(path.name.split("-")[1]) > step_of_checkpoint:
                shutil.rmtree(path)

        seen.clear()
        resumed, _ = run(tmp_path, data, tokenizer, resume=True, **options)
        assert list(seen) == [at for at in values if at > step_of_checkpoint]
        assert_same_weights(whole, resumed)

    with pytest.raises(ValueError, match="eval_every was 2 and is 1"):
        run(tmp_path, data, tokenizer, resume=True, **{**options, "eval_every": 1})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mode": "alternating"}, "mode must be one of joint, progressive"),
        (
            {"mode": "progressive", "stage_steps": [1, 2, 3]},
            r"stage_steps must have one value .*flow 1, flow 2\), not",
        ),
        (
            {"mode": "progressive", "stage_learning_rates": [1.0]},
            "stage_learning_rates must have one value",
        ),
        ({"stage_steps": [0]}, "stage_steps must be positive"),
        ({"mode": "progressive", "num_steps": 1}, "less than one for each of 2 stages"),
        ({"mode": "progressive", "baseline": True}, "a discrete model has no flows"),
        ({"patience": 2}, "patience counts evaluations"),
        ({"max_grad_norm": -1}, "max_grad_norm must be 0 or more, not -1"),
        ({"weight_decay": -50}, "weight_decay must be 0 or more"),
        ({"min_learning_rate": 0.5}, "where the learning rate falls to"),
        ({"lora_targets": ["q_proj"]}, "give lora_rank, too"),
    ],
)
def test_stages_that_can_not_be(tmp_path, data, tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, data, tokenizer, **options)


@pytest.mark.parametrize(
    "options",
    [{"mode": "progressive"}, {"ema_decay": 0.9}, {"patience": 1, "eval_every": 1}],
    ids=str,
)
def test_sharded_weights_are_trained_jointly(data, options):
    sharded = SimpleNamespace(num_processes=2, distributed_type=DistributedType.FSDP)
    check_batches(data, TrainingConfig(), sharded)

    with pytest.raises(
        ValueError, match="With FSDP, ema_decay must be 0, mode joint and patience 0"
    ):
        check_batches(data, TrainingConfig(**options), sharded)


def test_muon_needs_whole_matrices(data):
    sharded = SimpleNamespace(num_processes=2, distributed_type=DistributedType.FSDP)
    with pytest.raises(ValueError, match="With FSDP, optimizer must be adamw, not muon"):
        check_batches(data, TrainingConfig(optimizer="muon"), sharded)
