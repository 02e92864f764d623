"""The configuration of a run, and what Accelerate makes of it."""

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import GradientAccumulationPlugin

MODES = ("joint", "progressive", "progressive_then_joint")
OPTIMIZERS = ("adamw", "muon")


@dataclass
class TrainingConfig:
    """The options of a training run.

    `batch_size` counts the sequences of one optimiser step, over all processes and accumulations.
    `source` and `gguf_file` say what the model was made of; `train`, which is given the model, notes
    them down.
    """

    output_dir: str = field(
        default="runs/demo", metadata={"help": "where checkpoints and the model go"}
    )
    source: str | None = field(
        default=None,
        metadata={
            "help": "a causal language model (an id, a folder) to convert and train on, or a TarFlowLM to train on",
            "aliases": ["--from"],
        },
    )
    gguf_file: str | None = field(
        default=None, metadata={"help": "the file of the source to read, in GGUF's format"}
    )
    num_steps: int = field(
        default=600, metadata={"help": "optimiser steps, shared evenly by the stages"}
    )
    mode: str = field(
        default="joint",
        metadata={
            "help": "joint; progressive: one flow after the other, those before it frozen; progressive_then_joint",
            "choices": list(MODES),
        },
    )
    stage_steps: list[int] | None = field(
        default=None, metadata={"help": "optimiser steps of each stage, in place of num_steps"}
    )
    stage_learning_rates: list[float] | None = field(
        default=None, metadata={"help": "peak of each stage, in place of learning_rate"}
    )
    first_flow: int = field(
        default=1,
        metadata={
            "help": "the flow that progressive stages begin with; those before it stay as they are, with the codebook"
        },
    )
    patience: int = field(
        default=0,
        metadata={
            "help": "a stage ends after this many evaluations without a better one, with its best weights; 0: no"
        },
    )
    batch_size: int = field(default=8, metadata={"help": "sequences a step, over all processes"})
    gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "parts a step is computed in"}
    )
    optimizer: str = field(
        default="adamw",
        metadata={
            "help": "adamw; muon: orthogonal updates of the blocks' matrices, adamw's of all else",
            "choices": list(OPTIMIZERS),
        },
    )
    learning_rate: float = field(default=2e-3, metadata={"help": "peak, after warm-up"})
    min_learning_rate: float = field(default=0.0, metadata={"help": "at the end of the cosine"})
    warmup_steps: int = field(
        default=50, metadata={"help": "steps of linear warm-up, in each stage"}
    )
    weight_decay: float = field(default=0.1, metadata={"help": "of weight matrices"})
    adam_beta2: float = field(default=0.95, metadata={"help": "of AdamW"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradient clipping; 0 for none"})
    ema_decay: float = field(
        default=0.0, metadata={"help": "of averaged weights, which are evaluated and saved; 0: off"}
    )
    freeze_codebook: bool = field(
        default=False, metadata={"help": "leave the codebook as it is, such as a converted model's"}
    )
    lora_rank: int = field(
        default=0,
        metadata={
            "help": "LoRA's, on the first flow's decoder, all else of which stays; 0: train all"
        },
    )
    lora_alpha: int = field(
        default=32, metadata={"help": "what LoRA adds counts lora_alpha / lora_rank"}
    )
    lora_targets: list[str] | None = field(
        default=None, metadata={"help": "names of the linear maps with LoRA; by default all"}
    )
    gradient_checkpointing: bool = field(default=False, metadata={"help": "recompute activations"})
    mixed_precision: str | None = field(
        default=None, metadata={"help": "no, bf16 or fp16; else as launched"}
    )
    seed: int = field(default=0, metadata={"help": "of weights, order of the data, and latents"})
    log_every: int = field(default=10, metadata={"help": "steps between lines of the log"})
    eval_every: int = field(
        default=0, metadata={"help": "steps between evaluations; 0: only at the end"}
    )
    eval_sequences: int = field(default=128, metadata={"help": "of the validation split"})
    save_every: int = field(
        default=0,
        metadata={"help": "steps between checkpoints; 0: by time, and at the end of a stage"},
    )
    save_minutes: float = field(
        default=10.0,
        metadata={
            "help": "the most minutes between checkpoints; fewer where a save takes under 5%% of them; 0: any number"
        },
    )
    keep_checkpoints: int = field(default=2, metadata={"help": "newest checkpoints kept"})
    resume: bool = field(
        default=False, metadata={"help": "go on from the newest checkpoint in output_dir"}
    )
    finish: bool = field(
        default=False, metadata={"help": "with resume: take no further step, and save the model"}
    )
    report_to: str | None = field(
        default=None, metadata={"help": "a tracker of Accelerate, such as tensorboard"}
    )

    def __post_init__(self):
        for name in (
            "num_steps",
            "first_flow",
            "batch_size",
            "gradient_accumulation_steps",
            "log_every",
            "eval_sequences",
            "keep_checkpoints",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}.")

        for name in (
            "eval_every",
            "save_every",
            "save_minutes",
            "warmup_steps",
            "lora_rank",
            "weight_decay",
            "max_grad_norm",
            "min_learning_rate",
        ):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be 0 or more, not {getattr(self, name)}.")

        self._check_companions()
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, not {self.learning_rate}.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), not {self.ema_decay}.")
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, not {self.mode!r}.")

        if self.optimizer not in OPTIMIZERS:
            raise ValueError(
                f"optimizer must be one of {', '.join(OPTIMIZERS)}, not {self.optimizer!r}."
            )

        for name in ("stage_steps", "stage_learning_rates"):
            values = getattr(self, name)
            if values is not None and not (values and all(value > 0 for value in values)):
                raise ValueError(
                    f"{name} must be positive numbers, one for each stage, not {values!r}."
                )

        lowest = min(self.stage_learning_rates or [self.learning_rate])
        if self.min_learning_rate > lowest:
            raise ValueError(
                f"min_learning_rate is where the learning rate falls to: {lowest} at most, not "
                f"{self.min_learning_rate}."
            )

    def _check_companions(self) -> None:
        """Raises a ValueError if an option says nothing, because another one is missing."""
        if self.lora_targets and not self.lora_rank:
            raise ValueError(
                f"lora_targets names maps for LoRA, {self.lora_targets}: give lora_rank, too."
            )
        if self.gguf_file and not self.source:
            raise ValueError(
                f"gguf_file is a file of the source, {self.gguf_file!r}: give the source (--from), too."
            )
        if self.finish and not self.resume:
            raise ValueError("finish ends a run that is resumed: give resume (--resume), too.")
        if self.first_flow > 1 and self.mode == "joint":
            raise ValueError(
                f"first_flow is for the stages of a progressive mode, not for joint: {self.first_flow}."
            )
        if self.patience < 0 or (self.patience and self.eval_every < 1):
            raise ValueError(
                f"patience counts evaluations: it must be 0, or positive with an eval_every, not {self.patience} with "
                f"eval_every {self.eval_every}."
            )


# What may differ when a run is resumed, and why. Nothing comes of these.
MAY_DIFFER = {
    "output_dir": "a folder may be moved",
    "log_every": "it decides what is written down",
    "eval_every": "evaluating changes nothing; with patience it must stay",
    "eval_sequences": "evaluating changes nothing; with patience it must stay",
    "save_every": "saving changes nothing",
    "save_minutes": "saving changes nothing",
    "keep_checkpoints": "saving changes nothing",
    "resume": "it says how the run was started",
    "finish": "it says when the run ends",
    "report_to": "it decides what is written down",
    "gradient_checkpointing": "the same numbers are computed twice",
    "gradient_accumulation_steps": "the parts make the same step, up to rounding",
    "mixed_precision": "the precision in use is compared instead, however it was set",
}

# These may change the curve: a warning names what differs.
MAY_MATTER = {
    "num_steps": "the schedule of learning rates goes on as that of the new number",
    "stage_steps": "the schedule of learning rates goes on as that of the new numbers",
    "python": "another version may round otherwise",
    "torch": "another version may round otherwise",
    "transformers": "another version may round otherwise",
    "accelerate": "another version may round otherwise",
    "tarflow_hf": "another version may round otherwise",
    "device": "another device rounds otherwise",
    "processes": "sums are taken in another order",
    "threads": "sums are taken in another order",
}

# All else must be as it was: the other options, the fields of the model, the data, the precision.
FREE_FIELDS = set(MAY_DIFFER)


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """Makes Accelerate's state for a run: precision, accumulation, trackers, sharing of the data."""
    return Accelerator(
        # A step has all its parts, also where an epoch ends between them.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=config.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        mixed_precision=config.mixed_precision,
        log_with=config.report_to,
        project_dir=config.output_dir,
        step_scheduler_with_optimizer=False,
        # A batch is split over the processes, so that their number changes nothing; the order
        # depends on the seed.
        dataloader_config=DataLoaderConfiguration(
            split_batches=True, use_seedable_sampler=True, data_seed=config.seed
        ),
    )


def share_cores() -> None:
    """Gives this process its share of the cores that it may use.

    A launcher starts it with one thread. Nothing changes if there is no launcher, or if someone set
    `OMP_NUM_THREADS` before the launcher.
    """
    is_launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "LOCAL_WORLD_SIZE" in os.environ
    if not is_launched or os.environ.get("OMP_NUM_THREADS") != "1" or _launcher_was_told():
        return

    has_affinity = hasattr(os, "sched_getaffinity")
    num_cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    torch.set_num_threads(max(1, num_cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _launcher_was_told() -> bool:
    """True if the parent process was started with `OMP_NUM_THREADS`, as far as one can see."""
    try:
        variables = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:
        return False

    return any(variable.startswith(b"OMP_NUM_THREADS=") for variable in variables)
