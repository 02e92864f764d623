"""Training: stages, the loss, a loop on Accelerate that resumes exactly, its log, checkpoints."""

from ..baseline import discrete_baseline
from ..evaluation.likelihood import validate
from .adapters import add_lora, merge_lora
from .batches import check_batches, check_tokenizer
from .checkpointing import newest_checkpoint, save_model
from .config import (
    FREE_FIELDS,
    MAY_DIFFER,
    MAY_MATTER,
    TrainingConfig,
    make_accelerator,
    share_cores,
)
from .divergence import FirstFault
from .folder import check_output_dir, trainer_checkpoint
from .interruption import RunStopped
from .log import Log
from .loop import recompute_activations, train
from .loss import RowNoise, StepDraws, compute_loss, draw_observed_mask, draw_step
from .optimizers import MuonAdamW, make_optimizer, nearest_orthogonal
from .stages import Stage, make_stages, slow_vocabulary

__all__ = [
    "FREE_FIELDS",
    "MAY_DIFFER",
    "MAY_MATTER",
    "FirstFault",
    "Log",
    "MuonAdamW",
    "RowNoise",
    "RunStopped",
    "Stage",
    "StepDraws",
    "TrainingConfig",
    "add_lora",
    "check_batches",
    "check_output_dir",
    "check_tokenizer",
    "compute_loss",
    "discrete_baseline",
    "draw_observed_mask",
    "draw_step",
    "make_accelerator",
    "make_optimizer",
    "make_stages",
    "merge_lora",
    "nearest_orthogonal",
    "newest_checkpoint",
    "recompute_activations",
    "save_model",
    "share_cores",
    "slow_vocabulary",
    "train",
    "trainer_checkpoint",
    "validate",
]
