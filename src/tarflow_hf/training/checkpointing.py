"""Checkpoints of a run. They are written to the side and then renamed.

So a checkpoint is whole, whenever a run is killed.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Progress:
    """The point that a run has reached."""

    step: int = 0  # optimiser steps in all
    stage: int = 0  # index
    stage_step: int = 0  # of them in this stage
    best: float | None = None  # validation of the stage, nats per token
    stale: int = 0  # evaluations since then

    def next_stage(self) -> "Progress":
        return Progress(self.step, self.stage + 1)


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


def check_output_dir(output_dir: Path) -> None:
    """Makes the folder.

    Raises:
        OSError: It can't be made, or nothing can be written to it.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir):
            pass
    except OSError as error:
        raise OSError(
            f"output_dir {output_dir} can't be written to: {error}. Choose another one."
        ) from error


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

    _replace(aside, path)


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: Path,
    progress: Progress,
    description: dict[str, Any],
    keep: int,
) -> None:
    """Saves everything that a resumed run needs, and removes all but the `keep` newest checkpoints.

    Raises:
        OSError: It can't be written; older ones are intact.
    """
    aside, path = (
        output_dir / name.format(progress.step) for name in (".checkpoint-{}.part", "checkpoint-{}")
    )

    if accelerator.is_main_process:
        for left_over in output_dir.glob(".checkpoint-*"):  # by a run that was killed
            shutil.rmtree(left_over)

    accelerator.wait_for_everyone()
    with _written_aside(aside, path):
        accelerator.save_state(str(aside))

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        with _written_aside(aside, path):
            (aside / "run.json").write_text(
                json.dumps({**asdict(progress), **description}, indent=2)
            )

        _replace(aside, path)
        for old in _checkpoints(output_dir)[:-keep]:
            shutil.rmtree(old.rename(old.with_name(f".{old.name}.old")))

    accelerator.wait_for_everyone()


def newest_checkpoint(
    output_dir: Path, description: dict[str, Any], free_fields: Collection[str]
) -> tuple[Path, Progress]:
    """The newest checkpoint and where it stands.

    Raises:
        FileNotFoundError: There is none. ValueError: Another run made it; says what differs besides
            the `free_fields`.
    """
    checkpoints = _checkpoints(output_dir)
    if not checkpoints:
        raise FileNotFoundError(f"There is no checkpoint to resume from in {output_dir}.")

    run = json.loads((checkpoints[-1] / "run.json").read_text())
    differences = []

    for part, values in description.items():
        now, then = json.loads(json.dumps(values, default=str)), run.get(part, {})
        for name in sorted(set(now) | set(then)):
            if name not in free_fields and now.get(name) != then.get(name):
                differences.append(f"{name} was {then.get(name)!r} and is {now.get(name)!r}")

    if differences:
        raise ValueError(f"{checkpoints[-1]} was made by another run: {'; '.join(differences)}.")

    return checkpoints[-1], Progress(**{name: run[name] for name in asdict(Progress())})


def _checkpoints(output_dir: Path) -> list[Path]:
    return sorted(output_dir.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


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
