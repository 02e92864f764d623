"""The log of a run: a progress bar, lines of JSON, and Accelerate's trackers."""

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm.auto import tqdm

from ..cost import peak_flops, peak_memory
from ..evaluation.likelihood import Likelihood
from .batches import HeldOutData
from .checkpointing import Progress
from .config import TrainingConfig
from .folder import LOG
from .stages import Stage


class JsonLines:
    """A file with an object for each entry of a log.

    It is no tracker of Accelerate's: a resumed run first drops the entries that it makes again, and
    there is a file whatever trackers the caller's Accelerator has.
    """

    def __init__(self, path: Path, first_step: int):
        """Keeps the entries up to `first_step`, the step that a run goes on from; 0 keeps none."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        entries = self._read() if first_step and path.exists() else []
        kept = [entry for entry in entries if entry["step"] <= first_step]

        with self._saying_what_to_do():
            aside = path.with_suffix(".part")
            aside.write_text("".join(f"{json.dumps(entry)}\n" for entry in kept), "utf-8")
            aside.replace(path)

    @contextmanager
    def _saying_what_to_do(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(
                f"{self.path} could not be written: {error}. Is the disk full? Make room, then go on from the newest "
                "checkpoint with resume."
            ) from None

    def _read(self) -> Iterator[dict[str, Any]]:
        """The entries, up to a line that a killed run has not finished."""
        for line in self.path.read_text("utf-8").splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                return

    def write(self, entry: dict[str, Any]) -> None:
        with self._saying_what_to_do(), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


class Log:
    """A progress bar, the lines of `log.jsonl`, and Accelerate's trackers. Losses in nats per token.

    Speeds are means over the steps since the entry before. The utilisation of FLOPs is stated if
    the device's peak is known.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        config: TrainingConfig,
        progress: Progress,
        num_steps: int,
        validation_data: HeldOutData,
    ):
        self.accelerator = accelerator
        self.nats_to_bits_per_character = 1 / (math.log(2) * validation_data.characters_per_token)
        self.sequence_length = validation_data.sequence_length
        self.tokens, self.seconds, self.since = 0, 0.0, time.perf_counter()
        self.last_step = progress.logged_step or 0
        self.stage: dict[str, Any] = {}
        self.flops = 0
        peak = peak_flops(accelerator.device, accelerator.mixed_precision)
        self.peak = None if peak is None else peak * accelerator.num_processes

        is_main = accelerator.is_main_process
        self.bar = tqdm(
            total=num_steps,
            initial=progress.step,
            desc="training",
            unit="step",
            disable=not is_main,
        )
        path = Path(config.output_dir) / LOG
        self.lines = JsonLines(path, progress.step) if is_main else None
        if config.report_to:
            accelerator.init_trackers("tarflow_hf", _plain(config))

    def begin_stage(self, stage: Stage, flops: int) -> None:
        """Names the stage in the entries that follow; a sequence takes `flops` in a step of it."""
        self.stage = {"stage": stage.name, "num_flows": stage.num_flows}
        self.flops = flops
        self.since = time.perf_counter()

    def count(self, num_tokens: int) -> None:
        """Adds the tokens of a step, over all processes."""
        self.tokens += num_tokens

    def losses(self, step: int, total: float, learning_rate: float) -> None:
        """Writes an entry of training: `total` is the sum of the losses since the one before."""
        loss = total / (step - self.last_step)
        self.bar.update(step - self.bar.n if not self.bar.disable else 0)
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
            f"loss {loss:.4f}, {values['bits_per_character']:.3f} bits/char, "
            f"{values['tokens_per_second']:,} tokens/s"
        )
        self._write(step, values)

    def validation(self, step: int, result: Likelihood) -> None:
        """Writes an entry of an evaluation."""
        values = {
            "validation_loss": result.nats_per_token,
            "validation_standard_error": result.standard_error,
            "validation_bits_per_character": result.nats_per_token
            * self.nats_to_bits_per_character,
        }

        if self.accelerator.is_main_process:
            self.bar.write(
                f"step {step}, {self.stage['stage']}: "
                f"validation {values['validation_loss']:.4f} nats per token, "
                f"{values['validation_bits_per_character']:.4f} bits per character"
            )

        self._write(step, values)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time that passes in here does not count as training."""
        self.seconds += time.perf_counter() - self.since
        try:
            yield
        finally:
            self.since = time.perf_counter()

    def close(self) -> None:
        self.bar.close()
        if self.accelerator.log_with:
            self.accelerator.end_training()

    def _write(self, step: int, values: dict[str, Any]) -> None:
        if self.lines is not None:
            self.lines.write({"step": step, **self.stage, **values})
        self.accelerator.log(values, step=step)


def _plain(config: TrainingConfig) -> dict[str, Any]:
    """The fields that are set, lists as text: trackers take numbers and strings."""
    set_fields = {name: value for name, value in asdict(config).items() if value is not None}
    return {name: str(v) if isinstance(v, list) else v for name, v in set_fields.items()}
