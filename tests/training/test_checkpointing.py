"""A run resumes exactly, and an interrupted save leaves what was there."""

import os
import shutil

import pytest

from helpers.training import (
    TEXT,
    assert_same_weights,
    config,
    run,
)
from tarflow_hf import TarFlowLMModel
from tarflow_hf.data import StreamingPackedTokens
from tarflow_hf.training import save_model
from tarflow_hf.training.checkpointing import Progress, save_checkpoint

KINDS = ["plain", "average, accumulation", "stream", "baseline", "muon", "dropout"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, data, tokenizer, kind):
    """A run killed at step 64 of 70 gives the same later losses and weights.

    At step 64 the second epoch has just begun.
    """
    options = {"num_steps": 70, "save_every": 30, "learning_rate": 0.01}
    if kind == "average, accumulation":
        options |= {"ema_decay": 0.9, "gradient_accumulation_steps": 2}

    if kind == "muon":
        options |= {"optimizer": "muon"}

    if kind == "baseline":
        options |= {"baseline": True}

    if kind == "dropout":
        sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
        block_config = {"model_type": "gpt_neox", **sizes, "hidden_dropout": 0.3}
        options |= {"model_config": config(block_config=block_config)}

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

    from tarflow_hf.training import loop as module

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
    """A conditional run resumes exactly, and only as a conditional run."""
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
    """The system lets no file grow beyond some size once step 6 is due.

    That looks like a full disk.
    """
    import resource

    from tarflow_hf.training import loop as module

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


def test_a_process_leaves_alone_what_others_still_write(tmp_path):
    """All processes write to one folder: one that is ready earlier may not look at the others' files."""
    part = tmp_path / ".checkpoint-3.part"

    class OtherProcess:
        is_main_process = False

        def save_state(self, folder):
            part.mkdir()
            (part / ".tmp1234").symlink_to(tmp_path / "not yet there")

        def wait_for_everyone(self):
            pass

    save_checkpoint(OtherProcess(), tmp_path, Progress(step=3), {}, 2, None, None)
    assert os.listdir(part) == [".tmp1234"]


@pytest.mark.parametrize("obstacle", ["a file", "no permission"])
def test_an_output_folder_that_can_not_be_written(tmp_path, data, tokenizer, monkeypatch, obstacle):
    from tarflow_hf.training import loop as module

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


def test_a_configuration_may_serve_a_run_twice(tmp_path, data, tokenizer):
    """A model leaves its dtype in its configuration; that is no other model."""
    shared = config()
    run(tmp_path, data, tokenizer, shared, num_steps=4, save_every=2)
    _, losses = run(tmp_path, data, tokenizer, shared, num_steps=6, resume=True)
    assert len(losses) == 6
