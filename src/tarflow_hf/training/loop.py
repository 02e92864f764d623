"""The training loop, on Accelerate; it resumes exactly."""

import math
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import (
    DistributedType,
)
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, IterableDataset
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_scheduler,
)

from ..cost import training_flops
from ..data import PackedTokens, StreamingPackedTokens
from ..evaluation.likelihood import Likelihood, score_batch
from ..modeling.modeling_tarflowlm import TarFlowLMModel
from .checkpointing import (
    BestWeights,
    Progress,
    check_output_dir,
    newest_checkpoint,
    save_checkpoint,
    save_model,
)
from .config import FREE_FIELDS, TrainingConfig, make_accelerator
from .divergence import FirstFault
from .log import Log
from .loss import RowNoise, compute_loss, mean_missing_tokens
from .stages import is_stage_over, make_optimizer, make_stages


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
