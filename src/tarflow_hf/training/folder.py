"""The folder of a run: nobody else's, while it runs and afterwards."""

import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments

from .checkpointing import checkpoints_in

LOCK = ".lock"
LOG = "log.jsonl"


def check_output_dir(output_dir: str | os.PathLike, resume: bool) -> None:
    """Checks that a run may write to a folder.

    A folder with another run's checkpoints or model is for `resume` only. A log without a
    checkpoint is no obstacle: nothing of it could be continued.

    Raises:
        FileExistsError: If a new run would write over another one.
        FileNotFoundError: If there is nothing to resume.
    """
    output_dir = Path(output_dir)
    kept = [path.name for path in checkpoints_in(output_dir)]
    is_model = (output_dir / "model").exists()

    if resume and not kept and not any((output_dir / name).exists() for name in (LOCK, LOG)):
        raise FileNotFoundError(
            f"There is no checkpoint to resume from in {output_dir}. Start the run without --resume, or give the "
            "--output_dir that it was started with."
        )

    if not resume and kept:
        raise FileExistsError(
            f"output_dir {output_dir} holds another run ({', '.join(kept)}), which would be lost. Go on with that run "
            "by --resume, or choose another --output_dir."
        )

    if not resume and is_model:
        raise FileExistsError(
            f"output_dir {output_dir} holds a trained model ({output_dir / 'model'}), which would be lost. Choose "
            "another --output_dir, or move the model away. It has no checkpoint, so --resume can't go on with it."
        )


def trainer_checkpoint(training: TrainingArguments) -> str | None:
    """Returns the checkpoint that `Trainer` should go on from; None for a new run.

    The newest one counts if `resume_from_checkpoint` is "true", and without one the run begins
    anew. `Trainer` writes trainer_state.json last: a checkpoint without it is half-written, and not
    taken.

    Raises:
        FileExistsError: If a new run would write over another one.
    """
    given, folder = training.resume_from_checkpoint, Path(training.output_dir)
    given = {"true": True, "false": None}.get(str(given).lower(), given)
    whole = [path for path in checkpoints_in(folder) if (path / "trainer_state.json").is_file()]
    newest = whole[-1] if whole else None
    if given is None and newest is not None:
        raise FileExistsError(
            f"{folder} holds another run ({newest}). Go on with it by --resume_from_checkpoint true, or choose another "
            "--output_dir."
        )

    models = [folder / name for name in ("config.json", "adapter_config.json")]
    is_new = given is None or (given is True and newest is None)
    if is_new and any(path.is_file() for path in models):
        raise FileExistsError(
            f"{folder} holds a trained model, which this run would replace: choose another --output_dir."
        )

    if given is True:
        return None if newest is None else str(newest)

    return given


def make_output_dir(output_dir: str | os.PathLike) -> None:
    """Makes a run's folder.

    Raises:
        OSError: If it can't be made, or nothing can be written to it.
    """
    output_dir = Path(output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir):
            pass
    except OSError as error:
        raise OSError(
            f"output_dir {output_dir} can't be written to: {error}. Choose another one."
        ) from None


@contextmanager
def locked(output_dir: str | os.PathLike, accelerator: Accelerator) -> Iterator[None]:
    """Keeps other runs out of a folder for as long as this one lives.

    The system drops the lock with the process, however that ends. So a lock that a killed run has
    left behind keeps nobody out.

    Raises:
        BlockingIOError: If another run is in there, in every process.
    """
    path, handle, holder = Path(output_dir) / LOCK, None, None
    if accelerator.is_main_process:
        handle, holder = _take(path)

    if (holder := broadcast_object_list([holder])[0]) is not None:
        raise BlockingIOError(
            f"output_dir {output_dir} is in use by another run ({holder}). Wait until it has ended and go on with it "
            "by --resume, or choose another --output_dir."
        )

    try:
        yield
    finally:
        if handle is not None:
            path.unlink(missing_ok=True)
            os.close(handle)


def _take(path: Path) -> tuple[int | None, str | None]:
    """The open lock, or the one who has it."""
    try:
        from fcntl import LOCK_EX, LOCK_NB, flock
    except ImportError:  # no POSIX system
        return None, None

    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            flock(handle, LOCK_EX | LOCK_NB)
        except BlockingIOError:
            holder = os.pread(handle, 200, 0).decode("utf-8", "replace") or "just starting"
            os.close(handle)
            return None, holder
        except OSError:  # a file system without locks
            return handle, None

        # A run that ends removes its lock. One that was removed since it was opened counts nothing.
        if path.exists() and os.fstat(handle).st_ino == path.stat().st_ino:
            os.truncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
            return handle, None

        os.close(handle)
