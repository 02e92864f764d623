"""A run's folder is its own: others are refused, and nothing of theirs is touched."""

import json
import shutil
import subprocess
import sys

import pytest
from accelerate import Accelerator
from transformers import TrainingArguments

from helpers.training import entries, run, subprocess_environment
from tarflow_hf.training import check_output_dir, trainer_checkpoint
from tarflow_hf.training.folder import locked

OPTIONS = {"num_steps": 6, "save_every": 2, "eval_sequences": 2}


def content(folder):
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder): path.read_bytes() for path in files}


@pytest.mark.parametrize("kept", ["checkpoints", "model"])
def test_a_new_run_is_refused_where_another_one_was(tmp_path, data, tokenizer, kept):
    run(tmp_path, data, tokenizer, **OPTIONS)
    if kept == "model":
        for path in tmp_path.glob("checkpoint-*"):
            shutil.rmtree(path)

    before = content(tmp_path)
    ways_out = {
        "checkpoints": r"checkpoint-4, checkpoint-6.*--resume, or choose another --output_dir",
        "model": r"Choose another --output_dir, or move the model away",
    }
    with pytest.raises(FileExistsError, match=ways_out[kept]):
        run(tmp_path, data, tokenizer, learning_rate=0.1, **OPTIONS)

    assert content(tmp_path) == before
    check_output_dir(tmp_path, resume=True)


def test_a_log_without_a_checkpoint_is_no_obstacle(tmp_path, data, tokenizer, capsys):
    """Nothing of it could be continued: with and without `resume` the run begins anew."""
    for resume in (False, True):
        (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 9}\n')
        _, losses = run(tmp_path, data, tokenizer, resume=resume, **OPTIONS)
        assert len(losses) == 6 and losses[1] != 9
        assert ("begins anew" in capsys.readouterr().out) is resume
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()


def test_rotation_removes_only_what_this_run_wrote(tmp_path, data, tokenizer):
    """Two checkpoints were put there meanwhile. One stands where a save will go."""
    run(tmp_path, data, tokenizer, **{**OPTIONS, "num_steps": 4})
    other = {"step": 1, "stage": 0, "run_id": "another"}
    for name in ("checkpoint-1", "checkpoint-6", "checkpoint-best"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps(other))

    shutil.rmtree(tmp_path / "model")
    shutil.move(tmp_path / "checkpoint-6", tmp_path / "elsewhere")

    from tarflow_hf.training import loop as module

    original = module.save_checkpoint

    def save_checkpoint(accelerator, output_dir, progress, *rest):
        if progress.step == 6:
            shutil.move(tmp_path / "elsewhere", tmp_path / "checkpoint-6")
        original(accelerator, output_dir, progress, *rest)

    with pytest.MonkeyPatch.context() as patch, pytest.warns(UserWarning, match="num_steps was 4"):
        patch.setattr(module, "save_checkpoint", save_checkpoint)
        run(tmp_path, data, tokenizer, resume=True, keep_checkpoints=1, **OPTIONS)

    names = {path.name for path in tmp_path.iterdir()}
    own = {"checkpoint-6", "log.jsonl", "model"}
    assert names == own | {"checkpoint-1", "checkpoint-best", "checkpoint-6.other-1"}
    for name in ("checkpoint-1", "checkpoint-best", "checkpoint-6.other-1"):
        assert json.loads((tmp_path / name / "run.json").read_text()) == other

    assert len(json.loads((tmp_path / "checkpoint-6" / "run.json").read_text())["run_id"]) == 32


def test_where_the_trainer_goes_on(tmp_path):
    """A job that always asks for the newest checkpoint begins anew where there is none."""

    def checkpoint_of(given) -> str | None:
        options = {"resume_from_checkpoint": given, "use_cpu": True, "report_to": "none"}
        return trainer_checkpoint(TrainingArguments(output_dir=str(tmp_path), **options))

    assert checkpoint_of("true") is None and checkpoint_of("False") is None
    assert checkpoint_of("elsewhere/checkpoint-3") == "elsewhere/checkpoint-3"

    for name in ("config.json", "adapter_config.json"):
        (tmp_path / name).write_text("{}")
        for given in (None, "true"):
            with pytest.raises(FileExistsError, match="holds a trained model"):
                checkpoint_of(given)
        (tmp_path / name).unlink()

    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / "checkpoint-7" / "trainer_state.json").write_text("{}")
    assert checkpoint_of("true") == str(tmp_path / "checkpoint-7")
    with pytest.raises(FileExistsError, match="checkpoint-7"):
        checkpoint_of(None)


def test_a_folder_has_one_run_at_a_time(tmp_path):
    """The lock ends with its holder; a lock file that was left behind keeps nobody out."""
    (tmp_path / ".lock").write_text("process 1 on a machine that is gone")
    accelerator = Accelerator(cpu=True)
    with locked(tmp_path, accelerator):
        with pytest.raises(BlockingIOError, match=r"process \d+ on .*--resume, or choose another"):
            locked(tmp_path, accelerator).__enter__()
        assert (tmp_path / ".lock").exists()

    assert not list(tmp_path.iterdir())


def test_two_runs_started_at_once(tmp_path):
    """One of them trains; the other one is refused, and disturbs nothing."""
    code = "import sys, pathlib, helpers.training as t; t.run_that_may_be_killed(pathlib.Path(sys.argv[1]), 4)"
    command = [sys.executable, "-c", code, str(tmp_path)]
    options = {"env": subprocess_environment(), "stderr": subprocess.PIPE, "text": True}
    runs = [subprocess.Popen(command, **options) for _ in range(2)]
    errors = [process.communicate(timeout=120)[1] for process in runs]

    # The later one meets the lock, the checkpoints, or (started last) resumes a run that has ended.
    codes = sorted(process.returncode for process in runs)
    assert codes[0] == 0, errors
    assert codes[1] == 0 or any(
        "in use by another run" in error or "holds another run" in error for error in errors
    )
    assert [entry["step"] for entry in entries(tmp_path) if "loss" in entry] == list(range(1, 9))
