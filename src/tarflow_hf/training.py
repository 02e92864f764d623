"""Training: the discrete baseline, the stages, the optimiser, and one loop on Accelerate that
resumes exactly.
"""

import json
import math
import os
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from accelerate import Accelerator, DataLoaderConfiguration, skip_first_batches
from accelerate.utils import (
    DistributedType,
    GradientAccumulationPlugin,
    extract_model_from_parallel,
)
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, IterableDataset
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_scheduler,
)

from .checkpointing import (
    BestWeights,
    Progress,
    check_output_dir,
    newest_checkpoint,
    save_checkpoint,
    save_model,
)
from .data import PackedTokens, StreamingPackedTokens
from .divergence import FirstFault
from .evaluation import Likelihood, prepend_start, score_batch
from .modeling.configuration_tarflowlm import TarFlowLMConfig
from .modeling.modeling_tarflowlm import TarFlowLMModel
from .throughput import peak_flops, peak_memory, training_flops

MODES = ("joint", "progressive", "progressive_then_joint")
Generators: TypeAlias = (
    torch.Generator | Sequence[torch.Generator]
)  # one for all sequences of a batch, or one for each


@dataclass
class TrainingConfig:
    """How to train. `batch_size` counts the sequences of one optimiser step, over all processes and
    accumulations.
    """

    output_dir: str = field(
        default="runs/demo", metadata={"help": "where checkpoints and the model go"}
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
    gradient_checkpointing: bool = field(default=False, metadata={"help": "recompute activations"})
    mixed_precision: str | None = field(
        default=None, metadata={"help": "no, bf16 or fp16; else as launched"}
    )
    seed: int = field(default=0, metadata={"help": "of weights, order of the data, and latents"})
    log_every: int = field(default=10, metadata={"help": "steps between lines of the log"})
    eval_every: int = field(
        default=0, metadata={"help": "steps between evaluations; 0: at the end alone"}
    )
    eval_sequences: int = field(default=128, metadata={"help": "of the validation split"})
    save_every: int = field(
        default=0, metadata={"help": "steps between checkpoints; 0: at the end alone"}
    )
    keep_checkpoints: int = field(default=2, metadata={"help": "newest checkpoints kept"})
    resume: bool = field(
        default=False, metadata={"help": "go on from the newest checkpoint in output_dir"}
    )
    report_to: str | None = field(
        default=None, metadata={"help": "a tracker of Accelerate, such as tensorboard"}
    )

    def __post_init__(self):
        for name in (
            "num_steps",
            "batch_size",
            "gradient_accumulation_steps",
            "log_every",
            "keep_checkpoints",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}.")

        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, not {self.learning_rate}.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), not {self.ema_decay}.")
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, not {self.mode!r}.")

        for name in ("stage_steps", "stage_learning_rates"):
            values = getattr(self, name)
            if values is not None and not (values and all(value > 0 for value in values)):
                raise ValueError(
                    f"{name} must be positive numbers, one for each stage, not {values!r}."
                )

        if self.patience < 0 or (self.patience and self.eval_every < 1):
            raise ValueError(
                f"patience counts evaluations: it must be 0, or positive with an eval_every, not {self.patience} with "
                f"eval_every {self.eval_every}."
            )


# Fields that a resumed run may change: they leave the loss curve as it is.
FREE_FIELDS = {
    "output_dir",
    "log_every",
    "eval_every",
    "eval_sequences",
    "save_every",
    "keep_checkpoints",
    "resume",
}
FREE_FIELDS |= {"report_to", "gradient_checkpointing"}


@dataclass(frozen=True)
class Stage:
    """A part of a run, with a warm-up and a schedule of its own: the stack cut after `num_flows`
    flows is trained.

    All of it, or its last flow alone (in the first stage with the codebook), while those before it
    are frozen. Cut there, the stack is a model of its own: `model(..., num_flows=num_flows)` scores
    it.
    """

    name: str
    num_flows: int | None  # None: all; also of a discrete model
    num_steps: int  # at most: `patience` may end it earlier
    learning_rate: float
    is_joint: bool

    def choose_parameters(self, model: PreTrainedModel) -> None:
        """Marks what is trained, and sets the modes: what is frozen drops nothing out and
        recomputes nothing.
        """
        if self.is_joint or self.num_flows is None:
            model.requires_grad_(True).train()
            return

        model.requires_grad_(False).eval()
        model.flow.layers[self.num_flows - 1].requires_grad_(True).train()
        if self.num_flows == 1:
            model.codebook.requires_grad_(True).train()


def make_stages(model: PreTrainedModel, config: TrainingConfig) -> list[Stage]:
    """The stages of a run.

    Raises:
        ValueError: A discrete model has no flows to train one by one, or there is not one value for
            each stage.

    Example:
        >>> model = TarFlowLMModel(TarFlowLMConfig(
        ...     vocab_size=3, latent_size=1, hidden_size=8, num_attention_heads=1,
        ...     flows=[{"coupling": "affine", "direction": "left_to_right", "num_hidden_layers": 1}] * 2))
        >>> config = TrainingConfig(mode="progressive_then_joint", stage_steps=[400, 100, 50])
        >>> [(stage.name, stage.num_flows, stage.num_steps) for stage in make_stages(model, config)]
        [('flow 1', 1, 400), ('flow 2', 2, 100), ('joint', 2, 50)]
    """
    is_flow = isinstance(model, TarFlowLMModel)
    num_flows = len(model.config.flows) if is_flow else None
    if config.mode != "joint" and not is_flow:
        raise ValueError(f"mode must be joint, not {config.mode}: a discrete model has no flows.")

    cuts: list[int | None] = (
        [] if config.mode == "joint" else list(range(1, len(model.config.flows) + 1))
    )
    names = [f"flow {cut}" for cut in cuts] + ["joint"] * (config.mode != "progressive")
    cuts = cuts + [num_flows] * (config.mode != "progressive")

    steps, rates = config.stage_steps, config.stage_learning_rates
    if steps is None:
        share, rest = divmod(config.num_steps, len(names))
        if share == 0:
            raise ValueError(
                f"num_steps {config.num_steps} is less than one for each of {len(names)} stages."
            )

        steps = [share + (index < rest) for index in range(len(names))]

    rates = [config.learning_rate] * len(names) if rates is None else rates
    for name, values in (("stage_steps", steps), ("stage_learning_rates", rates)):
        if len(values) != len(names):
            raise ValueError(
                f"{name} must have one value for each stage ({', '.join(names)}), not {values!r}."
            )

    is_joint = [name == "joint" for name in names]
    return [Stage(*stage) for stage in zip(names, cuts, steps, rates, is_joint, strict=True)]


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """Accelerate's state for a run: precision, accumulation, trackers, and how the data is shared
    out.
    """
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
    """Gives this process its share of the cores, where a launcher has given it one thread because
    nobody asked.
    """
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":
        torch.set_num_threads(
            max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        )


def discrete_baseline(config: TarFlowLMConfig) -> PreTrainedModel:
    """The library's own causal model with the flows' block config, as deep as the whole stack.

    Its vocabulary has one entry more, the beginning-of-sequence token that stands before the first
    one (and that the flows' start vectors correspond to), so that both models score the same
    tokens.
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


def compute_loss(
    model: torch.nn.Module,
    input_ids: Tensor,
    generator: Generators | None = None,
    num_flows: int | None = None,
    num_tokens: Tensor | None = None,
) -> Tensor:
    """Nats per token of a batch (B, T): minus the ELBO of a TarFlowLM, the cross-entropy of a
    discrete model.

    Of a conditional TarFlowLM they are nats per missing token, given those that
    `draw_observed_mask` observes.

    Args:
        generator: Source of the latents' noise. With one for each sequence, what a sequence draws
            does not depend on the others beside it.
        num_flows: Of the stack cut after its first flows.
        num_tokens: What the nats of a TarFlowLM are divided by, in place of the number of tokens
            that they are of.
    """
    bare = extract_model_from_parallel(model, keep_torch_compile=False)
    if isinstance(bare, TarFlowLMModel):
        options = {"num_flows": num_flows}
        if bare.config.conditional:
            device = input_ids.device if generator is None else _device(generator)
            mask = draw_observed_mask(input_ids.shape, bare.config.patch_size, generator, device)
            options["observed_mask"] = mask.to(input_ids.device)

        if isinstance(generator, Sequence):
            size = input_ids.shape[1], bare.config.latent_size
            options["latent_noise"] = torch.stack(
                [torch.randn(size, generator=g, device=g.device) for g in generator]
            )
        else:
            options["generator"] = generator

        output = model(input_ids=input_ids, labels=input_ids, **options)
        return output.loss if num_tokens is None else -output.elbo.sum() / num_tokens

    inputs = prepend_start(bare, input_ids)
    return model(input_ids=inputs, labels=inputs, use_cache=False).loss


def _device(generator: Generators) -> torch.device:
    return generator[0].device if isinstance(generator, Sequence) else generator.device


def draw_observed_mask(
    shape: tuple[int, int],
    patch_size: int = 1,
    generator: Generators | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Which tokens (B, T) a conditional model is told in training: whole patches, of each sequence
    on its own.

    With a probability of one third each: nothing; a prefix, all lengths from one position to all
    but one alike; spans, of which a share r is observed, with a cut between two positions with
    probability c, where r and c are drawn from U(0, 1). Where that would observe everything,
    nothing is observed.

    Args:
        shape: (B, T), T a multiple of `patch_size`.
        generator: Source of the randomness, on `device`, or one for each sequence; the global one
            by default.

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
        if isinstance(generator, Sequence):
            return torch.stack(
                [torch.rand(num_columns, generator=g, device=g.device) for g in generator]
            )
        return torch.rand(num_sequences, num_columns, generator=generator, device=device)

    kind, share, cut, length = uniform(4).split(1, -1)
    position = torch.arange(num_positions, device=kind.device)
    prefix = position < 1 + (length * (num_positions - 1)).long()
    span = (uniform(num_positions) < cut).cumsum(-1).clamp(max=num_positions - 1)
    spans = (uniform(num_positions) < share).gather(-1, span)
    observed = torch.where(kind < 1 / 3, False, torch.where(kind < 2 / 3, prefix, spans))
    observed = observed & ~observed.all(-1, keepdim=True)

    return observed.repeat_interleave(patch_size, -1)


def make_optimizer(
    model: PreTrainedModel, config: TrainingConfig, learning_rate: float | None = None
) -> torch.optim.Optimizer:
    """AdamW of what is trained; weight decay pulls on matrices, but not on the codebook, whose size
    means something.
    """
    decayed, kept = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_matrix = parameter.ndim >= 2 and not name.endswith("bias")
            (decayed if is_matrix and "codebook" not in name else kept).append(parameter)

    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    learning_rate = config.learning_rate if learning_rate is None else learning_rate

    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, config.adam_beta2))


class RowNoise:
    """A generator for each sequence of a step, seeded by run, step and the sequence's place in the
    step's batch.

    So a resumed run draws what the uninterrupted one did, and neither the number of processes nor
    that of the parts in which a step is computed changes what a sequence draws.
    """

    def __init__(self, seed: int, num_rows: int, first_row: int, device: torch.device):
        self.seed, self.first_row = seed, first_row
        self.generators = [torch.Generator(device) for _ in range(num_rows)]

    def at(self, step: int, first_row: int) -> list[torch.Generator]:
        """Of the sequences that follow the `first_row` of this process in the step."""
        for row, generator in enumerate(self.generators, self.first_row + first_row):
            seed = np.random.SeedSequence([self.seed, step, row]).generate_state(1, np.uint64)[0]
            generator.manual_seed(int(seed))
        return self.generators


@torch.no_grad()
def validate(
    model: PreTrainedModel,
    data: PackedTokens,
    max_sequences: int,
    accelerator: Accelerator,
    num_flows: int | None = None,
    batch_size: int = 16,
) -> Likelihood:
    """`likelihood` of the first sequences, whose batches the processes share: the same result in
    all of them.

    Every process runs equally many forward passes, which sharded weights need: where batches are
    left over, some score the last one for nothing.
    """
    model.eval()
    num_sequences, length = min(max_sequences, len(data)), data.sequence_length
    batches = [
        range(num_sequences)[first : first + batch_size]
        for first in range(0, num_sequences, batch_size)
    ]
    nats = torch.zeros(num_sequences, dtype=torch.float64, device=accelerator.device)

    for index in range(
        accelerator.process_index,
        len(batches) + accelerator.process_index,
        accelerator.num_processes,
    ):
        batch = batches[min(index, len(batches) - 1)]
        input_ids = torch.stack([data[row]["input_ids"] for row in batch]).to(accelerator.device)
        scores = score_batch(model, input_ids, batch.start, num_flows=num_flows)
        if index < len(batches):
            nats[batch.start : batch.stop] = scores[0].double()

    nats = accelerator.reduce(nats, "sum").cpu()
    return Likelihood.of_sequences(nats, torch.full((num_sequences,), length))


def mean_missing_tokens(
    model: PreTrainedModel,
    noise: RowNoise,
    step: int,
    num_tokens: int,
    num_parts: int,
    accelerator: Accelerator,
) -> Tensor:
    """The missing tokens in a part of a conditional model's step, on average over its parts and the
    processes.

    Every part's nats are divided by it, so that the step's loss is the mean over all of its missing
    tokens.
    """
    count = torch.zeros((), device=accelerator.device)
    rows = len(noise.generators)

    for part in range(num_parts):
        generators = noise.at(step, part * rows * accelerator.num_processes)
        count += (
            ~draw_observed_mask((rows, num_tokens), model.config.patch_size, generators)
        ).sum()

    return accelerator.reduce(count, "mean") / num_parts


def train(
    model: PreTrainedModel,
    train_data: PackedTokens | StreamingPackedTokens,
    validation_data: PackedTokens,
    tokenizer: PreTrainedTokenizerBase,
    config: TrainingConfig,
    accelerator: Accelerator | None = None,
) -> PreTrainedModel:
    """Trains, stage by stage, and saves the model with its tokenizer to `output_dir/model`.

    Every `log_every` steps a line goes to `output_dir/log.jsonl` and the trackers. With
    `config.resume` training goes on from the newest checkpoint, and every loss equals that of the
    uninterrupted run: weights, optimiser, schedule and average come from the checkpoint; the order
    of the data follows from seed and epoch, the latents' noise from seed, step and the place in the
    batch. Neither depends on the number of processes.

    A frozen flow costs a forward pass: nothing that needs a gradient stands before it, so no graph
    is built through it, and its parameters have neither gradients nor optimiser state.

    With `config.patience` a stage ends with the weights of its best evaluation, whether or not it
    ends early; without, with its last ones.

    Returns:
        The trained model (the averaged one with `ema_decay`), in evaluation mode.

    Raises:
        ValueError: The batch can't be split evenly, there are fewer sequences than a batch, the
            stages do not fit the model or the tokenizer not the vocabulary, weights are sharded and
            to be averaged, frozen or kept, or a resumed run differs from the one that made the
            checkpoint. OSError: `output_dir`, or a checkpoint, can't be written.
            FloatingPointError: Something is not finite; says what, in which step and batch; no
            checkpoint is made of that.
    """
    accelerator = make_accelerator(config) if accelerator is None else accelerator
    output_dir = Path(config.output_dir)
    stages = make_stages(model, config)
    check_batches(train_data, config, accelerator)
    check_tokenizer(model, tokenizer)

    # 1. What is trained, and what must come back on a resume.
    description = {"model": model.config.to_diff_dict(), "training": asdict(config)}

    is_stream = isinstance(train_data, IterableDataset)
    if not is_stream:
        checksum = zlib.crc32(train_data.tokens[: 2**20].numpy())
        description["data"] = {
            "number of sequences": len(train_data),
            "checksum of the data": checksum,
        }

    progress, checkpoint = Progress(), None
    if config.resume:
        # With patience, when and on what it is evaluated decides what is trained.
        fixed = {"eval_every", "eval_sequences"} if config.patience else set()
        checkpoint, progress = newest_checkpoint(output_dir, description, FREE_FIELDS - fixed)

    check_output_dir(output_dir)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()

    average = None
    if config.ema_decay:
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay)).to(
            accelerator.device
        )
        accelerator.register_for_checkpointing(average)

    best = BestWeights()
    if config.patience:
        accelerator.register_for_checkpointing(best)

    parts = config.gradient_accumulation_steps
    rows = config.batch_size // parts // accelerator.num_processes  # sequences at once in a process
    noise = RowNoise(config.seed, rows, rows * accelerator.process_index, accelerator.device)
    loader = DataLoader(
        train_data, batch_size=config.batch_size // parts, shuffle=not is_stream, drop_last=True
    )
    loader = accelerator.prepare(loader)
    batches = endless(loader, progress.step * parts)
    log = Log(
        accelerator,
        output_dir,
        progress.step,
        sum(stage.num_steps for stage in stages),
        config,
        validation_data,
    )
    evaluated = model if average is None else average.module
    fault = FirstFault(model, accelerator)
    is_conditional = getattr(model.config, "conditional", False)
    origins = {}  # of the steps since the log's last line: what they were made of

    while True:
        # 2. A stage: what it trains, and with what.
        stage = stages[progress.stage]
        stage.choose_parameters(model)
        optimizer = make_optimizer(model, config, stage.learning_rate)
        scheduler = get_scheduler(
            "cosine_with_min_lr",
            optimizer,
            num_warmup_steps=config.warmup_steps,
            num_training_steps=stage.num_steps,
            scheduler_specific_kwargs={"min_lr": config.min_learning_rate},
        )
        wrapped, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)

        if checkpoint is not None:
            accelerator.load_state(str(checkpoint))
            checkpoint = None

        log.begin_stage(stage, training_flops(model, train_data.sequence_length, stage.num_flows))
        total = torch.zeros((), device=accelerator.device)
        is_over = is_stage_over(progress, stage, config)

        while not is_over:
            # 3. A step.
            num_tokens = None

            if is_conditional:
                length = train_data.sequence_length
                num_tokens = mean_missing_tokens(
                    model, noise, progress.step, length, parts, accelerator
                )

            for part in range(parts):
                epoch, index, batch = next(batches)
                input_ids = batch["input_ids"]

                if part == 0:
                    first = index * (config.batch_size // parts)
                    origins[progress.step + 1] = (
                        f"{config.batch_size} sequences, from number {first} of epoch {epoch} on"
                    )

                generators = noise.at(progress.step, part * rows * accelerator.num_processes)
                with accelerator.accumulate(wrapped):
                    loss = compute_loss(wrapped, input_ids, generators, stage.num_flows, num_tokens)
                    accelerator.backward(loss)
                    fault.see_loss(loss)

                    if accelerator.sync_gradients:
                        fault.see_gradients()
                        if config.max_grad_norm:
                            accelerator.clip_grad_norm_(wrapped.parameters(), config.max_grad_norm)

                    optimizer.step()
                    optimizer.zero_grad()

                total += loss.detach() / parts

            learning_rate = scheduler.get_last_lr()[0]
            scheduler.step()
            if average is not None:
                average.update_parameters(model)

            log.tokens += config.batch_size * input_ids.shape[1]
            progress.step += 1
            progress.stage_step += 1
            fault.end_step(progress.step)

            # 4. Looking, and keeping.
            step, is_over = progress.step, is_stage_over(progress, stage, config)
            is_save_due = bool(config.save_every and step % config.save_every == 0)

            is_evaluation_due = bool(config.eval_every and step % config.eval_every == 0)
            if step % config.log_every == 0 or is_save_due or is_evaluation_due or is_over:
                fault.check(origins)
                origins.clear()
                log.losses(step, accelerator.reduce(total, "mean").item(), learning_rate)
                total.zero_()

            if is_evaluation_due or is_over:
                with log.pause():
                    result = validate(
                        evaluated,
                        validation_data,
                        config.eval_sequences,
                        accelerator,
                        stage.num_flows,
                    )
                    log.validation(step, result)
                    stage.choose_parameters(model)

                    if result.nats_per_token < (
                        math.inf if progress.best is None else progress.best
                    ):
                        progress.best, progress.stale = result.nats_per_token, 0
                        if config.patience:
                            best.keep(
                                evaluated,
                                {name for name, p in model.named_parameters() if p.requires_grad},
                            )
                    else:
                        progress.stale += 1

                is_over = is_stage_over(progress, stage, config)

            if is_save_due or is_over:
                with log.pause():
                    save_checkpoint(
                        accelerator, output_dir, progress, description, config.keep_checkpoints
                    )

        # 5. The next stage stands on what was evaluated, the best of it if that was kept.
        if config.patience:
            best.restore(evaluated)

        state_dict = (
            accelerator.get_state_dict(wrapped)
            if accelerator.distributed_type == DistributedType.FSDP
            else None
        )

        if average is not None:
            model.load_state_dict(average.module.state_dict())
            average.n_averaged.zero_()

        if progress.stage + 1 == len(stages):
            break

        progress = progress.next_stage()
        accelerator.unwrap_model(
            wrapped, keep_fp32_wrapper=False, keep_torch_compile=False
        )  # it is wrapped anew
        wrapped, optimizer, scheduler = accelerator.free_memory(wrapped, optimizer, scheduler)

    log.close()
    fault.close()

    model.requires_grad_(True)
    if accelerator.is_main_process:
        save_model(evaluated, tokenizer, output_dir / "model", state_dict)

    accelerator.wait_for_everyone()
    return evaluated.eval()


def is_stage_over(progress: Progress, stage: Stage, config: TrainingConfig) -> bool:
    """Whether its budget is used up, or validation has stopped improving."""
    return progress.stage_step >= stage.num_steps or 0 < config.patience <= progress.stale


def check_batches(
    train_data: PackedTokens | StreamingPackedTokens,
    config: TrainingConfig,
    accelerator: Accelerator,
):
    """Raises ValueError before the first step where a batch can't be made, or sharded weights can't
    be treated so.

    Torch's FSDP2 would freeze sharded weights; but Accelerate shards a model once, together with
    its optimiser, and each stage has another optimiser. And it can't be tested without GPUs, for on
    a CPU it takes DDP in FSDP's place.
    """
    parts = config.gradient_accumulation_steps
    if config.batch_size % (parts * accelerator.num_processes):
        raise ValueError(
            f"batch_size {config.batch_size} can't be split into {parts} gradient_accumulation_steps on "
            f"{accelerator.num_processes} processes."
        )

    if isinstance(train_data, IterableDataset):
        if not train_data.has_blocks(config.batch_size):
            raise ValueError(
                f"The stream ends with fewer sequences to train on than batch_size {config.batch_size}."
            )
    elif len(train_data) < config.batch_size:
        raise ValueError(
            f"There are {len(train_data)} sequences to train on, fewer than batch_size {config.batch_size}."
        )

    is_plain = not config.ema_decay and config.mode == "joint" and not config.patience
    if accelerator.distributed_type == DistributedType.FSDP and not is_plain:
        raise ValueError(
            f"With FSDP, ema_decay must be 0, mode joint and patience 0, not {config.ema_decay}, {config.mode} and "
            f"{config.patience}: sharded weights can't be averaged, frozen later on, or kept aside. Use DDP."
        )


def check_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError where the tokenizer has tokens that the model does not know."""
    vocab_size = model.config.vocab_size - (
        not isinstance(model, TarFlowLMModel)
    )  # without the discrete one's start
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens, more than the model's vocab_size, {vocab_size}."
        )


def endless(loader: DataLoader, num_used: int) -> Iterator[tuple[int, int, dict[str, Tensor]]]:
    """The batches of epoch after epoch, behind the `num_used` first ones, each with its epoch and
    its index there.

    A data set skips these without loading them; a stream, which does not know its length, is read
    again.
    """
    epoch, is_stream = 0, isinstance(loader.dataset, IterableDataset)
    if not is_stream:
        epoch, num_used = divmod(num_used, len(loader))

    while True:
        loader.set_epoch(epoch)
        first = 0 if is_stream else num_used
        for index, batch in enumerate(
            skip_first_batches(loader, first) if first else loader, first
        ):
            if num_used and is_stream:
                num_used -= 1
            else:
                yield epoch, index, batch

        epoch, num_used = epoch + 1, num_used if is_stream else 0


class Log:
    """A progress bar, a line of JSON for each entry, and Accelerate's trackers. Loss in nats per
    token.

    Speeds are of the steps since the line before. FLOPs utilisation is stated where the device's
    peak is known.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: Path,
        first_step: int,
        num_steps: int,
        config: TrainingConfig,
        validation_data: PackedTokens,
    ):
        self.accelerator = accelerator
        self.nats_to_bits_per_character = 1 / (math.log(2) * validation_data.characters_per_token)
        self.sequence_length = validation_data.sequence_length
        self.path = output_dir / "log.jsonl"
        self.tokens, self.seconds, self.since = 0, 0.0, time.perf_counter()
        self.last_step = first_step
        self.stage, self.flops = {}, 0
        peak = peak_flops(accelerator.device, accelerator.mixed_precision)
        self.peak = None if peak is None else peak * accelerator.num_processes
        is_main = accelerator.is_main_process
        self.bar = tqdm(
            total=num_steps, initial=first_step, desc="training", unit="step", disable=not is_main
        )

        if is_main:
            output_dir.mkdir(parents=True, exist_ok=True)
            entries = _read_lines(self.path) if first_step and self.path.exists() else []
            kept = [entry for entry in entries if entry["step"] <= first_step]
            aside = self.path.with_suffix(".part")
            aside.write_text("".join(f"{json.dumps(entry)}\n" for entry in kept))
            aside.replace(self.path)

        if config.report_to:
            values = {
                key: str(v) if isinstance(v, list) else v
                for key, v in asdict(config).items()
                if v is not None
            }
            accelerator.init_trackers("tarflow_hf", values)

    def begin_stage(self, stage: Stage, flops: int) -> None:
        """`flops`: of one sequence in a training step."""
        self.stage = {"stage": stage.name, "num_flows": stage.num_flows}
        self.flops = flops
        self.since = time.perf_counter()

    def losses(self, step: int, total: float, learning_rate: float) -> None:
        loss = total / (step - self.last_step)
        self.bar.update(step - self.last_step)
        self.last_step = step
        tokens_per_second = self.tokens / (self.seconds + time.perf_counter() - self.since)
        self.tokens, self.seconds, self.since = 0, 0.0, time.perf_counter()
        values = {
            "loss": loss,
            "bits_per_character": loss * self.nats_to_bits_per_character,
            "learning_rate": learning_rate,
            "tokens_per_second": round(tokens_per_second),
            "flops_per_second": tokens_per_second * self.flops / self.sequence_length,
            "peak_memory_gib": round(peak_memory(self.accelerator.device) / 2**30, 3),
        }
        if self.peak is not None:
            values["model_flops_utilization"] = values["flops_per_second"] / self.peak

        self.bar.set_postfix_str(
            f"loss {loss:.4f}, {values['bits_per_character']:.3f} bits/char, {values['tokens_per_second']:,} tokens/s"
        )
        self._write(step, values)

    def validation(self, step: int, result: Likelihood) -> None:
        values = {
            "validation_loss": result.nats_per_token,
            "validation_standard_error": result.standard_error,
        }
        values["validation_bits_per_character"] = (
            result.nats_per_token * self.nats_to_bits_per_character
        )

        if self.accelerator.is_main_process:
            self.bar.write(
                f"step {step}, {self.stage['stage']}: validation {values['validation_loss']:.4f} nats per token, "
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
                file.write(json.dumps({"step": step, **self.stage, **values}) + "\n")
        self.accelerator.log(values, step=step)


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The entries of a log, up to a line that a killed run has not finished."""
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return
