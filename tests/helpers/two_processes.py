"""Short trainings whose losses do not depend on the number of processes.

    torchrun --nproc_per_node 2 -m helpers.two_processes FOLDER    # prints the losses, as JSON

`training/test_loop.py` runs it.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.fsdp import fully_shard
from transformers import set_seed

from helpers.training import TEXT, config, run
from tarflow_hf import TarFlowLMModel
from tarflow_hf.data import PackedTokens, StreamingPackedTokens, character_tokenizer
from tarflow_hf.training import (
    FirstFault,
    RowNoise,
    TrainingConfig,
    compute_loss,
    discrete_baseline,
    draw_step,
    make_optimizer,
)

CASES = {
    "flow": {},
    "baseline": {"baseline": True},
    "stream, in two parts": {"stream": True, "gradient_accumulation_steps": 2},
    "conditional": {"conditional": True},
    "progressive": {"mode": "progressive_then_joint", "stage_steps": [3, 3, 2], "ema_decay": 0.5},
    "patience": {
        "mode": "progressive",
        "stage_steps": [4, 4],
        "patience": 1,
        "eval_every": 1,
        "learning_rate": 0.1,
    },
}


def losses(folder: Path) -> dict[str, list[float]]:
    tokenizer = character_tokenizer()
    data = PackedTokens([TEXT], tokenizer, 16)
    results = {}

    for name, options in CASES.items():
        options = {"eval_sequences": 40, **options}  # two batches of 16, and one of 8
        model_config = config(conditional=options.pop("conditional", False))
        stream = options.pop("stream", False)
        train_data = (
            StreamingPackedTokens([TEXT], tokenizer, 16, shuffle_buffer=8) if stream else data
        )
        options = {"train_data": train_data, "learning_rate": 0.01, **options}
        _, by_step = run(folder / name, data, tokenizer, model_config, **options)
        log = (folder / name / "log.jsonl").read_text().splitlines()
        validations = [
            entry["validation_loss"] for entry in map(json.loads, log) if "validation_loss" in entry
        ]
        results[name] = [*by_step.values(), *validations]

    return results


def sharded_losses(baseline: bool, rank: int = 0, world_size: int = 1) -> list[float]:
    """Returns the losses of three steps, then makes a fourth with a gradient that is not finite.

    With a process group, FSDP2 has spread the weights over its processes; one of them has the bad
    gradient.
    """
    set_seed(0)
    model = discrete_baseline(config()) if baseline else TarFlowLMModel(config())

    if dist.is_initialized():
        for module in model.modules():
            if type(module).__name__ == "LlamaDecoderLayer":
                fully_shard(module)
        fully_shard(model)

    optimizer = make_optimizer(model, TrainingConfig(learning_rate=0.01))
    input_ids = torch.randint(27, (4, 16), generator=torch.Generator().manual_seed(0))
    rows = 4 // world_size
    noise = RowNoise(0, rows, rank * rows, torch.device("cpu"))
    fault = FirstFault(model, Accelerator())
    results = []

    for step in range(4):
        own = input_ids[rank * rows :][:rows]
        loss = compute_loss(model, own, draw_step(model, own.shape, noise.at(step, 0)))
        loss.backward()
        last = list(model.parameters())[-1].grad
        if step == 3 and rank == 0:
            (last.to_local() if dist.is_initialized() else last).fill_(torch.nan)

        fault.see_loss(loss)
        fault.see_gradients()
        fault.end_step(step)
        if step == 3:
            break

        fault.check({})
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / world_size
        if dist.is_initialized():
            dist.all_reduce(mean)

        results.append(mean.item())

    with pytest.raises(
        FloatingPointError, match=r"At step 3, the gradient of the (codebook|model) is the first"
    ):
        fault.check({3: ""})

    return results


if __name__ == "__main__":
    results = losses(Path(sys.argv[1]))
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for baseline in (False, True):
        results[f"sharded, baseline {baseline}"] = sharded_losses(baseline, rank, world_size)
    if rank == 0:
        print(json.dumps(results))
    dist.destroy_process_group()
