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
from ..data import PackedTokens
from ..evaluation.likelihood import Likelihood
from .config import TrainingConfig
from .stages import Stage


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
