"""The training loop, on Accelerate. A resumed run goes on exactly as the uninterrupted one."""

import math
import signal
import time
import uuid
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_scheduler

from ..cost import training_flops
from ..data import SentenceTokens
from ..evaluation.likelihood import validate
from .adapters import add_lora, merge_lora
from .batches import (
    HeldOutData,
    TrainingData,
    check_batches,
    check_sentences,
    check_tokenizer,
    endless,
    make_loader,
)
from .checkpointing import (
    BestWeights,
    Progress,
    checkpoints_in,
    describe,
    newest_checkpoint,
    remove_leftovers,
    save_checkpoint,
    save_model,
)
from .config import FREE_FIELDS, TrainingConfig, make_accelerator
from .divergence import FirstFault
from .folder import check_output_dir, locked, make_output_dir
from .interruption import RunStopped, StopRequest
from .log import Log
from .loss import RowNoise, StepDraws, compute_loss, draw_step, mean_missing_tokens
from .optimizers import make_optimizer
from .stages import Stage, make_stages

# The most steps between two looks at what was asked of any of several processes.
STEPS_BETWEEN_LOOKS = 10
FEWEST_SECONDS = 10  # between two saves by time
SAVE, END = 1, 2  # what may be asked for between two steps


def train(
    model: PreTrainedModel,
    train_data: TrainingData,
    validation_data: HeldOutData,
    tokenizer: PreTrainedTokenizerBase,
    config: TrainingConfig,
    accelerator: Accelerator | None = None,
) -> PreTrainedModel:
    """Trains, stage by stage, and saves the model with its tokenizer to `output_dir/model`.

    Every `log_every` steps a line goes to `output_dir/log.jsonl` and the trackers. With
    `config.resume` training goes on from the newest checkpoint, and every loss equals that of the
    uninterrupted run. Weights, optimiser, schedule and average come from the checkpoint. The order
    of the data follows from seed and epoch; the latents' noise from seed, step and the place in the
    batch. Neither depends on the number of processes.

    A frozen flow costs a forward pass. Nothing that needs a gradient stands before it, so no graph
    is built through it, and its parameters have neither gradients nor optimiser state.

    With `config.lora_rank` the first flow's body is adapted by LoRA, which is merged at the end.

    With `config.patience` a stage ends with the weights of its best evaluation, whether or not it
    ends early; without, with its last ones.

    Returns:
        The trained model (the averaged one with `ema_decay`), in evaluation mode.

    Raises:
        ValueError: If the batch can't be split evenly, if there are fewer sequences than a batch,
            if the stages do not fit the model or the tokenizer not the vocabulary, if weights are
            sharded and to be averaged, frozen or kept, or if a resumed run differs from the one
            that made the checkpoint.
        ImportError: If LoRA is asked for and PEFT is not installed.
        OSError: If `output_dir`, or a checkpoint, can't be written; if another run works in
            `output_dir`, or has left checkpoints or a model there and is not resumed.
        RunStopped: After the step in which SIGINT or SIGTERM came. The run is saved then.
        FloatingPointError: If something is not finite. The message says what, in which step and
            batch; no checkpoint is made of it.
    """
    accelerator = make_accelerator(config) if accelerator is None else accelerator
    add_lora(model, config)
    stages = make_stages(model, config)
    check_batches(train_data, config, accelerator)
    check_tokenizer(model, tokenizer)
    check_sentences(model, train_data)

    check_output_dir(config.output_dir, config.resume)
    make_output_dir(config.output_dir)

    with locked(config.output_dir, accelerator), StopRequest() as request:
        # 1. What a run keeps from stage to stage; on a resume, where it stands.
        run = Run(
            model, train_data, validation_data, tokenizer, stages, config, accelerator, request
        )

        for stage in stages[run.progress.stage :]:
            # 2. A stage: what it trains, and with what.
            run.begin(stage)

            while not run.is_stage_over():
                # 3. A step.
                run.step()

                # 4. Looking, and keeping.
                run.look()

            # 5. The next stage stands on what was evaluated, the best of it if that was kept.
            run.end_stage()
            if config.finish:
                break

        # 6. The model, evaluated and saved as it is returned.
        return run.finish()


class Run:
    """A run of `train` between its steps: where it stands, and everything that stands with it.

    Attributes:
        progress: The step, the stage, and its best evaluation.
        evaluated: The model that is evaluated and saved: the trained one, or its average.
        total: The sum of the losses since the log's last line.
        origins: The batches of each step since then, for `FirstFault`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        train_data: TrainingData,
        validation_data: HeldOutData,
        tokenizer: PreTrainedTokenizerBase,
        stages: list[Stage],
        config: TrainingConfig,
        accelerator: Accelerator,
        request: StopRequest,
    ):
        self.model, self.tokenizer, self.stages = model, tokenizer, stages
        self.config, self.accelerator, self.request = config, accelerator, request
        self.validation_data, self.length = validation_data, train_data.sequence_length
        has_sentences = isinstance(train_data, SentenceTokens)
        self.mean_length = train_data.mean_length if has_sentences else None
        self.output_dir = Path(config.output_dir)

        self.description = describe(model, train_data, validation_data, config, accelerator)
        self.checkpoint, self.progress = self._where_it_stands()
        self.saved_at, self.save_seconds = time.perf_counter(), 0.0
        if config.gradient_checkpointing:
            recompute_activations(model)

        self._register_what_is_kept()
        self._prepare_batches(train_data)
        self.log = Log(accelerator, config, self.progress, self._num_steps(), validation_data)
        self.fault = FirstFault(model, accelerator)
        self.origins: dict[int, str] = {}

        # What `begin` makes for each stage, and the rate of the newest step.
        self.stage: Stage
        self.wrapped: nn.Module
        self.optimizer: AcceleratedOptimizer
        self.scheduler: AcceleratedScheduler
        self.total: Tensor
        self.learning_rate: float

    def _where_it_stands(self) -> tuple[Path | None, Progress]:
        """The checkpoint to go on from, if any, and the point that the run has reached."""
        if self.accelerator.is_main_process:
            remove_leftovers(self.output_dir)

        self.accelerator.wait_for_everyone()
        new = Progress(logged_step=0, run_id=uuid.uuid4().hex)
        if not self.config.resume:
            return None, new

        if not checkpoints_in(self.output_dir):
            self.accelerator.print(
                f"The run in {self.output_dir} was ended before its first checkpoint: it begins anew."
            )
            return None, new

        # With patience, when and on what it is evaluated decides what is trained.
        fixed = {"eval_every", "eval_sequences"} if self.config.patience else set()
        path, progress = newest_checkpoint(self.output_dir, self.description, FREE_FIELDS - fixed)
        self.accelerator.print(f"Going on from step {progress.step}, saved in {path}.")
        if progress.logged_step is None:
            progress.logged_step = progress.step

        return path, progress

    def _num_steps(self) -> int:
        """The steps at the end of the run: those taken, and the budgets of what is left."""
        left = sum(stage.num_steps for stage in self.stages[self.progress.stage :])
        return self.progress.step - self.progress.stage_step + left

    def _register_what_is_kept(self) -> None:
        """Makes the average and the best weights a part of every checkpoint, in this order."""
        config, accelerator = self.config, self.accelerator
        self.average = None
        if config.ema_decay:
            average = get_ema_multi_avg_fn(config.ema_decay)
            self.average = AveragedModel(self.model, multi_avg_fn=average).to(accelerator.device)
            accelerator.register_for_checkpointing(self.average)

        self.best = BestWeights()
        if config.patience:
            accelerator.register_for_checkpointing(self.best)

        self.evaluated = self.model if self.average is None else self.average.module

    def _prepare_batches(self, train_data: TrainingData) -> None:
        config, accelerator = self.config, self.accelerator
        self.parts = config.gradient_accumulation_steps
        self.rows = config.batch_size // self.parts // accelerator.num_processes
        first_row = self.rows * accelerator.process_index
        self.noise = RowNoise(config.seed, self.rows, first_row, accelerator.device)

        loader = make_loader(train_data, config, accelerator)
        self.batches = endless(loader, self.progress.step * self.parts)

    # ----------------------------------------------------------------------------------------------
    # A stage
    # ----------------------------------------------------------------------------------------------

    def begin(self, stage: Stage) -> None:
        """Wraps the model with an optimiser and a schedule for the stage; loads the checkpoint."""
        config, accelerator = self.config, self.accelerator
        self.stage = stage
        stage.choose_parameters(self.model)

        optimizer = make_optimizer(self.model, config, stage.learning_rate)
        scheduler = get_scheduler(
            "cosine_with_min_lr",
            optimizer,
            num_warmup_steps=config.warmup_steps,
            num_training_steps=stage.num_steps,
            scheduler_specific_kwargs={"min_lr": config.min_learning_rate},
        )
        self.wrapped, self.optimizer, self.scheduler = accelerator.prepare(
            self.model, optimizer, scheduler
        )

        if self.checkpoint is not None:
            self._load()

        self.log.begin_stage(stage, training_flops(self.model, self.length, stage.num_flows))
        self.total = torch.tensor(self.progress.total, device=accelerator.device)

    def _load(self) -> None:
        """Loads the checkpoint; learning rates are those of the schedule as it is now."""
        self.accelerator.load_state(str(self.checkpoint))
        self.checkpoint = None
        self.accelerator.step = self.progress.step * self.parts

        schedule = self.scheduler.scheduler
        schedule._last_lr = [
            rate * factor(schedule.last_epoch)
            for rate, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        ]
        for group, rate in zip(self.optimizer.param_groups, schedule._last_lr, strict=True):
            group["lr"] = rate

    def is_stage_over(self) -> bool:
        """True if the stage's budget is used up, or validation has stopped improving."""
        is_used_up = self.progress.stage_step >= self.stage.num_steps
        return self.config.finish or is_used_up or 0 < self.config.patience <= self.progress.stale

    def end_stage(self) -> None:
        """Leaves the model with the weights that were evaluated; before another stage, unwrapped."""
        if self.config.patience:
            self.best.restore(self.evaluated)

        if self.average is not None:
            self.model.load_state_dict(self.average.module.state_dict())
            self.average.n_averaged.zero_()

        if self.progress.stage + 1 < len(self.stages):
            self.progress = self.progress.next_stage()
            # The next stage wraps it anew.
            self.accelerator.unwrap_model(
                self.wrapped, keep_fp32_wrapper=False, keep_torch_compile=False
            )
            self.wrapped, self.optimizer, self.scheduler = self.accelerator.free_memory(
                self.wrapped, self.optimizer, self.scheduler
            )

    # ----------------------------------------------------------------------------------------------
    # A step
    # ----------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Takes an optimiser step, computed in `gradient_accumulation_steps` parts."""
        draws = self._draw()
        num_tokens = mean_missing_tokens(draws, self.accelerator)
        if self.mean_length is not None:  # then the step's loss is a mean over the corpus's tokens
            num_tokens = torch.tensor(self.rows * self.mean_length, device=self.accelerator.device)

        for part in draws:
            self._add_part(part, num_tokens)

        self.learning_rate = self.scheduler.get_last_lr()[0]
        self.scheduler.step()
        if self.average is not None:
            self.average.update_parameters(self.model)

        self.progress.step += 1
        self.progress.stage_step += 1
        self.fault.end_step(self.progress.step)
        self.log.count(round(self.config.batch_size * (self.mean_length or self.length)))

    def _draw(self) -> list[StepDraws]:
        """Returns the draws of each part of the step, in this process."""
        shape = self.rows, self.length
        draws = []

        for part in range(self.parts):
            first_row = part * self.rows * self.accelerator.num_processes
            draws.append(draw_step(self.model, shape, self.noise.at(self.progress.step, first_row)))

        return draws

    def _add_part(self, draws: StepDraws, num_tokens: Tensor | None) -> None:
        """Adds a part's gradients; takes the step if it was the last part."""
        batch = self._next_batch()
        input_ids, mask = batch["input_ids"], batch.get("attention_mask")
        draws = draws.cut(input_ids.shape[1])

        with self.accelerator.accumulate(self.wrapped):
            loss = compute_loss(
                self.wrapped, input_ids, draws, self.stage.num_flows, num_tokens, mask
            )
            self.accelerator.backward(loss)
            self.fault.see_loss(loss)

            if self.accelerator.sync_gradients:
                self.fault.see_gradients()
                if self.config.max_grad_norm:
                    self.accelerator.clip_grad_norm_(
                        self.wrapped.parameters(), self.config.max_grad_norm
                    )

            # Neither does anything before the last part.
            self.optimizer.step()
            self.optimizer.zero_grad()

        self.total += loss.detach() / self.parts

    def _next_batch(self) -> dict[str, Tensor]:
        # The loader draws at the start of an epoch, and again on a resume: dropout must not see that.
        with torch.random.fork_rng(devices=[]):
            epoch, index, batch = next(self.batches)

        size = self.config.batch_size
        origin = f"{size} sequences, from number {index * (size // self.parts)} of epoch {epoch} on"
        self.origins.setdefault(self.progress.step + 1, origin)  # that of its first part

        return batch

    # ----------------------------------------------------------------------------------------------
    # Looking, and keeping
    # ----------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Logs, evaluates and saves what is due after a step; all of it at the end of a stage."""
        config, step = self.config, self.progress.step
        asked = self._asked_for()
        is_evaluation_due = is_due(step, config.eval_every) or self.is_stage_over()
        is_save_due = is_due(step, config.save_every)

        if is_due(step, config.log_every) or is_save_due or is_evaluation_due:
            self._log_losses()

        if is_evaluation_due:
            with self.log.pause():
                self._evaluate()

        is_over = self.is_stage_over()  # an evaluation may have ended the stage
        if is_save_due or asked or is_over:
            with self.log.pause():
                self._save()

        is_last = self.progress.stage + 1 == len(self.stages)
        if asked == END and not (is_over and is_last):
            self._stop()

    def _asked_for(self) -> int:
        """Returns `END` after a signal, `SAVE` when it is time to, else 0.

        All processes give the same answer. They would have to wait for each other to find it, so
        several of them look only every few steps.
        """
        config, num_processes = self.config, self.accelerator.num_processes
        asked = 0
        if self.request.signal is not None:
            asked = END
        elif self._is_time_to_save():
            asked = SAVE

        if num_processes == 1:
            return asked

        if self.progress.step % min(STEPS_BETWEEN_LOOKS, config.log_every):
            return 0

        return int(
            self.accelerator.gather(torch.tensor([asked], device=self.accelerator.device)).max()
        )

    def _is_time_to_save(self) -> bool:
        """True after `save_minutes`, or sooner if saving takes no more than 5% of the time."""
        longest = 60 * self.config.save_minutes
        seconds = min(longest, max(FEWEST_SECONDS, 20 * self.save_seconds))
        return longest > 0 and time.perf_counter() - self.saved_at >= seconds

    def _save(self) -> None:
        self._check_faults()
        self.progress.total = self.accelerator.reduce(self.total, "mean").item()
        begin = time.perf_counter()
        save_checkpoint(
            self.accelerator,
            self.output_dir,
            self.progress,
            self.description,
            self.config.keep_checkpoints,
            self.model,
            self.tokenizer,
        )
        self.saved_at = time.perf_counter()
        self.save_seconds = self.saved_at - begin

    def _stop(self) -> None:
        """Ends the run after a signal.

        Raises:
            RunStopped: Always.
        """
        self.log.close()
        self.fault.close()
        step = self.progress.step
        raise RunStopped(
            f"Stopped after step {step}, saved in {self.output_dir / f'checkpoint-{step}'}. To go on, give the same "
            "command with --resume; to end here with a model, with --resume --finish.",
            self.request.signal or signal.SIGTERM,
        )

    def _check_faults(self) -> None:
        self.fault.check(self.origins)
        self.origins.clear()

    def _log_losses(self) -> None:
        self._check_faults()
        total = self.accelerator.reduce(self.total, "mean").item()
        self.log.losses(self.progress.step, total, self.learning_rate)
        self.progress.logged_step = self.progress.step
        self.total.zero_()

    def _evaluate(self) -> None:
        """Validates, and keeps the weights if they are the stage's best."""
        result = validate(
            self.evaluated,
            self.validation_data,
            self.config.eval_sequences,
            self.accelerator,
            self.stage.num_flows,
        )
        self.log.validation(self.progress.step, result)
        self.stage.choose_parameters(self.model)

        best = math.inf if self.progress.best is None else self.progress.best
        if not result.nats_per_token < best:  # NaN is no better
            self.progress.stale += 1
            return

        self.progress.best, self.progress.stale = result.nats_per_token, 0
        if self.config.patience:
            named = self.model.named_parameters()
            self.best.keep(self.evaluated, {name for name, p in named if p.requires_grad})

    def finish(self) -> PreTrainedModel:
        """Saves the model with its tokenizer, and returns it in evaluation mode."""
        state_dict = None
        if self.accelerator.distributed_type == DistributedType.FSDP:
            state_dict = self.accelerator.get_state_dict(self.wrapped)

        self.log.close()
        self.fault.close()
        self.model.requires_grad_(True)
        self.evaluated.requires_grad_(True)  # the average may be a model of its own
        merge_lora(self.evaluated)

        if self.accelerator.is_main_process:
            save_model(self.evaluated, self.tokenizer, self.output_dir / "model", state_dict)

        self.accelerator.wait_for_everyone()
        return self.evaluated.eval()


def recompute_activations(model: PreTrainedModel) -> None:
    """Turns on checkpointing of activations, by the name that the installed library has for it."""
    new_name = "activation_checkpointing_enable"
    enable = new_name if hasattr(model, new_name) else "gradient_checkpointing_enable"
    getattr(model, enable)()


def is_due(step: int, every: int) -> bool:
    """True for a step that is a multiple of `every`; never if that is 0."""
    return every > 0 and step % every == 0
