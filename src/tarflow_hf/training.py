"""Training: the discrete baseline, the optimiser, and one loop on Accelerate that resumes exactly."""

import json
import math
import os
import shutil
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DataLoaderConfiguration, skip_first_batches
from accelerate.utils import GradientAccumulationPlugin, extract_model_from_parallel
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, IterableDataset
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, get_scheduler

from .data import PackedTokens, StreamingPackedTokens
from .evaluation import likelihood, prepend_start
from .modeling.configuration_tarflowlm import TarFlowLMConfig
from .modeling.modeling_tarflowlm import TarFlowLMModel


@dataclass
class TrainingConfig:
    """How to train. `batch_size` counts the sequences of one optimiser step, over all processes and accumulations."""

    output_dir: str = field(default="runs/demo", metadata={"help": "where checkpoints and the model go"})
    num_steps: int = field(default=600, metadata={"help": "optimiser steps"})
    batch_size: int = field(default=8, metadata={"help": "sequences a step, over all processes"})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "parts a step is computed in"})
    learning_rate: float = field(default=2e-3, metadata={"help": "peak, after warm-up"})
    min_learning_rate: float = field(default=0.0, metadata={"help": "at the end of the cosine"})
    warmup_steps: int = field(default=50, metadata={"help": "steps of linear warm-up"})
    weight_decay: float = field(default=0.1, metadata={"help": "of weight matrices"})
    adam_beta2: float = field(default=0.95, metadata={"help": "of AdamW"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradient clipping; 0 for none"})
    ema_decay: float = field(
        default=0.0, metadata={"help": "of averaged weights, which are evaluated and saved; 0: off"}
    )
    gradient_checkpointing: bool = field(default=False, metadata={"help": "recompute activations"})
    mixed_precision: str | None = field(default=None, metadata={"help": "no, bf16 or fp16; else as launched"})
    seed: int = field(default=0, metadata={"help": "of weights, order of the data, and latents"})
    log_every: int = field(default=10, metadata={"help": "steps between lines of the log"})
    eval_every: int = field(default=0, metadata={"help": "steps between evaluations; 0: at the end alone"})
    eval_sequences: int = field(default=128, metadata={"help": "of the validation split"})
    save_every: int = field(default=0, metadata={"help": "steps between checkpoints; 0: at the end alone"})
    keep_checkpoints: int = field(default=2, metadata={"help": "newest checkpoints kept"})
    resume: bool = field(default=False, metadata={"help": "go on from the newest checkpoint in output_dir"})
    report_to: str | None = field(default=None, metadata={"help": "a tracker of Accelerate, such as tensorboard"})

    def __post_init__(self):
        for name in ("num_steps", "batch_size", "gradient_accumulation_steps", "log_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, not {self.learning_rate}.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), not {self.ema_decay}.")


# Fields that a resumed run may change: they leave the loss curve as it is.
FREE_FIELDS = {"output_dir", "log_every", "eval_every", "eval_sequences", "save_every", "keep_checkpoints", "resume"}
FREE_FIELDS |= {"report_to", "gradient_checkpointing"}
# Fields that checkpoints of earlier versions do not have, and what they stood for.
LATER_FIELDS = {"conditional": False}


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """Accelerate's state for a run: precision, accumulation, trackers, and how the data is shared out."""
    accelerator = Accelerator(
        # A step has all its parts, also where an epoch ends between them.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=config.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        mixed_precision=config.mixed_precision,
        log_with=config.report_to,
        project_dir=config.output_dir,
        step_scheduler_with_optimizer=False,
        # A batch is split over the processes, so that their number changes nothing; the order depends on the seed.
        dataloader_config=DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True, data_seed=config.seed),
    )
    if accelerator.device.type == "cpu" and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        # `accelerate launch` gives a process one thread where nobody has asked for more: here, its share of the cores.
        torch.set_num_threads(max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    return accelerator


def discrete_baseline(config: TarFlowLMConfig) -> PreTrainedModel:
    """The library's own causal model with the flows' block config, as deep as the whole stack.

    Its vocabulary has one entry more, the beginning-of-sequence token that stands before the first one (and that the
    flows' start vectors correspond to), so that both models score the same tokens.
    """
    baseline_config = config.decoder_config(
        config.num_hidden_layers,
        vocab_size=config.vocab_size + 1,
        max_position_embeddings=config.max_position_embeddings + 1,
        bos_token_id=config.vocab_size,
        eos_token_id=None,
        pad_token_id=None,
    )
    return AutoModelForCausalLM.from_config(baseline_config)


def compute_loss(model: torch.nn.Module, input_ids: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Nats per token of a batch (B, T): minus the ELBO of a TarFlowLM, the cross-entropy of a discrete model.

    Of a conditional TarFlowLM they are nats per missing token, given those that `draw_observed_mask` observes.
    """
    bare = extract_model_from_parallel(model, keep_torch_compile=False)
    if isinstance(bare, TarFlowLMModel):
        observed = {}
        if bare.config.conditional:
            device = input_ids.device if generator is None else generator.device
            mask = draw_observed_mask(input_ids.shape, bare.config.patch_size, generator, device)
            observed = {"observed_mask": mask.to(input_ids.device)}
        return model(input_ids=input_ids, labels=input_ids, generator=generator, **observed).loss
    inputs = prepend_start(bare, input_ids)
    return model(input_ids=inputs, labels=inputs, use_cache=False).loss


def draw_observed_mask(
    shape: tuple[int, int],
    patch_size: int = 1,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Which tokens (B, T) a conditional model is told in training: whole patches, of each sequence on its own.

    With a probability of one third each: nothing; a prefix, all lengths from one position to all but one alike; spans,
    of which a share r is observed, with a cut between two positions with probability c, where r and c are drawn from
    U(0, 1). Where that would observe everything, nothing is observed.

    Args:
        shape: (B, T), T a multiple of `patch_size`.
        generator: Source of the randomness, on `device`; the global one by default.

    Returns:
        Boolean mask (B, T), True where observed.

    Example:
        >>> draw_observed_mask((3, 12), 2, torch.Generator().manual_seed(5)).int()
        tensor([[0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0],
                [1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0],
                [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]], dtype=torch.int32)
    """
    num_sequences, num_positions = shape[0], shape[1] // patch_size

    def uniform(num_columns: int) -> Tensor:
        return torch.rand(num_sequences, num_columns, generator=generator, device=device)

    kind, share, cut, length = uniform(4).split(1, -1)
    position = torch.arange(num_positions, device=kind.device)
    prefix = position < 1 + (length * (num_positions - 1)).long()
    span = (uniform(num_positions) < cut).cumsum(-1).clamp(max=num_positions - 1)
    spans = (uniform(num_positions) < share).gather(-1, span)
    observed = torch.where(kind < 1 / 3, False, torch.where(kind < 2 / 3, prefix, spans))
    observed = observed & ~observed.all(-1, keepdim=True)
    return observed.repeat_interleave(patch_size, -1)


def make_optimizer(model: PreTrainedModel, config: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW; weight decay pulls on matrices, but not on the codebook, whose size means something."""
    decayed, kept = [], []
    for name, parameter in model.named_parameters():
        (decayed if parameter.ndim >= 2 and "codebook" not in name else kept).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, config.adam_beta2))


def train(
    model: PreTrainedModel,
    train_data: PackedTokens | StreamingPackedTokens,
    validation_data: PackedTokens,
    tokenizer: PreTrainedTokenizerBase,
    config: TrainingConfig,
    accelerator: Accelerator | None = None,
) -> PreTrainedModel:
    """Trains, and saves the model with its tokenizer to `output_dir/model`.

    Every `log_every` steps a line goes to `output_dir/log.jsonl` and the trackers. With `config.resume` training goes
    on from the newest checkpoint, and every loss equals that of the uninterrupted run: weights, optimiser, schedule and
    average come from the checkpoint; the order of the data follows from seed and epoch, the latents' noise from seed
    and step.

    Returns:
        The trained model (the averaged one with `ema_decay`), in evaluation mode.

    Raises:
        ValueError: The batch can't be split evenly, there are fewer sequences than a batch, or a resumed run differs
            from the one that made the checkpoint. FloatingPointError: The loss is not finite.
    """
    accelerator = make_accelerator(config) if accelerator is None else accelerator
    output_dir = Path(config.output_dir)
    parts = config.gradient_accumulation_steps
    if config.batch_size % (parts * accelerator.num_processes):
        raise ValueError(
            f"batch_size {config.batch_size} can't be split into {parts} gradient_accumulation_steps on "
            f"{accelerator.num_processes} processes."
        )
    is_stream = isinstance(train_data, IterableDataset)
    if not is_stream and len(train_data) < config.batch_size:
        raise ValueError(
            f"There are {len(train_data)} sequences to train on, fewer than batch_size {config.batch_size}."
        )

    # 1. What is trained, and what must come back on a resume.
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    description = {"model": model.config.to_diff_dict(), "training": asdict(config)}
    if not is_stream:
        checksum = zlib.crc32(train_data.tokens[: 2**20].numpy())
        description["data"] = {"number of sequences": len(train_data), "checksum of the data": checksum}
    average = None
    if config.ema_decay:
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay)).to(accelerator.device)
        accelerator.register_for_checkpointing(average)
    optimizer = make_optimizer(model, config)
    scheduler = get_scheduler(
        "cosine_with_min_lr",
        optimizer,
        num_warmup_steps=config.warmup_steps,
        num_training_steps=config.num_steps,
        scheduler_specific_kwargs={"min_lr": config.min_learning_rate},
    )
    loader = DataLoader(train_data, batch_size=config.batch_size // parts, shuffle=not is_stream, drop_last=True)
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
    bare_model = accelerator.unwrap_model(model, keep_torch_compile=False)
    evaluated = bare_model if average is None else average.module
    first_step = 0
    if config.resume:
        first_step = load_checkpoint(accelerator, output_dir, description)
    log = Log(accelerator, output_dir, first_step, config, validation_data.characters_per_token)

    # 2. The steps.
    model.train()
    generator = torch.Generator(accelerator.device)
    batches = endless(loader, first_step * parts)
    total = torch.zeros((), device=accelerator.device)
    for step in range(first_step, config.num_steps):
        for part in range(parts):
            input_ids = next(batches)["input_ids"]
            # Noise of its own for every part of every step: a resumed run draws what the uninterrupted one did.
            entropy = np.random.SeedSequence([config.seed, step, part, accelerator.process_index])
            generator.manual_seed(int(entropy.generate_state(1, np.uint64)[0]))
            with accelerator.accumulate(model):
                loss = compute_loss(model, input_ids, generator)
                accelerator.backward(loss)
                if accelerator.sync_gradients and config.max_grad_norm:
                    accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            total += loss.detach() / parts
        learning_rate = scheduler.get_last_lr()[0]
        scheduler.step()
        if average is not None:
            average.update_parameters(bare_model)
        log.tokens += config.batch_size * input_ids.shape[1]

        # 3. Looking, and keeping.
        done = step + 1
        if done % config.log_every == 0 or done == config.num_steps:
            log.losses(done, accelerator.reduce(total, "mean").item(), learning_rate)
            total.zero_()
        if (config.eval_every and done % config.eval_every == 0) or done == config.num_steps:
            with log.pause():
                log.validation(done, likelihood(evaluated, validation_data, max_sequences=config.eval_sequences))
                model.train()
        if (config.save_every and done % config.save_every == 0) or done == config.num_steps:
            with log.pause():
                save_checkpoint(accelerator, output_dir, done, description, config.keep_checkpoints)
    log.close()

    if accelerator.is_main_process:
        save_model(evaluated, tokenizer, output_dir / "model")
    accelerator.wait_for_everyone()
    return evaluated.eval()


def endless(loader: DataLoader, num_used: int) -> Iterator[dict[str, Tensor]]:
    """The batches of epoch after epoch, behind the `num_used` first ones.

    A data set skips these without loading them; a stream, which does not know its length, is read again.
    """
    epoch = 0
    while isinstance(loader.dataset, IterableDataset):
        loader.set_epoch(epoch)
        for batch in loader:
            if num_used:
                num_used -= 1
            else:
                yield batch
        epoch += 1
    epoch, num_used = divmod(num_used, len(loader))
    while True:
        loader.set_epoch(epoch)
        yield from skip_first_batches(loader, num_used) if num_used else loader
        epoch, num_used = epoch + 1, 0


class Log:
    """A progress bar, a line of JSON for each entry, and Accelerate's trackers. Loss in nats per token."""

    def __init__(
        self, accelerator, output_dir: Path, first_step: int, config: TrainingConfig, characters_per_token: float
    ):
        self.accelerator = accelerator
        self.nats_to_bits_per_character = 1 / (math.log(2) * characters_per_token)
        self.path = output_dir / "log.jsonl"
        self.tokens, self.seconds, self.since = 0, 0.0, time.perf_counter()
        self.last_step = first_step
        self.bar = tqdm(
            total=config.num_steps,
            initial=first_step,
            desc="training",
            unit="step",
            disable=not accelerator.is_main_process,
        )
        if accelerator.is_main_process:
            output_dir.mkdir(parents=True, exist_ok=True)
            entries = self.path.read_text().splitlines() if first_step and self.path.exists() else []
            kept = [entry for entry in entries if json.loads(entry)["step"] <= first_step]
            self.path.write_text("".join(f"{entry}\n" for entry in kept))
        if config.report_to:
            accelerator.init_trackers(
                "tarflow_hf", {key: value for key, value in asdict(config).items() if value is not None}
            )

    def losses(self, step: int, total: float, learning_rate: float) -> None:
        loss = total / (step - self.last_step)
        self.bar.update(step - self.last_step)
        self.last_step = step
        if not math.isfinite(loss):
            raise FloatingPointError(f"The loss is {loss} at step {step}; checkpoints made before it are intact.")
        seconds = self.seconds + time.perf_counter() - self.since
        values = {
            "loss": loss,
            "bits_per_character": loss * self.nats_to_bits_per_character,
            "tokens_per_second": round(self.tokens / seconds),
            "learning_rate": learning_rate,
        }
        self.bar.set_postfix_str(
            f"loss {loss:.4f}, {values['bits_per_character']:.3f} bits/char, {values['tokens_per_second']:,} tokens/s"
        )
        self._write(step, values)

    def validation(self, step: int, result) -> None:
        values = {"validation_loss": result.nats_per_token, "validation_standard_error": result.standard_error}
        values["validation_bits_per_character"] = result.nats_per_token * self.nats_to_bits_per_character
        if self.accelerator.is_main_process:
            self.bar.write(
                f"step {step}: validation {values['validation_loss']:.4f} nats per token, "
                f"{values['validation_bits_per_character']:.4f} bits per character"
            )
        self._write(step, values)

    @contextmanager
    def pause(self):
        """Time in here does not count as training."""
        self.seconds += time.perf_counter() - self.since
        yield
        self.since = time.perf_counter()

    def close(self) -> None:
        self.bar.close()
        if self.accelerator.log_with:
            self.accelerator.end_training()

    def _write(self, step: int, values: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        self.accelerator.log(values, step=step)


# --------------------------------------------------------------------------------------------------------------------
# Checkpoints: written to the side, then renamed, so that what has the name is whole
# --------------------------------------------------------------------------------------------------------------------


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str | os.PathLike) -> None:
    """Saves weights, configuration, code and tokenizer to a folder that appears (or is replaced) all at once."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    _replace(aside, path)


def save_checkpoint(accelerator: Accelerator, output_dir: Path, step: int, description: dict, keep: int) -> None:
    aside, path = output_dir / f".checkpoint-{step}.part", output_dir / f"checkpoint-{step}"
    if accelerator.is_main_process:
        shutil.rmtree(aside, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(aside))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (aside / "run.json").write_text(json.dumps({"step": step, **description}, indent=2))
        _replace(aside, path)
        for old in _checkpoints(output_dir)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def load_checkpoint(accelerator: Accelerator, output_dir: Path, description: dict) -> int:
    """Loads the newest checkpoint and returns its step.

    Raises:
        FileNotFoundError: There is none. ValueError: Another run made it; says what differs.
    """
    checkpoints = _checkpoints(output_dir)
    if not checkpoints:
        raise FileNotFoundError(f"There is no checkpoint to resume from in {output_dir}.")
    run = json.loads((checkpoints[-1] / "run.json").read_text())
    differences = []
    for part, values in description.items():
        now, then = json.loads(json.dumps(values, default=str)), run.get(part, {})
        for name in sorted(set(now) | set(then)):
            before = then.get(name, LATER_FIELDS.get(name))
            if name not in FREE_FIELDS and now.get(name) != before:
                differences.append(f"{name} was {before!r} and is {now.get(name)!r}")
    if differences:
        raise ValueError(f"{checkpoints[-1]} was made by another run: {'; '.join(differences)}.")
    accelerator.load_state(str(checkpoints[-1]))
    return run["step"]


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
