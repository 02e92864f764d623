"""The training loop: what it computes, that it resumes exactly, and the scripts end to end."""

import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from tarflow_hf import TarFlowLMConfig, TarFlowLMModel
from tarflow_hf.data import PackedTokens, StreamingPackedTokens, character_tokenizer
from tarflow_hf.evaluation import likelihood, negative_log_likelihood
from tarflow_hf.throughput import forward_flops, training_flops
from tarflow_hf.training import (
    RowNoise,
    TrainingConfig,
    check_batches,
    compute_loss,
    discrete_baseline,
    draw_observed_mask,
    make_optimizer,
    make_stages,
    save_model,
    train,
    validate,
)

ROOT = Path(__file__).parents[1]
TEXT = (
    "the quick brown fox jumps over the lazy dog and then it sleeps in the warm light of the sun "
    * 40
)


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer()


@pytest.fixture(scope="module")
def data(tokenizer):
    return PackedTokens([TEXT], tokenizer, 16)


def config(**changes) -> TarFlowLMConfig:
    flows = [
        {"coupling": "mixture_rosenblatt", "direction": "left_to_right", "num_hidden_layers": 1},
        {
            "coupling": "mixture_cdf",
            "direction": "right_to_left",
            "num_hidden_layers": 1,
            "num_components": 2,
        },
    ]
    fields = {
        "vocab_size": 27,
        "latent_size": 2,
        "max_position_embeddings": 16,
        "hidden_size": 16,
        "flows": flows,
    }

    return TarFlowLMConfig(**{**fields, "num_attention_heads": 2, **changes})


def run(tmp_path, data, tokenizer, model_config=None, train_data=None, baseline=False, **options):
    """Trains from scratch (or resumes) and returns the model and the losses by step."""
    AcceleratorState._reset_state(reset_partial_state=True)  # as a new process would begin
    set_seed(0)
    training = TrainingConfig(
        **{
            "output_dir": str(tmp_path),
            "num_steps": 8,
            "batch_size": 4,
            "warmup_steps": 2,
            "log_every": 1,
            **options,
        }
    )
    model_config = model_config or config()
    model = discrete_baseline(model_config) if baseline else TarFlowLMModel(model_config)
    model = train(model, train_data or data, data, tokenizer, training)
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]

    return model, {entry["step"]: entry["loss"] for entry in entries if "loss" in entry}


def assert_same_weights(a, b):
    for (name, x), (_, y) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        assert torch.equal(x, y), name


@pytest.mark.parametrize("kind", ["plain", "average, accumulation", "stream", "baseline"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, data, tokenizer, kind):
    """Killed at step 64 of 70, where the second epoch has just begun: all later losses and the
    weights are the same.
    """
    options = {"num_steps": 70, "save_every": 30, "learning_rate": 0.01}
    if kind == "average, accumulation":
        options |= {"ema_decay": 0.9, "gradient_accumulation_steps": 2}

    if kind == "baseline":
        options |= {"baseline": True}

    def train_data():
        return (
            StreamingPackedTokens([TEXT], tokenizer, 16, shuffle_buffer=8)
            if kind == "stream"
            else data
        )

    whole, expected = run(tmp_path / "a", data, tokenizer, train_data=train_data(), **options)

    # A run killed between two checkpoints: the first half of the same schedule, then a fresh
    # process' worth of state.
    class Killed(Exception):
        pass

    def die(self, step, total, learning_rate, original=None):
        if step == 64:
            raise Killed

    from tarflow_hf import training as module

    original = module.Log.losses
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.Log, "losses", lambda *a: (die(*a), original(*a)))
        with pytest.raises(Killed):
            run(tmp_path / "b", data, tokenizer, train_data=train_data(), **options)

    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == [
        "checkpoint-30",
        "checkpoint-60",
        "log.jsonl",
    ]
    resumed, losses = run(
        tmp_path / "b", data, tokenizer, train_data=train_data(), resume=True, **options
    )
    assert losses == expected and len(losses) == 70
    assert_same_weights(whole, resumed)


@pytest.mark.parametrize("conditional", [False, True])
def test_what_is_observed_follows_from_seed_and_step(tmp_path, data, tokenizer, conditional):
    """A conditional run resumes exactly, and only as what it is."""
    options = {"num_steps": 6, "save_every": 3, "eval_sequences": 4}
    whole, expected = run(tmp_path, data, tokenizer, config(conditional=conditional), **options)
    shutil.rmtree(tmp_path / "checkpoint-6")
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(ValueError, match=f"conditional was {conditional} and is {not conditional}"):
        run(tmp_path, data, tokenizer, config(conditional=not conditional), resume=True, **options)

    resumed, losses = run(
        tmp_path, data, tokenizer, config(conditional=conditional), resume=True, **options
    )
    assert losses == {step: expected[step] for step in (4, 5, 6)}
    assert_same_weights(whole, resumed)


def test_a_run_with_another_seed_is_another_one(tmp_path, data, tokenizer):
    _, a = run(tmp_path / "a", data, tokenizer)
    _, b = run(tmp_path / "b", data, tokenizer)
    _, c = run(tmp_path / "c", data, tokenizer, seed=1)
    assert a == b and a[1] != c[1]


def test_training_learns(tmp_path, data, tokenizer):
    """Forty words over and over: both models come far below the first loss, and the flow's bound is
    honest.
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
    """After every step: average = decay average + (1 - decay) weights, beginning with the first
    weights.
    """
    from tarflow_hf import training as module

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


def test_loss_is_nats_per_token():
    set_seed(0)
    model = TarFlowLMModel(config())
    input_ids = torch.randint(27, (4, 16))
    generator = torch.Generator().manual_seed(1)
    loss = compute_loss(model, input_ids, generator)
    elbo = model(input_ids, generator=generator.manual_seed(1)).elbo
    torch.testing.assert_close(loss, -elbo.sum() / 64)
    assert not torch.equal(loss, compute_loss(model, input_ids, generator))


def test_loss_of_a_conditional_model_is_nats_per_missing_token():
    """Its observed tokens are drawn anew from the generator of the step, before the latents."""
    model = TarFlowLMModel(config(conditional=True, patch_size=2))
    input_ids = torch.randint(27, (8, 16))
    loss = compute_loss(model, input_ids, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    mask = draw_observed_mask((8, 16), 2, generator)
    assert 0 < mask.sum() < 8 * 16
    expected = -model(input_ids, observed_mask=mask, generator=generator).elbo.sum() / (~mask).sum()
    torch.testing.assert_close(loss, expected)
    assert not torch.equal(loss, compute_loss(model, input_ids, torch.Generator().manual_seed(4)))
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_sequence_draws_noise_of_its_own():
    """Of a step's four sequences, halves draw what they draw in the whole: latents, and what is
    observed.
    """
    model = TarFlowLMModel(config())
    input_ids = torch.randint(27, (4, 16))
    whole = RowNoise(1, 4, 0, torch.device("cpu"))
    loss = compute_loss(model, input_ids, whole.at(7, 0))
    noise = torch.stack([torch.randn(16, 2, generator=generator) for generator in whole.at(7, 0)])
    expected = model(input_ids, latents=model.encode(input_ids, noise=noise), labels=input_ids).loss
    torch.testing.assert_close(loss, expected)
    parts = RowNoise(1, 2, 0, torch.device("cpu"))

    other_process = RowNoise(1, 2, 2, torch.device("cpu"))
    for second in (lambda: parts.at(7, 2), lambda: other_process.at(7, 0)):
        halves = (
            compute_loss(model, input_ids[:2], parts.at(7, 0)),
            compute_loss(model, input_ids[2:], second()),
        )
        torch.testing.assert_close(sum(halves) / 2, loss)
        mask = draw_observed_mask((4, 16), 2, whole.at(7, 0))
        assert torch.equal(mask[2:], draw_observed_mask((2, 16), 2, second()))

    assert not torch.equal(loss, compute_loss(model, input_ids, whole.at(8, 0)))


@pytest.mark.parametrize("patch_size", [1, 4])
def test_observed_masks_are_of_three_kinds(patch_size):
    mask = draw_observed_mask((6000, 32 * patch_size), patch_size, torch.Generator().manual_seed(0))
    patches = mask.unflatten(1, (32, patch_size))
    assert torch.equal(patches.all(-1), patches.any(-1)) and not mask.all(-1).any()
    observed = patches.all(-1)
    length = observed.sum(-1)
    is_prefix = (observed == (torch.arange(32) < length[:, None])).all(-1)

    # A third is nothing, a third a prefix of any length alike; spans are a third, and few of them
    # look like the others.
    is_nothing = length == 0
    for kind in (is_nothing, is_prefix & ~is_nothing, ~is_prefix):
        assert 0.25 < kind.float().mean() < 0.45

    counts = torch.bincount(length[is_prefix & ~is_nothing], minlength=32)[1:]
    assert counts.min() > 0.5 * counts.float().mean()
    spans = observed[~is_prefix]
    assert (spans.float().mean(0) - 0.5).abs().max() < 0.06  # wherever it is
    num_spans = (spans.diff(dim=-1) != 0).sum(-1)
    assert num_spans.min() <= 2 and num_spans.max() >= 16
    assert not draw_observed_mask(
        (5, patch_size), patch_size
    ).any()  # one position is never observed


def test_the_discrete_baseline_scores_every_token():
    """Its loss against the probabilities of the sequence, token by token; a distribution over all
    sequences.
    """
    set_seed(0)
    small = config(vocab_size=3, max_position_embeddings=4)
    model = discrete_baseline(small).eval()
    assert model.config.num_hidden_layers == 2 and model.config.hidden_size == small.hidden_size
    everything = torch.cartesian_prod(*[torch.arange(3)] * 4)

    with torch.no_grad():
        nats = negative_log_likelihood(model, everything)
        torch.testing.assert_close(compute_loss(model, everything[:7]), nats[:7].mean() / 4)
        start = torch.full((81, 1), 3)
        logits = model(torch.cat([start, everything], 1)).logits[:, :-1].log_softmax(-1)

    # One entry of the vocabulary is the start itself, which no text contains: what is lost to it is
    # all that is lost.
    torch.testing.assert_close(nats, -logits.gather(-1, everything[..., None]).sum((1, 2)))
    assert (-nats).exp().sum() < 1


@pytest.mark.parametrize("num_processes", [2, 3, 5])
def test_processes_share_validation(data, num_processes):
    """Three batches: each is scored once, with its own noise, and all processes run equally many
    forward passes.
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


def test_likelihood_of_text(data):
    set_seed(0)
    model = TarFlowLMModel(config())
    sequences = [data[i] for i in range(10)] + [{"input_ids": data[10]["input_ids"][:5]}]
    result = likelihood(model, sequences, batch_size=4)
    assert result.num_tokens == 165
    repeated = likelihood(model, sequences, batch_size=4)
    assert result == repeated != likelihood(model, sequences, batch_size=4, seed=1)
    nats = torch.tensor(
        [likelihood(model, [s], seed=i).nats_per_token for i, s in enumerate(sequences)]
    )
    assert abs(result.nats_per_token - nats.mean()) < 4 * result.standard_error + 0.05
    baseline = discrete_baseline(config()).eval()
    each = [likelihood(baseline, [s]).nats for s in sequences]
    assert likelihood(baseline, sequences, batch_size=4).nats == pytest.approx(sum(each), rel=1e-5)
    with pytest.raises(ValueError, match="no sequence"):
        likelihood(model, [])


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


STACK = [
    {"coupling": "mixture_rosenblatt", "direction": "left_to_right", "num_hidden_layers": 1},
    {
        "coupling": "mixture_cdf",
        "direction": "right_to_left",
        "num_hidden_layers": 1,
        "num_components": 2,
    },
    {"coupling": "affine", "direction": "left_to_right", "num_hidden_layers": 1},
]
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
    """It begins at step 63, in the second epoch; the log looks at step 70, when all weights are
    NaN.
    """
    from tarflow_hf import training as module

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
    """A head of one dimension has none that reads another."""
    model, losses = run(
        tmp_path, data, tokenizer, config(latent_size=1), num_steps=2, eval_sequences=2
    )
    assert any(parameter.numel() == 0 for parameter in model.parameters()) and len(losses) == 2


def test_a_divergence_in_the_last_step_is_not_saved(tmp_path, data, tokenizer, monkeypatch):
    """Its loss is finite; the gradients, and with them the weights, are not."""
    from tarflow_hf import training as module

    def diverging_loss(model, *arguments):
        loss = compute_loss(model, *arguments)
        model.flow.codebook.log_scale.register_hook(lambda grad: grad / 0)
        return loss

    monkeypatch.setattr(module, "compute_loss", diverging_loss)
    with pytest.raises(FloatingPointError, match="step 1, the gradient of the codebook"):
        run(tmp_path, data, tokenizer, num_steps=1)

    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_an_interrupted_save_leaves_what_was_there(tmp_path, tokenizer, monkeypatch):
    model = TarFlowLMModel(config())
    save_model(model, tokenizer, tmp_path / "model")
    before = {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()}
    other = TarFlowLMModel(config())

    def fail(path):
        raise OSError("no space left")

    monkeypatch.setattr(type(tokenizer), "save_pretrained", lambda self, path: fail(path))
    with pytest.raises(OSError, match="no space left"):
        save_model(other, tokenizer, tmp_path / "model")

    assert {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()} == before
    monkeypatch.undo()
    save_model(other, tokenizer, tmp_path / "model")
    assert_same_weights(TarFlowLMModel.from_pretrained(tmp_path / "model"), other)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_checkpoint_that_does_not_fit_on_the_disk(tmp_path, data, tokenizer, monkeypatch):
    """The system lets no file grow beyond some size, once step 6 is due: as if the disk were full."""
    import resource

    from tarflow_hf import training as module

    original, limits = module.save_checkpoint, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_checkpoint(accelerator, output_dir, progress, *rest):
        if progress.step == 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))

        try:
            original(accelerator, output_dir, progress, *rest)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    options = {"num_steps": 8, "save_every": 2, "eval_sequences": 2, "keep_checkpoints": 2}
    whole, expected = run(tmp_path / "whole", data, tokenizer, **options)
    monkeypatch.setattr(module, "save_checkpoint", save_checkpoint)

    with pytest.raises(
        OSError, match=r"checkpoint-6 could not be written: .*saved before is intact.*resume"
    ):
        run(tmp_path / "full", data, tokenizer, **options)

    left = sorted(path.name for path in (tmp_path / "full").iterdir())
    assert left == ["checkpoint-2", "checkpoint-4", "log.jsonl"]
    monkeypatch.undo()
    resumed, losses = run(tmp_path / "full", data, tokenizer, resume=True, **options)
    assert losses == expected
    assert_same_weights(whole, resumed)


@pytest.mark.parametrize("obstacle", ["a file", "no permission"])
def test_an_output_folder_that_can_not_be_written(tmp_path, data, tokenizer, monkeypatch, obstacle):
    from tarflow_hf import training as module

    folder = tmp_path / "runs" / "mine"
    if obstacle == "a file":
        folder.parent.write_text("no folder")
    else:
        if os.geteuid() == 0:
            pytest.skip("nothing is forbidden to the superuser")
        folder.mkdir(parents=True)
        folder.chmod(0o500)

    monkeypatch.setattr(module, "compute_loss", lambda *_: pytest.fail("a step was taken"))
    with pytest.raises(OSError, match=f"output_dir {folder} can't be written to: .*Choose another"):
        run(folder, data, tokenizer)


# ------------------------------------------------------------------------------------------- stages


def entries(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


@pytest.mark.parametrize("ema_decay", [0.0, 0.5])
def test_progressive_training_freezes_what_is_done(tmp_path, data, tokenizer, ema_decay):
    """Each stage changes its flow (the first the codebook, too) and nothing else by one bit; the
    last changes all.
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
    """The backward pass of a CDF would be that of a frozen flow: the trained flow, the last one,
    needs none.
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
    """The first stage gives the losses and the weights of a model that has the first flow alone."""
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
    """A stage ends when two evaluations in a row were no better, with the weights of the best one;
    also after a resume between them. The codebook and flow 1 are those of step 4, flow 2 of step
    10; the joint stage ends by its budget.
    """
    from tarflow_hf import training as module

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
        return module.Likelihood(values[step[0]], 1, 0.0)

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


# ----------------------------------------------------------------------------------- the same curve


def test_two_processes_give_the_losses_of_one(tmp_path):
    """And the validations, which they share. DDP and FSDP2 on gloo: a flow model, the discrete one,
    a stream in parts, a conditional model, whose processes miss different numbers of tokens, and
    the stages.
    """
    import two_processes

    command = [
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--standalone",
        str(Path(__file__).parent),
    ]
    command[-1] += "/two_processes.py"
    paths = [str(ROOT / "src"), str(Path(__file__).parent)]
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
    """In parts also of a conditional model: with the latents' noise, what is observed is that of
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


def run_that_may_be_killed(folder: Path) -> None:
    options = {"mode": "progressive", "stage_steps": [20, 20], "save_every": 1, "eval_sequences": 2}
    tokenizer = character_tokenizer()
    resume = any(folder.glob("checkpoint-*"))
    run(
        folder,
        PackedTokens([TEXT], tokenizer, 16),
        tokenizer,
        keep_checkpoints=1,
        resume=resume,
        **options,
    )


@pytest.fixture
def one_thread():
    """As the processes that are compared with this one have."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_killed_run_goes_on(tmp_path, one_thread):
    """SIGKILL at random moments of a run that saves at every step: the log is that of a run that
    nobody killed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(Path(__file__).parent)])
    code = "import sys, pathlib, test_training as t; t.run_that_may_be_killed(pathlib.Path(sys.argv[1]))"
    command, draw = [sys.executable, "-c", code, str(tmp_path / "killed")], random.Random()
    run_that_may_be_killed(tmp_path / "whole")

    for first_step in (0, 15):  # begins after this step's checkpoint
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        while process.poll() is None and not newer(tmp_path / "killed", first_step):
            time.sleep(0.001)

        time.sleep(draw.uniform(0, 0.2))
        process.kill()
        assert process.wait() == -signal.SIGKILL

    run_that_may_be_killed(tmp_path / "killed")
    for name in ("stage", "loss", "learning_rate", "validation_loss"):
        a, b = (
            [(e["step"], e.get(name)) for e in entries(tmp_path / run)]
            for run in ("whole", "killed")
        )
        assert a == b

    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == [
        "checkpoint-40",
        "log.jsonl",
        "model",
    ]
    a, b = (TarFlowLMModel.from_pretrained(tmp_path / run / "model") for run in ("whole", "killed"))
    assert_same_weights(a, b)


def newer(folder: Path, step: int) -> bool:
    """Whether there is a checkpoint of this step or a later one."""
    return any(int(path.name.split("-")[1]) >= step for path in folder.glob("checkpoint-*"))


# --------------------------------------------------------------------------------------- throughput


@pytest.mark.parametrize("patch_size", [1, 4])
@pytest.mark.parametrize("coupling", ["affine", "mixture_cdf", "mixture_rosenblatt", "baseline"])
def test_flops_are_those_that_torch_counts(coupling, patch_size):
    """Within 3%: what is left out are rotations and, of the Mix-d coupling, the products with the
    codebook.
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
    """Three flows of one layer of width 16 with feed-forward width 64, attention over 16 positions."""
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


def test_the_log_says_how_fast(tmp_path, data, tokenizer, monkeypatch):
    from tarflow_hf import training as module

    monkeypatch.setattr(module, "peak_flops", lambda *_: 1e12)
    model, _ = run(tmp_path, data, tokenizer, num_steps=4, log_every=2, eval_sequences=4)

    for entry in (entry for entry in entries(tmp_path) if "loss" in entry):
        expected = entry["tokens_per_second"] * training_flops(model, 16) / 16
        assert entry["flops_per_second"] == pytest.approx(expected, rel=0.05)
        assert entry["model_flops_utilization"] == entry["flops_per_second"] / 1e12
        assert 0.05 < entry["peak_memory_gib"] < 50


# -------------------------------------------------------------------------------------- the scripts


def script(name: str, *arguments: str, capsys, monkeypatch) -> str:
    """What a script of examples/ prints, run as if from the command line."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    capsys.readouterr()
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    return capsys.readouterr().out


def arguments_of(*arguments: str, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    return runpy.run_path(str(ROOT / "examples" / "train.py"))["parse_arguments"]()


@pytest.mark.parametrize(
    "recipe", sorted(path.stem for path in (ROOT / "examples" / "recipes").iterdir())
)
def test_recipes(tmp_path, data, tokenizer, monkeypatch, recipe):
    """Each is read by its name, builds, and runs two steps in each stage, at reduced size."""
    run_options, training, fields = arguments_of("--recipe", recipe, monkeypatch=monkeypatch)
    fields |= {
        "vocab_size": 27,
        "max_position_embeddings": 16,
        "hidden_size": 8,
        "num_attention_heads": 2,
    }
    fields["flows"] = [{**flow, "num_hidden_layers": 1} for flow in fields["flows"]]
    for flow in fields["flows"]:
        flow |= {name: 2 for name in ("num_components", "head_hidden_size") if name in flow}

    reduced = TarFlowLMConfig(**fields)
    baseline = run_options.model == "ar"
    num_stages = len(make_stages(TarFlowLMModel(reduced), training))
    assert training.stage_steps is None or len(training.stage_steps) == num_stages
    options = {"mode": training.mode, "num_steps": 2 * num_stages, "eval_sequences": 2}
    _, losses = run(tmp_path, data, tokenizer, reduced, baseline=baseline, **options)
    assert len(losses) == 2 * num_stages and all(1 < loss < 20 for loss in losses.values())
    assert run_options.dataset == {
        "demo": "python-docs",
        "python": "python-docs",
        "text8": "afmck/text8",
    }.get(recipe.split("_")[0], "Skylion007/openwebtext")


def test_the_command_line_wins_over_the_recipe(tmp_path, monkeypatch):
    get = partial(arguments_of, monkeypatch=monkeypatch)
    run_options, training, fields = get(
        "--recipe", "text8_mixd", "--stage_steps", "3", "2", "1", "--dataset", "x.txt"
    )
    assert (
        training.mode == "progressive"
        and training.stage_steps == [3, 2, 1]
        and run_options.dataset == "x.txt"
    )
    assert [flow["num_hidden_layers"] for flow in fields["flows"]] == [2, 2, 8] and fields[
        "latent_size"
    ] == 5
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"config": {"latent_size": 3}, "options": {"num_steps": 7}}))
    _, training, fields = get("--recipe", str(path))
    assert training.num_steps == 7 and fields == {"latent_size": 3}
    saved = tmp_path / "config.json"
    config().save_pretrained(tmp_path)
    _, training, fields = get("--recipe", str(path), "--config", str(saved))
    assert training.num_steps == 7 and fields["hidden_size"] == 16
    TarFlowLMConfig(**fields)


@pytest.mark.parametrize(
    "content, arguments, message",
    [
        (None, ["--recipe", "text8_mixed"], "no recipe 'text8_mixed': did you mean text8_mixd"),
        (None, ["--recipe", "zebra"], "no recipe 'zebra': there are demo, .*, text8_deep"),
        (None, ["--recipe", "zebra.json"], "no recipe 'zebra.json'"),
        ({"opts": {}}, [], "no key in the recipe .*'opts': did you mean options"),
        (
            {"options": {"num_step": 1}},
            [],
            "no option of train.py, .*'num_step': did you mean num_steps",
        ),
        (
            {"config": {"hiden_size": 1}},
            [],
            "no field of TarFlowLMConfig 'hiden_size': did you mean hidden_size",
        ),
        ({}, ["--learning_rat3", "1"], "no option '--learning_rat3': did you mean --learning_rate"),
        ({}, ["astray"], "no option before 'astray'"),
    ],
)
def test_names_that_do_not_exist(tmp_path, monkeypatch, content, arguments, message):
    if content is not None:
        path = tmp_path / "mine.json"
        path.write_text(json.dumps(content))
        arguments = ["--recipe", str(path), *arguments]

    with pytest.raises(ValueError, match=message):
        arguments_of(*arguments, monkeypatch=monkeypatch)


def test_a_tokenizer_with_more_tokens_than_the_vocabulary(tmp_path, data, tokenizer, monkeypatch):
    """The script says so before the corpus is read, `train` before its first step."""
    small = config(vocab_size=26, flows=STACK[2:])
    small.save_pretrained(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["train.py", "--config", str(tmp_path / "config.json"), "--dataset", "none"]
    )
    with pytest.raises(ValueError, match="tokenizer has 27 tokens, the configuration only 26"):
        runpy.run_path(str(ROOT / "examples" / "train.py"), run_name="__main__")

    for baseline in (False, True):
        with pytest.raises(
            ValueError, match="tokenizer has 27 tokens, more than the model's vocab_size, 26"
        ):
            run(tmp_path / "run", data, tokenizer, small, baseline=baseline)

    assert not (tmp_path / "run").exists()


def benchmark(name: str, *arguments: str, capsys, monkeypatch) -> str:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # as for a script, which finds its neighbours
    return script(f"../benchmarks/{name}", *arguments, capsys=capsys, monkeypatch=monkeypatch)


def test_benchmark_of_training(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))  # whose measure.py it imports
    run = partial(benchmark, "training.py", capsys=capsys, monkeypatch=monkeypatch)
    printed = run(
        "--quick", "--batch_size", "1", "--stage", "2", "--output", str(tmp_path / "rows.jsonl")
    )
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["model"] for row in rows] == ["TarFlowLM", "Llama"] and {
        row["layers"] for row in rows
    } == {5}

    for row in rows:
        assert (
            row["tokens_per_second"] == pytest.approx(128 / row["seconds"])
            and len(row["seconds_of_rounds"]) == 3
        )

    ratio = rows[0]["tokens_per_second"] / rows[1]["tokens_per_second"]
    assert f"tokens/s of TarFlowLM / Llama: {ratio:.3f}" in printed
    with pytest.raises(ValueError, match=r"must be in 1, ..., 3, not 4"):
        run("--quick", "--num_flows", "4")


def test_memory_of_a_training_step(monkeypatch):
    """Weights, gradients and AdamW's two moments at least, and the activations of one sequence at
    most.
    """
    from benchmarks.measure import output_of_own_process

    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    options = ["--quick", "--memory_of", "Llama", "--batch_size", "1"]
    memory = output_of_own_process(str(ROOT / "benchmarks/training.py"), *options)["bytes"]
    assert 4 * 4 * 1_213_056 < memory < 2**28


def test_benchmark_of_generation(tmp_path, capsys, monkeypatch):
    options = [
        "--num_tokens",
        "8",
        "--batch_sizes",
        "1",
        "--patch_sizes",
        "1",
        "2",
        "--hidden_size",
        "32",
    ]
    options += [
        "--patch_steps",
        "2",
        "--train_steps",
        "0",
        "--repeats",
        "1",
        "--output",
        str(tmp_path / "rows.jsonl"),
    ]
    benchmark("generation.py", *options, capsys=capsys, monkeypatch=monkeypatch)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    modes = ["sequential", "parallel", "auto", "cached loop", "without a cache"]
    whole, patches = rows[:11], rows[11:]
    assert [(row["mode"], row["patch"]) for row in whole] == [
        ("transformers, Llama", 1), *((mode, patch) for patch in (1, 2) for mode in modes)
    ]  # fmt: skip
    for row in whole:
        assert row["ratio"] == pytest.approx(whole[0]["seconds"] / row["seconds"])

    assert [(row["patch"], row["head_layers"]) for row in patches] == [(1, 0), (2, 0), (2, 1)]
    assert all(3 < row["bits"] < 10 and row["speedup"] > 0 for row in patches)


@pytest.fixture
def study(monkeypatch):
    """The folder's modules import each other, as scripts do."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "study")
    yield
    for name in ("cases", "report"):
        sys.modules.pop(name, None)


def test_the_study_goes_on_where_it_stopped(tmp_path, capsys, monkeypatch, study):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT * 3)
    options = ["--dataset", "text.txt", "--hidden_size", "32", "--num_tokens", "32"]
    options += [
        "--num_steps",
        "6",
        "--batch_size",
        "4",
        "--test_sequences",
        "4",
        "--test_samples",
        "2",
    ]
    run = partial(benchmark, "study/run.py", *options, capsys=capsys, monkeypatch=monkeypatch)
    first = run("--cases", "discrete", "--output", "rows.jsonl")
    assert first.splitlines()[-1].startswith("| discrete |") and ", exact |" in first
    cases = ["discrete", "affine", "Mix-d, deep, progressive", "patch 2, equal FLOPs"]
    printed = run("--cases", *cases, "--output", "rows.jsonl")
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    assert [row["case"] for row in rows] == cases and "discrete, seed" not in printed
    assert first.splitlines()[-1].split("|")[5] in printed

    for row, equal in zip(rows, ["parameters"] * 3 + ["training_flops_per_token"], strict=True):
        assert row[equal] == pytest.approx(rows[0][equal], rel=0.03)
        assert (
            f"| {row['case']} | {row['parameters']:,} |" in printed
            and f"{row['elbo_bits_per_character']:.3f}" in printed
        )

    # The stack of a progressive run, cut after its flows: the whole is the last.
    assert (
        len(rows[2]["bits_after_flows"]) == 3
        and rows[2]["bits_after_flows"][-1] == rows[2]["elbo_bits_per_character"]
    )

    pytest.importorskip("matplotlib")
    Path("page.md").write_text("# What it says\n\nText.\n\n")

    for _ in range(2):  # made again, it is the same
        script(
            "../benchmarks/study/report.py",
            "rows.jsonl",
            "--output",
            "page.md",
            capsys=capsys,
            monkeypatch=monkeypatch,
        )

    page = Path("page.md").read_text()
    assert (
        page.startswith("# What it says") and page.count("### Models") == 1 and "(page.svg)" in page
    )
    assert Path("page.svg").read_text().count("<svg ") == 1


def test_every_case_of_the_study_is_as_large_as_the_discrete_model(study):
    from cases import CASES, build

    fields = {"vocab_size": 27, "latent_size": 5, "max_position_embeddings": 64, "hidden_size": 64}
    for case in CASES:  # a case that can't be brought within 3% raises
        assert build(case, 6, {**fields, "num_attention_heads": 2}).num_parameters() > 0


@pytest.mark.parametrize(
    "path", sorted((ROOT / "examples" / "accelerate").iterdir()), ids=lambda path: path.stem
)
def test_accelerate_reads_its_configs(path):
    from accelerate.commands.config import load_config_from_file

    loaded = load_config_from_file(str(path))
    assert loaded.mixed_precision == "bf16" and loaded.num_processes == 8 * loaded.num_machines


def test_the_scripts_end_to_end(tmp_path, capsys, monkeypatch):
    """Train a flow and its baseline on a text file, sample, and score text."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT * 3)
    Path("config.json").write_text(json.dumps(replace_sizes(config().to_diff_dict())))
    options = [
        "--dataset",
        "text.txt",
        "--config",
        "config.json",
        "--num_steps",
        "6",
        "--batch_size",
        "4",
    ]
    options += ["--test_sequences", "8", "--test_samples", "2"]
    run = partial(script, capsys=capsys, monkeypatch=monkeypatch)

    # In a process of its own: as the command line has it, and as if `datasets` were not installed.
    Path("datasets.py").write_text("raise ImportError('not installed')")
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--num_processes=1",
        str(ROOT / "examples/train.py"),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT / "src")])}
    done = subprocess.run(
        [*command, *options, "--output_dir", "flow"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (
        "A sample:" in done.stdout
        and "bound, 2 samples" in done.stdout
        and "Saved to flow/model" in done.stdout
    )
    assert "exact" in run("train.py", *options, "--output_dir", "ar", "--model", "ar")

    sample = ["generate.py", "flow/model", "--num_samples", "2", "--show_states", "--seed", "3"]
    first = run(*sample)
    assert first == run(*sample) and first.count("[before flow 1]") == 2
    assert run("generate.py", "flow/model", "--prompt", "the fox").startswith("the fox")

    cut = run(
        "evaluate.py", "flow/model", "--data", "text.txt", "--num_samples", "1", "--num_flows", "1"
    )
    scored = run("evaluate.py", "flow/model", "--data", "text.txt", "--num_samples", "3")
    assert "per word" in scored and "No window slides" in scored
    assert cut.splitlines()[1] != scored.splitlines()[1]
    num_tokens = len(character_tokenizer()(TEXT * 3).input_ids)
    assert (
        f"{num_tokens:,} tokens" in scored
        and "bound, 1 sample" in scored
        and "bound, 3 samples" in scored
    )
    assert f"{num_tokens:,} tokens" in run("evaluate.py", "ar/model", "--data", "text.txt")


def replace_sizes(fields: dict) -> dict:
    names = (
        "latent_size",
        "max_position_embeddings",
        "hidden_size",
        "num_attention_heads",
        "flows",
    )

    return {name: fields[name] for name in names}
