"""Short trainings of a small model on one sentence."""

import json
import os
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from transformers import set_seed

from helpers import ROOT
from tarflow_hf import TarFlowLMConfig, TarFlowLMModel
from tarflow_hf.data import PackedTokens, character_tokenizer
from tarflow_hf.training import TrainingConfig, discrete_baseline, train

TEXT = (
    "the quick brown fox jumps over the lazy dog and then it sleeps in the warm light of the sun "
    * 40
)


def config(**changes) -> TarFlowLMConfig:
    flows = [
        {"coupling": "mixture_rosenblatt", "direction": "left_to_right", "num_hidden_layers": 1},
        {
            "coupling": "mixture_cdf",
            "direction": "right_to_left",
            "num_hidden_layers": 1,
            "num_components": 2,
        },
    ]
    fields = {
        "vocab_size": 27,
        "latent_size": 2,
        "max_position_embeddings": 16,
        "hidden_size": 16,
        "flows": flows,
    }

    return TarFlowLMConfig(**{**fields, "num_attention_heads": 2, **changes})


def run(tmp_path, data, tokenizer, model_config=None, train_data=None, baseline=False, **options):
    """Trains from scratch (or resumes), and returns the model and the losses by step."""
    AcceleratorState._reset_state(reset_partial_state=True)  # as a new process would begin
    set_seed(0)
    training = TrainingConfig(
        **{
            "output_dir": str(tmp_path),
            "num_steps": 8,
            "batch_size": 4,
            "warmup_steps": 2,
            "log_every": 1,
            "save_minutes": 0,
            **options,
        }
    )
    model_config = model_config or config()
    model = discrete_baseline(model_config) if baseline else TarFlowLMModel(model_config)
    model = train(model, train_data or data, data, tokenizer, training)
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]

    return model, {entry["step"]: entry["loss"] for entry in entries if "loss" in entry}


def assert_same_weights(a, b):
    for (name, x), (_, y) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        assert torch.equal(x, y), name


STACK = [
    {"coupling": "mixture_rosenblatt", "direction": "left_to_right", "num_hidden_layers": 1},
    {
        "coupling": "mixture_cdf",
        "direction": "right_to_left",
        "num_hidden_layers": 1,
        "num_components": 2,
    },
    {"coupling": "affine", "direction": "left_to_right", "num_hidden_layers": 1},
]


def entries(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def subprocess_environment() -> dict[str, str]:
    """Variables for a process that imports these helpers."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    return environment


def run_that_may_be_killed(folder: Path, steps: int = 20) -> None:
    options = {
        "mode": "progressive",
        "stage_steps": [steps] * 2,
        "save_every": 1,
        "eval_sequences": 2,
    }
    tokenizer = character_tokenizer()
    resume = any(folder.glob("checkpoint-*"))
    run(
        folder,
        PackedTokens([TEXT], tokenizer, 16),
        tokenizer,
        keep_checkpoints=1,
        resume=resume,
        **options,
    )
