"""Loads a checkpoint, from a folder or the Hub, and says what is wrong with one that does not load.

model, tokenizer = load_checkpoint("runs/mine/model")
"""

import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from .data import lost_path

logger = logging.get_logger(__name__)

TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
)


def load_checkpoint(
    name: str | os.PathLike, device: str | torch.device = "cpu", **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads the model of a checkpoint, in evaluation mode, and its tokenizer.

    Args:
        name: A folder, or a repository of the Hub; a TarFlowLM or a discrete baseline.
        options: Those of `AutoModelForCausalLM.from_pretrained`, such as `dtype`.

    Raises:
        FileNotFoundError: If it is a folder that does not exist or lacks a file: see
            `check_checkpoint`.

    Example:
        >>> model, tokenizer = load_checkpoint("checkpoints/python-docs")
        >>> model.config.vocab_size
        27
    """
    check_checkpoint(name)
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, **options).to(device).eval()
    return model, tokenizer


def check_checkpoint(name: str | os.PathLike, needs_tokenizer: bool = True) -> None:
    """Checks a folder with a checkpoint before anything is loaded.

    A name that may be one of the Hub is left to it. If no such folder is here, that is said, because
    without a network it takes the Hub's client minutes to give up.

    Raises:
        FileNotFoundError: If the name is a path and nothing is there, or if the folder has no
            configuration or no tokenizer. The message says what it has.
        NotADirectoryError: If it is a file.
    """
    folder = Path(name)
    if folder.is_file():
        raise NotADirectoryError(
            f"{name} is a file. Give the folder that it is in, which has config.json, too."
        )

    advice = (
        "Give the folder of a checkpoint, such as the `model` of a run of examples/train.py, or a repository of the "
        "Hub, USER/NAME."
    )
    if reason := lost_path(str(name), advice):
        raise FileNotFoundError(reason)

    if not folder.is_dir():
        if try_to_load_from_cache(str(name), "config.json") is None:
            logger.warning_once(
                f"There is no folder {name}: it is taken for a repository of the Hub."
            )
        return

    if not any((folder / each).is_file() for each in ("config.json", "adapter_config.json")):
        raise FileNotFoundError(f"{name} is no checkpoint: it has no config.json.{_within(folder)}")

    if needs_tokenizer and not any((folder / each).is_file() for each in TOKENIZER_FILES):
        raise FileNotFoundError(
            f"{name} has a model and no tokenizer: save its own there by tokenizer.save_pretrained({str(name)!r})."
        )


def _within(folder: Path) -> str:
    """A sentence on what of a run lies in a folder that is no checkpoint."""
    if (folder / "model" / "config.json").is_file():
        return f" It holds a run, whose model is {folder / 'model'}."
    if kept := sorted(
        folder.glob("checkpoint-*/config.json"), key=lambda path: path.stat().st_mtime
    ):
        return f" It holds a run that has not ended. Its newest checkpoint is {kept[-1].parent}."

    return " Give the folder that save_pretrained has written."


def check_trainable(model: PreTrainedModel, checkpoint: str) -> None:
    """Checks that a loaded model has something to train.

    Raises:
        ValueError: If it has not: an adapter that PEFT has loaded is frozen, with its model.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"{checkpoint} is an adapter of a frozen model: merge it into the model first, or load it by PEFT with "
            "is_trainable=True."
        )
