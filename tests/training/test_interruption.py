"""A run that is asked to end saves itself and goes on as if nothing had been."""

import copy
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from helpers import ROOT
from helpers.training import (
    TEXT,
    assert_same_weights,
    entries,
    run,
    run_that_may_be_killed,
    subprocess_environment,
)
from tarflow_hf import TarFlowLMModel
from tarflow_hf.data import StreamingPackedTokens
from tarflow_hf.training import MAY_DIFFER, MAY_MATTER, RunStopped, TrainingConfig
from tarflow_hf.training import loop as module

OPTIONS = {"num_steps": 12, "log_every": 5, "eval_sequences": 2, "learning_rate": 0.01}


def stop_at(step, number, patch):
    """Sends a signal to this process in a step."""
    original = module.Run._draw

    def draw(self):
        if self.progress.step + 1 == step:
            os.kill(os.getpid(), number)
        return original(self)

    patch.setattr(module.Run, "_draw", draw)


def curve(folder):
    names = ("step", "loss", "learning_rate", "validation_loss")
    return [[entry.get(name) for name in names] for entry in entries(folder)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [7, 10])
def test_a_signal_saves_the_run(tmp_path, data, tokenizer, monkeypatch, number, step):
    """In the middle of two lines of the log, and at one: the log is the uninterrupted run's."""
    before = signal.getsignal(number)
    whole, _ = run(tmp_path / "a", data, tokenizer, **OPTIONS)
    with monkeypatch.context() as patch:
        stop_at(step, number, patch)
        with pytest.raises(RunStopped, match=f"after step {step}, saved in .*checkpoint-{step}"):
            run(tmp_path / "b", data, tokenizer, **OPTIONS)

    assert signal.getsignal(number) is before
    resumed, _ = run(tmp_path / "b", data, tokenizer, resume=True, **OPTIONS)
    assert curve(tmp_path / "a") == curve(tmp_path / "b")
    assert_same_weights(whole, resumed)


def test_a_signal_in_the_last_step_lets_the_run_end(tmp_path, data, tokenizer, monkeypatch):
    stop_at(12, signal.SIGTERM, monkeypatch)
    run(tmp_path, data, tokenizer, **OPTIONS)
    assert (tmp_path / "model" / "model.safetensors").exists()


def test_a_run_is_saved_by_time(tmp_path, data, tokenizer, monkeypatch):
    """Without `save_every`; the log has no line more."""
    run(tmp_path / "a", data, tokenizer, **OPTIONS)
    seen = []
    original = module.save_checkpoint
    monkeypatch.setattr(module, "FEWEST_SECONDS", 0)
    monkeypatch.setattr(
        module, "save_checkpoint", lambda *a: (seen.append(a[2].step), original(*a))
    )
    run(tmp_path / "b", data, tokenizer, **{**OPTIONS, "save_minutes": 1e-9})
    assert seen == list(range(1, 13))
    assert curve(tmp_path / "a") == curve(tmp_path / "b")
    assert sorted(p.name for p in (tmp_path / "b").glob("check*")) == [
        "checkpoint-11",
        "checkpoint-12",
    ]


def test_a_run_can_be_ended_early_with_a_model(tmp_path, data, tokenizer, monkeypatch):
    staged = {**OPTIONS, "mode": "progressive", "stage_steps": [6, 6]}
    with monkeypatch.context() as patch:
        stop_at(4, signal.SIGINT, patch)
        with pytest.raises(RunStopped, match="with --resume --finish"):
            run(tmp_path, data, tokenizer, **staged)

    model, _ = run(tmp_path, data, tokenizer, resume=True, finish=True, **staged)
    assert_same_weights(TarFlowLMModel.from_pretrained(tmp_path / "model"), model)
    assert_same_weights(TarFlowLMModel.from_pretrained(tmp_path / "checkpoint-4"), model)
    with pytest.raises(ValueError, match="finish ends a run that is resumed"):
        TrainingConfig(finish=True)


def test_a_run_can_be_lengthened(tmp_path, data, tokenizer):
    """It goes on with the learning rates that the longer schedule has there."""
    _, first = run(tmp_path, data, tokenizer, num_steps=6)
    run(tmp_path.with_name("whole"), data, tokenizer, num_steps=12)
    with pytest.warns(UserWarning, match="num_steps was 6 and is 12: the schedule"):
        _, losses = run(tmp_path, data, tokenizer, num_steps=12, resume=True)

    assert len(losses) == 12 and {step: losses[step] for step in first} == first
    rates = [
        {entry["step"]: entry["learning_rate"] for entry in entries(folder) if "loss" in entry}
        for folder in (tmp_path, tmp_path.with_name("whole"))
    ]
    assert [rates[0][step] for step in range(7, 13)] == [rates[1][step] for step in range(7, 13)]


def test_a_checkpoint_can_be_looked_into(tmp_path, data, tokenizer):
    """It loads as a model, with its tokenizer and its code."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run(tmp_path, data, tokenizer, num_steps=4, save_every=2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    assert_same_weights(model, TarFlowLMModel.from_pretrained(tmp_path / "model"))
    assert AutoTokenizer.from_pretrained(tmp_path / "checkpoint-2")("a").input_ids == [1]
    assert (tmp_path / "checkpoint-4" / "modeling_tarflowlm.py").exists()


@pytest.mark.parametrize("damage", ["cut", "missing", "no run.json", "half a run.json"])
def test_a_checkpoint_that_is_not_whole_is_not_taken(tmp_path, data, tokenizer, damage):
    options = {"num_steps": 6, "save_every": 2, "eval_sequences": 2}
    _, expected = run(tmp_path, data, tokenizer, **options)
    newest = tmp_path / "checkpoint-6"
    if damage == "cut":
        path = newest / "optimizer.bin"
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "missing":
        (newest / "model.safetensors").unlink()
    elif damage == "no run.json":
        (newest / "run.json").unlink()
    else:
        (newest / "run.json").write_text((newest / "run.json").read_text()[:100])

    with pytest.warns(UserWarning, match=r"checkpoint-6 is not whole \(.*an older one is taken"):
        _, losses = run(tmp_path, data, tokenizer, resume=True, **options)

    assert losses == expected
    assert json.loads((newest / "run.json").read_text())["step"] == 6


@pytest.mark.parametrize("name", ["torch", "transformers", "accelerate", "threads", "processes"])
def test_what_may_matter_is_a_warning_that_names_it(tmp_path, data, tokenizer, name):
    _, expected = run(tmp_path, data, tokenizer, num_steps=4)
    path = tmp_path / "checkpoint-4" / "run.json"
    described = json.loads(path.read_text())
    described["environment"][name] = "9.9"
    described["model"]["transformers_version"] = "5.0.0"
    path.write_text(json.dumps(described))
    with pytest.warns(UserWarning, match=rf"^On resuming, {name} was '9.9' and is .*: ") as caught:
        _, losses = run(tmp_path, data, tokenizer, num_steps=4, resume=True)

    assert losses == expected
    assert sum("On resuming" in str(each.message) for each in caught) == 1


def test_another_version_of_the_library_has_other_fields_of_a_decoder(tmp_path, data, tokenizer):
    """Fields that are new, or gone, and say nothing are no difference; all others are."""
    _, expected = run(tmp_path, data, tokenizer, num_steps=4)
    path = tmp_path / "checkpoint-4" / "run.json"
    described = json.loads(path.read_text())
    block = described["model"]["block_config"]
    assert block.pop("attention_bias") is False  # its default
    block |= {"transformers_version": "5.22.2", "a_field_that_is_gone": 1}
    path.write_text(json.dumps(described))
    _, losses = run(tmp_path, data, tokenizer, num_steps=4, resume=True)
    assert losses == expected

    described = json.loads(path.read_text())
    for name, value, message in (
        ("attention_bias", True, "block_config.attention_bias was True and is False"),
        ("hidden_size", None, r"block_config.hidden_size was \d+ and is \d+"),
    ):
        changed = copy.deepcopy(described)
        changed["model"]["block_config"][name] = value
        if value is None:
            del changed["model"]["block_config"][name]  # then it was the default's 4096

        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=f"another run: {message}"):
            run(tmp_path, data, tokenizer, num_steps=4, resume=True)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"text": TEXT.replace("fox", "cat")}, "checksum of the stream's first 64 sequences was"),
        ({"shuffle_buffer": 4}, "shuffle buffer was 8 and is 4"),
        ({"seed": 1}, "seed of the order was 0 and is 1"),
    ],
)
def test_another_stream_is_another_run(tmp_path, data, tokenizer, change, message):
    def stream(text=TEXT, **options):
        return StreamingPackedTokens(
            [text], tokenizer, 16, **{"shuffle_buffer": 8, "seed": 0, **options}
        )

    run(tmp_path, data, tokenizer, train_data=stream(), num_steps=4)
    with pytest.raises(ValueError, match=f"another run: .*{message}"):
        run(tmp_path, data, tokenizer, train_data=stream(**change), num_steps=4, resume=True)


def test_other_parts_give_the_same_curve(tmp_path, data, tokenizer, monkeypatch):
    """A run that is resumed with another `gradient_accumulation_steps` takes whole steps."""
    options = {"num_steps": 6, "eval_sequences": 2}
    _, expected = run(tmp_path / "a", data, tokenizer, **options)
    with monkeypatch.context() as patch:
        stop_at(3, signal.SIGTERM, patch)
        with pytest.raises(RunStopped):
            run(tmp_path / "b", data, tokenizer, **options)

    _, losses = run(
        tmp_path / "b", data, tokenizer, resume=True, gradient_accumulation_steps=4, **options
    )
    assert losses == pytest.approx(expected, rel=1e-5)


def test_every_option_has_its_place():
    """Each field is free, may matter, or is compared; the names are fields or facts."""
    fields = set(TrainingConfig().__dict__)
    environment = {"python", "torch", "transformers", "accelerate", "tarflow_hf"}
    environment |= {"device", "processes", "threads"}
    assert set(MAY_DIFFER) <= fields and not set(MAY_DIFFER) & set(MAY_MATTER)
    assert set(MAY_MATTER) - fields == environment

    page = (ROOT / "docs" / "training.md").read_text("utf-8")
    table = page.split("Differences on resume")[1].split("\n## ")[0]
    assert [name for name in {**MAY_DIFFER, **MAY_MATTER} if f"`{name}`" not in table] == []


def test_a_run_killed_at_random_moments(tmp_path, one_thread):
    """SIGKILL, SIGTERM and SIGINT, in and out of saves: no checkpoint lost, the same curve.

    `KILLS=50 pytest -k random_moments` takes about eight minutes.
    """
    code = "import sys, pathlib, helpers.training as t; t.run_that_may_be_killed(pathlib.Path(sys.argv[1]))"
    folder, draw = tmp_path / "killed", random.Random()
    options = {"env": subprocess_environment(), "stderr": subprocess.DEVNULL}
    options["stdout"] = subprocess.DEVNULL
    run_that_may_be_killed(tmp_path / "whole")
    reached = 0

    for _ in range(int(os.environ.get("KILLS", "2"))):
        process = subprocess.Popen([sys.executable, "-c", code, str(folder)], **options)
        lock, begin = folder / ".lock", time.time()
        while process.poll() is None and not (lock.exists() and lock.stat().st_mtime > begin):
            time.sleep(0.005)

        time.sleep(draw.uniform(0, 0.8))
        process.send_signal(draw.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
        process.wait(timeout=60)
        steps = [int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*")]
        assert max(steps, default=0) >= reached
        reached = max(steps, default=0)

    run_that_may_be_killed(folder)
    assert curve(folder) == curve(tmp_path / "whole")
    models = [
        TarFlowLMModel.from_pretrained(path / "model") for path in (folder, tmp_path / "whole")
    ]
    assert_same_weights(*models)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["checkpoint-40", "log.jsonl", "model"]


def test_evaluating_changes_no_loss(tmp_path, data, tokenizer):
    """Training goes on as if nobody had looked."""
    _, plain = run(tmp_path / "a", data, tokenizer, num_steps=6)
    _, watched = run(tmp_path / "b", data, tokenizer, num_steps=6, eval_every=1, eval_sequences=9)
    assert plain == watched


def test_a_log_that_can_not_be_written(tmp_path):
    """The system lets no file grow beyond some size, as a full disk would."""
    import resource

    from tarflow_hf.training.log import JsonLines

    lines = JsonLines(tmp_path / "log.jsonl", 0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match=r"log.jsonl could not be written.*Make room, then go on"):
            for step in range(100):
                lines.write({"step": step})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
