"""Checkpoints of a run. They are written to the side and then renamed.

So a checkpoint is whole, whenever a run is killed. It carries the sizes of its files, so that one
that was damaged later (copied in part, say) is not taken for whole.
"""

import json
import os
import platform
import re
import shutil
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import custom_object_save
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .. import __version__
from .batches import HeldOutData, TrainingData
from .config import MAY_MATTER, TrainingConfig

# Fields of a model's configuration that say how it was saved, not what it is.
NOT_THE_MODEL = {"transformers_version", "architectures", "auto_map", "_name_or_path", "dtype"}


@dataclass
class Progress:
    """The point that a run has reached."""

    step: int = 0  # optimiser steps in all
    stage: int = 0  # index
    stage_step: int = 0  # of them in this stage
    best: float | None = None  # validation of the stage, nats per token
    stale: int = 0  # evaluations since then
    logged_step: int | None = None  # of the log's last line of losses; None: this one
    total: float = 0.0  # the sum of the losses since then
    run_id: str = ""  # the same in all checkpoints of a run

    def next_stage(self) -> "Progress":
        return Progress(self.step, self.stage + 1, logged_step=self.step, run_id=self.run_id)


class BestWeights:
    """The weights that a stage trained, as they were at its best evaluation.

    They lie on the CPU, and are part of every checkpoint.
    """

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}

    def keep(self, model: PreTrainedModel, trained: set[str]) -> None:
        named = model.named_parameters()
        self.weights = {
            name: weight.detach().to("cpu", copy=True) for name, weight in named if name in trained
        }

    def restore(self, model: PreTrainedModel) -> None:
        model.load_state_dict(self.weights, strict=False)
        self.weights = {}

    def state_dict(self) -> dict[str, Tensor]:
        return self.weights

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.weights = state


@contextmanager
def _written_aside(aside: Path, path: Path) -> Iterator[None]:
    """Removes the folder `aside` if writing it fails, and says what is to be done.

    Raises:
        OSError: For any error: a full disk is an OSError to Python, but a RuntimeError to
            torch, and an error of its own to safetensors.
    """
    try:
        yield
    except Exception as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise OSError(
            f"{path} could not be written: {error}. Nothing of it is left, and what was saved before is intact. Is the "
            "disk full? Make room, then go on from the newest checkpoint with resume."
        ) from error


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: str | os.PathLike,
    state_dict: dict[str, Tensor] | None = None,
) -> None:
    """Saves weights, configuration, code and tokenizer to a folder.

    It appears, or is replaced, all at once.

    A model whose weights are spread over several processes comes with its gathered `state_dict`.

    Raises:
        OSError: It can't be written; what was there before still is.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.part")
    shutil.rmtree(aside, ignore_errors=True)

    with _written_aside(aside, path):
        model.save_pretrained(aside, state_dict=state_dict)
        tokenizer.save_pretrained(aside)
        _flush(aside)

    _replace(aside, path)


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: Path,
    progress: Progress,
    description: dict[str, Any],
    keep: int,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Saves everything that a resumed run needs, and removes all but the `keep` newest checkpoints.

    Those of other runs stay. Configuration, code and tokenizer lie beside the weights, so that
    `from_pretrained` loads the checkpoint.

    Raises:
        OSError: It can't be written; older ones are intact.
    """
    path = output_dir / f"checkpoint-{progress.step}"
    aside = output_dir / f".checkpoint-{progress.step}.part"

    if accelerator.is_main_process:
        remove_leftovers(output_dir)

    accelerator.wait_for_everyone()
    with _written_aside(aside, path):
        accelerator.save_state(str(aside))

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        with _written_aside(aside, path):
            _save_beside_weights(model, tokenizer, aside)
            run = {**asdict(progress), **description, "files": _sizes(aside)}
            (aside / "run.json").write_text(json.dumps(run, indent=2, default=str), "utf-8")
            _flush(aside)  # not before, while other processes write there

        if path.exists() and _run_of(path) != progress.run_id:
            path.rename(_free_name(path))

        _replace(aside, path)
        _rotate(output_dir, progress, keep)

    accelerator.wait_for_everyone()


def _save_beside_weights(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Writes what `save_pretrained` writes beside the weights."""
    model.config.architectures = [type(model).__name__]
    if model._auto_class is not None:
        custom_object_save(model, str(folder), config=model.config)

    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _rotate(output_dir: Path, progress: Progress, keep: int) -> None:
    """Removes this run's checkpoints up to now but for the `keep` newest ones."""
    own = [
        path
        for path in checkpoints_in(output_dir)
        if step_of(path) <= progress.step and _run_of(path) == progress.run_id
    ]
    for old in own[:-keep]:
        # Renamed first, so that none is ever half-removed under its own name.
        gone = old.with_name(f".{old.name}.gone")
        old.rename(gone)
        shutil.rmtree(gone)


def remove_leftovers(output_dir: Path) -> None:
    """Removes what a killed run was writing or removing, and puts back what it was replacing."""
    for old in output_dir.glob(".*.old"):
        path = old.with_name(old.name.removeprefix(".").removesuffix(".old"))
        if not path.exists():
            old.rename(path)

    for pattern in (".checkpoint-*.part", ".checkpoint-*.gone", ".checkpoint-*.old"):
        for left_over in output_dir.glob(pattern):
            shutil.rmtree(left_over)


def describe(
    model: PreTrainedModel,
    train_data: TrainingData,
    validation_data: HeldOutData,
    config: TrainingConfig,
    accelerator: Accelerator,
) -> dict[str, dict[str, Any]]:
    """The description of a run in its checkpoints, with which a run that resumes must agree."""
    data = train_data.fingerprint()
    if config.patience:
        held_out = validation_data.fingerprint()
        data |= {f"{name}, validation": value for name, value in held_out.items()}

    return {
        "model": model.config.to_diff_dict(),
        "training": asdict(config),
        "data": data,
        "precision": {"precision": accelerator.mixed_precision},
        "environment": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "accelerate")},
            "tarflow_hf": __version__,
            "device": accelerator.device.type,
            "processes": accelerator.num_processes,
            "threads": torch.get_num_threads(),
        },
    }


def newest_checkpoint(
    output_dir: Path, description: dict[str, Any], free_fields: Collection[str]
) -> tuple[Path, Progress]:
    """The newest whole checkpoint and where it stands.

    Warns of a checkpoint that is not whole, and of each difference that may matter.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If another run made it. The message says what differs besides the `free_fields`.
    """
    for path in reversed(checkpoints_in(output_dir)):
        run = _read_run(path) or {}
        if damage := _damage(path, run):
            warnings.warn(f"{path} is not whole ({damage}): an older one is taken.", stacklevel=2)
            continue

        differences = _differences(run, description, free_fields)
        fatal = [text for name, text in differences if name not in MAY_MATTER]
        if fatal:
            raise ValueError(
                f"{path} was made by another run: {'; '.join(fatal)}. Give the options and the data of that run, or "
                "start this one in another output_dir."
            )

        for name, text in differences:
            warnings.warn(f"On resuming, {text}: {MAY_MATTER[name]}.", stacklevel=2)

        fields = asdict(Progress())
        return path, Progress(**{name: run.get(name, fields[name]) for name in fields})

    raise FileNotFoundError(f"There is no checkpoint to resume from in {output_dir}.")


def _differences(
    run: dict[str, Any], description: dict[str, Any], free_fields: Collection[str]
) -> list[tuple[str, str]]:
    """The name and a text for each difference between a checkpoint's run and the one described.

    A field of the data or the environment that one of them does not state is not compared.
    """
    differences = []
    for part, values in description.items():
        now, then = _as_json(values), run.get(part, {})
        if part == "training" and then:
            then = {**asdict(TrainingConfig()), **then}  # an option that is younger than the run
        is_stated = part in ("model", "training")

        for name in sorted(set(now) | set(then)):
            if name in free_fields or (part == "model" and name in NOT_THE_MODEL):
                continue
            if not is_stated and (name not in now or name not in then):
                continue
            if name == "block_config" and name in now and name in then:
                differences += _block_differences(then[name], now[name])
            elif now.get(name) != then.get(name):
                text = f"{name} was {then.get(name)!r} and is {now.get(name)!r}"
                differences.append((name, text))

    return differences


def _block_differences(then: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, str]]:
    """The name and a text for each difference between two configurations of a decoder.

    All fields of an architecture are in them, and another version of the library has others. So
    one that the run does not state had its default, and one that is gone had no other value.
    """
    model_type = now.get("model_type")
    defaults = _as_json(CONFIG_MAPPING[model_type]().to_dict())
    differences = []
    for name in sorted((set(now) | set(then)) - NOT_THE_MODEL):
        is_gone = name not in now and name not in defaults
        was, value = (fields.get(name, defaults.get(name)) for fields in (then, now))
        if was != value and not is_gone:
            differences.append(
                (f"block_config.{name}", f"block_config.{name} was {was!r} and is {value!r}")
            )

    return differences


def _as_json(values: Any) -> Any:
    """The values as they are when they were written and read."""
    return json.loads(json.dumps(values, default=str))


def checkpoints_in(output_dir: Path) -> list[Path]:
    """The folders `checkpoint-N` in the order of their steps."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.is_dir()]
    return sorted((p for p in found if re.fullmatch(r"checkpoint-\d+", p.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def _run_of(checkpoint: Path) -> str | None:
    """The id of the run that made it; "" before runs had one, None if it is none of ours."""
    run = _read_run(checkpoint)
    return None if run is None else run.get("run_id", "")


def _read_run(checkpoint: Path) -> dict[str, Any] | None:
    try:
        return json.loads((checkpoint / "run.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None


def _damage(checkpoint: Path, run: dict[str, Any]) -> str | None:
    """A few words on what is missing in a checkpoint; None for a whole one."""
    if not run:
        return "its run.json can't be read"

    for name, size in run.get("files", {}).items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"

    return None


def _sizes(folder: Path) -> dict[str, int]:
    """The size in bytes of each file in a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _free_name(path: Path) -> Path:
    number = 1
    while (free := path.with_name(f"{path.name}.other-{number}")).exists():
        number += 1
    return free


def _flush(folder: Path) -> None:
    """Waits until a folder's files are on the disk, so that a power failure finds them whole."""
    if os.name != "posix":
        return

    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _replace(aside: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        old = path.with_name(f".{path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
        aside.rename(path)
        shutil.rmtree(old)
    else:
        aside.rename(path)
