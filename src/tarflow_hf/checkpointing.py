"""Checkpoints of a run, under the name that they had before `training` was a package."""

from .training.checkpointing import (  # noqa: F401
    newest_checkpoint,
    save_checkpoint,
    save_model,
)
