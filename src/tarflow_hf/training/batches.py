"""The batches of a run, epoch after epoch, and the checks before the first of them."""

from collections.abc import Iterator
from typing import Any, TypeAlias

from accelerate import Accelerator, skip_first_batches
from accelerate.utils import DistributedType
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..baseline import longest_sequence, text_vocab_size
from ..data import (
    PackedTokens,
    SentenceTokens,
    StreamingPackedTokens,
    check_vocabulary,
    vocabulary_size,
)
from .config import TrainingConfig

HeldOutData: TypeAlias = PackedTokens | SentenceTokens
TrainingData: TypeAlias = HeldOutData | StreamingPackedTokens


def check_batches(
    train_data: TrainingData, config: TrainingConfig, accelerator: Accelerator
) -> None:
    """Checks before the first step that batches can be made, and sharded weights trained so.

    Torch's FSDP2 can freeze sharded weights. But Accelerate shards a model once, together with its
    optimiser, and each stage has another optimiser. It can't be tested without GPUs either: on a
    CPU Accelerate takes DDP in FSDP's place.

    Raises:
        ValueError: If a batch can't be split evenly, if there are fewer sequences than a batch, or
            if sharded weights would be averaged, frozen or kept aside.
    """
    parts = config.gradient_accumulation_steps
    if config.batch_size % (parts * accelerator.num_processes):
        raise ValueError(
            f"batch_size {config.batch_size} can't be split into {parts} "
            f"gradient_accumulation_steps on {accelerator.num_processes} processes: it must be a multiple of "
            f"{parts * accelerator.num_processes}."
        )

    if isinstance(train_data, IterableDataset):
        if not train_data.has_blocks(config.batch_size):
            raise ValueError(
                "The stream ends with fewer sequences to train on than "
                f"batch_size {config.batch_size}. Give more text, or a smaller batch_size."
            )
    elif len(train_data) < config.batch_size:
        raise ValueError(
            f"There are {len(train_data)} sequences to train on, fewer than "
            f"batch_size {config.batch_size}. Give more text, or a smaller batch_size."
        )

    if accelerator.distributed_type == DistributedType.FSDP and config.optimizer == "muon":
        raise ValueError(
            "With FSDP, optimizer must be adamw, not muon, which needs whole matrices. Use DDP."
        )

    is_plain = not config.ema_decay and config.mode == "joint" and not config.patience
    if accelerator.distributed_type == DistributedType.FSDP and not is_plain:
        raise ValueError(
            "With FSDP, ema_decay must be 0, mode joint and patience 0, not "
            f"{config.ema_decay}, {config.mode} and {config.patience}: sharded weights can't be "
            "averaged, frozen later on, or kept aside. Use DDP."
        )


def check_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Checks that the model knows all tokens of the tokenizer.

    Raises:
        ValueError: If it does not.
    """
    advice = f"Give the model a vocab_size of {vocabulary_size(tokenizer)}."
    check_vocabulary(tokenizer, text_vocab_size(model), advice)


def check_sentences(model: PreTrainedModel, train_data: TrainingData) -> None:
    """Checks that the model can learn from padded sentences.

    Raises:
        ValueError: If it is conditional: spans to observe are drawn for sequences of one length. Or
            if the longest sentence, filled up to whole patches, is too long for it.
    """
    if not isinstance(train_data, SentenceTokens):
        return

    if getattr(model.config, "conditional", False):
        raise ValueError("A conditional model is trained on packed text, not on sentences.")

    longest = longest_sequence(model)
    if train_data.sequence_length > longest:
        raise ValueError(
            f"The longest sentence has {train_data.sequence_length} tokens with its end, the model takes {longest}: "
            "give it a larger max_position_embeddings."
        )


def make_loader(
    train_data: TrainingData, config: TrainingConfig, accelerator: Accelerator
) -> DataLoader:
    """The batches of an epoch; each is a part of a step, over all processes."""
    options: dict[str, Any] = {"shuffle": not isinstance(train_data, IterableDataset)}
    if isinstance(train_data, SentenceTokens):
        sampler = train_data.sampler(config.batch_size, config.seed)
        options = {"sampler": sampler, "collate_fn": train_data.collate}

    loader = DataLoader(
        train_data,
        batch_size=config.batch_size // config.gradient_accumulation_steps,
        drop_last=True,
        **options,
    )

    return accelerator.prepare(loader)


def endless(loader: DataLoader, num_used: int) -> Iterator[tuple[int, int, dict[str, Tensor]]]:
    """Yields (epoch, index in it, batch), epoch after epoch, from batch number `num_used` on.

    A data set skips the used batches without loading them. A stream does not know its length and is
    read again.
    """
    is_stream = isinstance(loader.dataset, IterableDataset)
    epoch = 0
    if not is_stream:
        epoch, num_used = divmod(num_used, len(loader))

    while True:
        loader.set_epoch(epoch)
        first = 0 if is_stream else num_used
        batches = skip_first_batches(loader, first) if first else loader

        for index, batch in enumerate(batches, first):
            if num_used and is_stream:
                num_used -= 1
            else:
                yield epoch, index, batch

        epoch += 1
        num_used = num_used if is_stream else 0
