"""The training loop: what it computes, on one process and on two."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import ROOT
from helpers.training import TEXT, assert_same_weights, config, run
from tarflow_hf import TarFlowLMModel
from tarflow_hf.data import PackedTokens, StreamingPackedTokens
from tarflow_hf.evaluation import likelihood
from tarflow_hf.training import TrainingConfig, make_optimizer, validate


def test_a_run_with_another_seed_is_another_one(tmp_path, data, tokenizer):
    _, a = run(tmp_path / "a", data, tokenizer)
    _, b = run(tmp_path / "b", data, tokenizer)
    _, c = run(tmp_path / "c", data, tokenizer, seed=1)
    assert a == b and a[1] != c[1]


def test_training_learns(tmp_path, data, tokenizer):
    """Both models come far below the first loss on forty repeated words.

    The flow's bound agrees with its loss.
    """
    for name, baseline in (("flow", False), ("ar", True)):
        options = {
            "num_steps": 150,
            "batch_size": 16,
            "learning_rate": 0.01,
            "warmup_steps": 10,
            "baseline": baseline,
        }
        model, losses = run(tmp_path / name, data, tokenizer, config(latent_size=4), **options)
        assert losses[1] > 3 and losses[150] < 1.6
        assert likelihood(model, data, max_sequences=32).nats_per_token == pytest.approx(
            losses[150], abs=0.4
        )


def test_the_saved_model_is_the_trained_one(tmp_path, data, tokenizer):
    model, _ = run(tmp_path, data, tokenizer, ema_decay=0.5)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert isinstance(loaded, TarFlowLMModel)
    assert_same_weights(loaded, model)
    saved_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert saved_tokenizer("Hello, World").input_ids == tokenizer("hello world").input_ids
    checkpoint = TarFlowLMModel(config())
    checkpoint.load_state_dict(load_file(tmp_path / "checkpoint-8" / "model.safetensors"))
    assert not torch.equal(
        checkpoint.codebook.mean, model.codebook.mean
    )  # the average is not the last iterate


def test_averaged_weights(tmp_path, data, tokenizer):
    """After every step, average = decay average + (1 - decay) weights.

    The average begins with the first weights.
    """
    from tarflow_hf.training import loop as module

    seen = []
    original = module.AveragedModel.update_parameters

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            module.AveragedModel,
            "update_parameters",
            lambda self, model: (
                original(self, model),
                seen.append(model.flow.codebook.mean.detach().clone()),
            )[0],
        )
        model, _ = run(tmp_path, data, tokenizer, ema_decay=0.75)

    expected = seen[0]
    for weights in seen[1:]:
        expected = 0.75 * expected + 0.25 * weights

    torch.testing.assert_close(model.codebook.mean.detach(), expected)


@pytest.mark.parametrize("num_processes", [2, 3, 5])
def test_processes_share_validation(data, num_processes):
    """Each of three batches is scored once, with its own noise.

    All processes run equally many forward passes.
    """
    model = TarFlowLMModel(config())
    calls, summed = [], []

    def process(index: int, count: int):
        def reduce(nats, reduction):
            summed.append(nats)
            return nats

        process = SimpleNamespace(num_processes=count, process_index=index, reduce=reduce)
        return SimpleNamespace(**vars(process), device=torch.device("cpu"))

    handle = model.register_forward_hook(lambda *_: calls.append(1))
    whole = validate(model, data, 40, process(0, 1))
    expected = summed.pop()
    assert len(calls) == 3 and whole.num_tokens == 640

    for index in range(num_processes):
        calls.clear()
        validate(model, data, 40, process(index, num_processes))
        assert len(calls) == -(-3 // num_processes)

    handle.remove()
    torch.testing.assert_close(sum(summed), expected)
    assert ((torch.stack(summed) != 0).sum(0) == 1).all()
    same = likelihood(model, data, max_sequences=40)
    assert (whole.nats, whole.standard_error) == pytest.approx((same.nats, same.standard_error))


def test_weight_decay_spares_the_codebook():
    model = TarFlowLMModel(config())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, kept = make_optimizer(model, TrainingConfig()).param_groups
    assert decayed["weight_decay"] == 0.1 and kept["weight_decay"] == 0
    assert len(decayed["params"]) + len(kept["params"]) == len(names)
    assert {"flow.codebook.mean", "flow.codebook.log_scale"} <= {
        names[id(p)] for p in kept["params"]
    }
    assert all(p.ndim >= 2 and not names[id(p)].endswith("bias") for p in decayed["params"])


def test_bfloat16(tmp_path, data, tokenizer):
    model, losses = run(tmp_path, data, tokenizer, mixed_precision="bf16")
    _, exact = run(tmp_path / "exact", data, tokenizer)
    assert model.codebook.mean.dtype == torch.float32
    assert losses == pytest.approx(exact, abs=0.05) and losses != exact


def test_bad_input(tmp_path, data, tokenizer):
    with pytest.raises(ValueError, match="fewer than batch_size"):
        run(tmp_path, data, tokenizer, batch_size=1000)

    stream = StreamingPackedTokens([TEXT[:100]], tokenizer, 16)
    with pytest.raises(
        ValueError, match="stream ends with fewer sequences to train on than batch_size 64"
    ):
        run(tmp_path, data, tokenizer, train_data=stream, batch_size=64)

    with pytest.raises(ValueError, match="gradient_accumulation_steps"):
        run(tmp_path, data, tokenizer, gradient_accumulation_steps=3)

    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        run(tmp_path, data, tokenizer, resume=True)

    with pytest.raises(ValueError, match="num_steps"):
        TrainingConfig(num_steps=0)

    with pytest.raises(ValueError, match="ema_decay"):
        TrainingConfig(ema_decay=1.0)

    run(tmp_path, data, tokenizer)
    with pytest.raises(
        ValueError,
        match=r"another run: latent_size was 2 and is 3; learning_rate was 0.002 and is 0.1",
    ):
        run(tmp_path, data, tokenizer, config(latent_size=3), resume=True, learning_rate=0.1)

    other_text = PackedTokens([TEXT.replace("fox", "cat")], tokenizer, 16)
    with pytest.raises(ValueError, match=r"another run: checksum of the data was \d+ and is \d+"):
        run(tmp_path, data, tokenizer, train_data=other_text, resume=True)

    assert (tmp_path / "checkpoint-8").exists()


# ----------------------------------------------------------------------------------- the same curve


def test_two_processes_give_the_losses_of_one(tmp_path):
    """Losses and shared validations under DDP and FSDP2 on gloo.

    The runs are a flow model, the discrete one, a stream in parts, a conditional model and the
    stages. The processes of the conditional model miss different numbers of tokens.
    """
    from helpers import two_processes

    command = [
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--standalone",
        "-m",
        "helpers.two_processes",
    ]
    paths = [str(ROOT / "src"), str(ROOT / "tests")]
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }

    environment["PYTHONPATH"] = os.pathsep.join(paths)
    with subprocess.Popen(
        [sys.executable, *command, str(tmp_path / "two")],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        expected = two_processes.losses(tmp_path / "one")
        for baseline in (False, True):
            expected[f"sharded, baseline {baseline}"] = two_processes.sharded_losses(baseline)
        output, _ = process.communicate(timeout=100)

    assert process.returncode == 0
    results = json.loads(output.splitlines()[-1])
    assert results.keys() == expected.keys()

    for name, losses in results.items():
        # Losses of about 3; "patience" provokes a validation of 25, to which the same 50 roundings
        # of float32 are more.
        assert losses == pytest.approx(expected[name], rel=6e-6, abs=2e-5), name
        assert len(set(losses)) == len(losses) >= 3


@pytest.mark.parametrize("change", ["parts", "checkpointing", "compiled"])
@pytest.mark.parametrize("baseline", [False, True])
def test_how_a_step_is_computed_changes_no_loss(
    tmp_path, data, tokenizer, monkeypatch, change, baseline
):
    """Parts, checkpointing and compilation change no loss.

    In parts also of a conditional model: the latents' noise and the observed tokens are those of
    the whole.
    """
    conditional = change == "parts" and not baseline
    options = {
        "model_config": config(conditional=conditional),
        "baseline": baseline,
        "num_steps": 5,
    }
    options |= {"learning_rate": 0.01, "eval_sequences": 4}
    _, expected = run(tmp_path / "a", data, tokenizer, **options)

    if change == "compiled":
        monkeypatch.setenv(
            "ACCELERATE_DYNAMO_BACKEND", "AOT_EAGER" if baseline else "EAGER"
        )  # which is faster

    more = {
        "parts": {"gradient_accumulation_steps": 4},
        "checkpointing": {"gradient_checkpointing": True},
    }
    _, losses = run(tmp_path / "b", data, tokenizer, **options, **more.get(change, {}))
    assert losses == pytest.approx(expected, abs=2e-5)
