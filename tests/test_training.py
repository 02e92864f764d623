"""The training loop: what it computes, that it resumes exactly, and the scripts end to end."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from tarflow_hf import TarFlowLMConfig, TarFlowLMModel
from tarflow_hf.data import PackedTokens, StreamingPackedTokens, character_tokenizer
from tarflow_hf.evaluation import likelihood, negative_log_likelihood
from tarflow_hf.training import (
    TrainingConfig,
    compute_loss,
    discrete_baseline,
    draw_observed_mask,
    make_optimizer,
    save_model,
    train,
)

ROOT = Path(__file__).parents[1]
TEXT = "the quick brown fox jumps over the lazy dog and then it sleeps in the warm light of the sun " * 40


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer()


@pytest.fixture(scope="module")
def data(tokenizer):
    return PackedTokens([TEXT], tokenizer, 16)


def config(**changes) -> TarFlowLMConfig:
    flows = [
        {"coupling": "mixture_rosenblatt", "direction": "left_to_right", "num_hidden_layers": 1},
        {"coupling": "mixture_cdf", "direction": "right_to_left", "num_hidden_layers": 1, "num_components": 2},
    ]
    fields = {"vocab_size": 27, "latent_size": 2, "max_position_embeddings": 16, "hidden_size": 16, "flows": flows}
    return TarFlowLMConfig(**{**fields, "num_attention_heads": 2, **changes})


def run(tmp_path, data, tokenizer, model_config=None, train_data=None, baseline=False, **options):
    """Trains from scratch (or resumes) and returns the model and the losses by step."""
    AcceleratorState._reset_state(reset_partial_state=True)  # as a new process would begin
    set_seed(0)
    training = TrainingConfig(
        **{"output_dir": str(tmp_path), "num_steps": 8, "batch_size": 4, "warmup_steps": 2, "log_every": 1, **options}
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
    """Killed at step 64 of 70, where the second epoch has just begun: all later losses and the weights are the same."""
    options = {"num_steps": 70, "save_every": 30, "learning_rate": 0.01}
    if kind == "average, accumulation":
        options |= {"ema_decay": 0.9, "gradient_accumulation_steps": 2}
    if kind == "baseline":
        options |= {"baseline": True}

    def train_data():
        return StreamingPackedTokens([TEXT], tokenizer, 16, shuffle_buffer=8) if kind == "stream" else data

    whole, expected = run(tmp_path / "a", data, tokenizer, train_data=train_data(), **options)

    # A run killed between two checkpoints: the first half of the same schedule, then a fresh process' worth of state.
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
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["checkpoint-30", "checkpoint-60", "log.jsonl"]
    resumed, losses = run(tmp_path / "b", data, tokenizer, train_data=train_data(), resume=True, **options)
    assert losses == expected and len(losses) == 70
    assert_same_weights(whole, resumed)


@pytest.mark.parametrize("conditional", [False, True])
def test_what_is_observed_follows_from_seed_and_step(tmp_path, data, tokenizer, conditional):
    """A conditional run resumes exactly, and a checkpoint made before there were any resumes as what it was."""
    options = {"num_steps": 6, "save_every": 3, "eval_sequences": 4}
    whole, expected = run(tmp_path, data, tokenizer, config(conditional=conditional), **options)
    shutil.rmtree(tmp_path / "checkpoint-6")
    (tmp_path / "log.jsonl").write_text("")
    if not conditional:
        description = json.loads((tmp_path / "checkpoint-3" / "run.json").read_text())
        del description["model"]["conditional"]
        (tmp_path / "checkpoint-3" / "run.json").write_text(json.dumps(description))
        with pytest.raises(ValueError, match="conditional was False and is True"):
            run(tmp_path, data, tokenizer, config(conditional=True), resume=True, **options)
    resumed, losses = run(tmp_path, data, tokenizer, config(conditional=conditional), resume=True, **options)
    assert losses == {step: expected[step] for step in (4, 5, 6)}
    assert_same_weights(whole, resumed)


def test_accumulation_changes_nothing_but_the_noise(tmp_path, data, tokenizer):
    """The discrete baseline draws no latents: the same losses, computed in parts."""
    _, whole = run(tmp_path / "a", data, tokenizer, baseline=True)
    _, parts = run(tmp_path / "b", data, tokenizer, baseline=True, gradient_accumulation_steps=4)
    assert parts == pytest.approx(whole, abs=1e-4)


def test_a_run_with_another_seed_is_another_one(tmp_path, data, tokenizer):
    _, a = run(tmp_path / "a", data, tokenizer)
    _, b = run(tmp_path / "b", data, tokenizer)
    _, c = run(tmp_path / "c", data, tokenizer, seed=1)
    assert a == b and a[1] != c[1]


def test_training_learns(tmp_path, data, tokenizer):
    """Forty words over and over: both models come far below the first loss, and the flow's bound is honest."""
    for name, baseline in (("flow", False), ("ar", True)):
        options = {"num_steps": 150, "batch_size": 16, "learning_rate": 0.01, "warmup_steps": 10, "baseline": baseline}
        model, losses = run(tmp_path / name, data, tokenizer, config(latent_size=4), **options)
        assert losses[1] > 3 and losses[150] < 1.6
        assert likelihood(model, data, max_sequences=32).nats_per_token == pytest.approx(losses[150], abs=0.4)


def test_the_saved_model_is_the_trained_one(tmp_path, data, tokenizer):
    model, _ = run(tmp_path, data, tokenizer, ema_decay=0.5)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert isinstance(loaded, TarFlowLMModel)
    assert_same_weights(loaded, model)
    saved_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert saved_tokenizer("Hello, World").input_ids == tokenizer("hello world").input_ids
    checkpoint = TarFlowLMModel(config())
    from safetensors.torch import load_file

    checkpoint.load_state_dict(load_file(tmp_path / "checkpoint-8" / "model.safetensors"))
    assert not torch.equal(checkpoint.codebook.mean, model.codebook.mean)  # the average is not the last iterate


def test_averaged_weights(tmp_path, data, tokenizer):
    """After every step: average = decay average + (1 - decay) weights, beginning with the first weights."""
    from tarflow_hf import training as module

    seen = []
    original = module.AveragedModel.update_parameters
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            module.AveragedModel,
            "update_parameters",
            lambda self, model: (original(self, model), seen.append(model.flow.codebook.mean.detach().clone()))[0],
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


@pytest.mark.parametrize("patch_size", [1, 4])
def test_observed_masks_are_of_three_kinds(patch_size):
    mask = draw_observed_mask((6000, 32 * patch_size), patch_size, torch.Generator().manual_seed(0))
    patches = mask.unflatten(1, (32, patch_size))
    assert torch.equal(patches.all(-1), patches.any(-1)) and not mask.all(-1).any()
    observed = patches.all(-1)
    length = observed.sum(-1)
    is_prefix = (observed == (torch.arange(32) < length[:, None])).all(-1)
    # A third is nothing, a third a prefix of any length alike; spans are a third, and few of them look like the others.
    is_nothing = length == 0
    for kind in (is_nothing, is_prefix & ~is_nothing, ~is_prefix):
        assert 0.25 < kind.float().mean() < 0.45
    counts = torch.bincount(length[is_prefix & ~is_nothing], minlength=32)[1:]
    assert counts.min() > 0.5 * counts.float().mean()
    spans = observed[~is_prefix]
    assert (spans.float().mean(0) - 0.5).abs().max() < 0.06  # wherever it is
    num_spans = (spans.diff(dim=-1) != 0).sum(-1)
    assert num_spans.min() <= 2 and num_spans.max() >= 16
    assert not draw_observed_mask((5, patch_size), patch_size).any()  # one position is never observed


def test_the_discrete_baseline_scores_every_token():
    """Its loss against the probabilities of the sequence, token by token; a distribution over all sequences."""
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
    # One entry of the vocabulary is the start itself, which no text contains: what is lost to it is all that is lost.
    torch.testing.assert_close(nats, -logits.gather(-1, everything[..., None]).sum((1, 2)))
    assert (-nats).exp().sum() < 1


def test_likelihood_of_text(data):
    set_seed(0)
    model = TarFlowLMModel(config())
    sequences = [data[i] for i in range(10)] + [{"input_ids": data[10]["input_ids"][:5]}]
    result = likelihood(model, sequences, batch_size=4)
    assert result.num_tokens == 165
    repeated = likelihood(model, sequences, batch_size=4)
    assert result == repeated != likelihood(model, sequences, batch_size=4, seed=1)
    nats = torch.tensor([likelihood(model, [s], seed=i).nats_per_token for i, s in enumerate(sequences)])
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
    assert {"flow.codebook.mean", "flow.codebook.log_scale"} <= {names[id(p)] for p in kept["params"]}
    assert all(p.ndim >= 2 and not names[id(p)].endswith("bias") for p in decayed["params"])


def test_bfloat16(tmp_path, data, tokenizer):
    model, losses = run(tmp_path, data, tokenizer, mixed_precision="bf16")
    _, exact = run(tmp_path / "exact", data, tokenizer)
    assert model.codebook.mean.dtype == torch.float32
    assert losses == pytest.approx(exact, abs=0.05) and losses != exact


def test_bad_input(tmp_path, data, tokenizer):
    with pytest.raises(ValueError, match="fewer than batch_size"):
        run(tmp_path, data, tokenizer, batch_size=1000)
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
        ValueError, match=r"another run: latent_size was 2 and is 3; learning_rate was 0.002 and is 0.1"
    ):
        run(tmp_path, data, tokenizer, config(latent_size=3), resume=True, learning_rate=0.1)
    other_text = PackedTokens([TEXT.replace("fox", "cat")], tokenizer, 16)
    with pytest.raises(ValueError, match=r"another run: checksum of the data was \d+ and is \d+"):
        run(tmp_path, data, tokenizer, train_data=other_text, resume=True)
    assert (tmp_path / "checkpoint-8").exists()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, data, tokenizer, monkeypatch):
    from tarflow_hf import training as module

    monkeypatch.setattr(module, "compute_loss", lambda *a: compute_loss(*a) * torch.nan)
    with pytest.raises(FloatingPointError, match="step 1"):
        run(tmp_path, data, tokenizer)


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


# --------------------------------------------------------------------------------------------------- the scripts


def script(name: str, *arguments: str, capsys, monkeypatch) -> str:
    """What a script of examples/ prints, run as if from the command line."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    capsys.readouterr()
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    return capsys.readouterr().out


def test_the_scripts_end_to_end(tmp_path, capsys, monkeypatch):
    """Train a flow and its baseline on a text file, sample, and score text."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT * 3)
    Path("config.json").write_text(json.dumps(replace_sizes(config().to_diff_dict())))
    options = ["--dataset", "text.txt", "--config", "config.json", "--num_steps", "6", "--batch_size", "4"]
    options += ["--test_sequences", "8", "--test_samples", "2"]
    run = partial(script, capsys=capsys, monkeypatch=monkeypatch)

    # In a process of its own: as the command line has it, and as if `datasets` were not installed.
    Path("datasets.py").write_text("raise ImportError('not installed')")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", str(ROOT / "examples/train.py")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT / "src")])}
    done = subprocess.run(
        [*command, *options, "--output_dir", "flow"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "A sample:" in done.stdout and "bound, 2 samples" in done.stdout and "Saved to flow/model" in done.stdout
    assert "exact" in run("train.py", *options, "--output_dir", "ar", "--model", "ar")

    sample = ["generate.py", "flow/model", "--num_samples", "2", "--show_states", "--seed", "3"]
    first = run(*sample)
    assert first == run(*sample) and first.count("[before flow 1]") == 2
    assert run("generate.py", "flow/model", "--prompt", "the fox").startswith("the fox")

    scored = run("evaluate.py", "flow/model", "--data", "text.txt", "--num_samples", "3")
    num_tokens = len(character_tokenizer()(TEXT * 3).input_ids)
    assert f"{num_tokens:,} tokens" in scored and "bound, 1 sample" in scored and "bound, 3 samples" in scored
    assert f"{num_tokens:,} tokens" in run("evaluate.py", "ar/model", "--data", "text.txt")


def replace_sizes(fields: dict) -> dict:
    names = ("latent_size", "max_position_embeddings", "hidden_size", "num_attention_heads", "flows")
    return {name: fields[name] for name in names}
