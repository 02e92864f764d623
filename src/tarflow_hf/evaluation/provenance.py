"""The origin of a result: the command, the versions, checksums of the weights and the data."""

import hashlib
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from .. import __version__


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """The origin of a result, with which its JSON begins.

    Results add their own fields, so that the whole is one flat object.

    Attributes:
        command: As it was typed, from the repository's root.
        date: The end of the run, in UTC, to the second: "2026-01-31T12:00:00+00:00".
        versions: Those of python, tarflow_hf, torch and transformers.
        device: "cpu", or a GPU's name.
        checkpoint: The folder, or the repository of the Hub.
        revision: The commit, for a repository of the Hub; None for a folder.
        weights_sha256: See `weights_checksum`.
        model_type: "tarflowlm", or the architecture of a discrete model.
        num_parameters: The number of the model's parameters.
        data: The name of the text file, or of the corpus whose test split it is.
        data_sha256: The checksum of the file's bytes; or of the split's documents in UTF-8, with a
            null byte between two.
    """

    command: str
    date: str
    versions: dict[str, str]
    device: str
    checkpoint: str
    revision: str | None
    weights_sha256: str
    model_type: str
    num_parameters: int
    data: str | None
    data_sha256: str | None

    def to_json(self) -> str:
        """One object, its keys the fields' names in their order. NaN and infinity are null."""
        return json.dumps(without_nan(asdict(self)), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str):
        """Back from `to_json`.

        Raises:
            ValueError: Fields are missing, or there are others.
        """
        values = json.loads(text)
        names = [field.name for field in fields(cls)]
        if set(values) != set(names):
            differing = sorted(set(values) ^ set(names))
            raise ValueError(
                f"This is no {cls.__name__}: its fields differ from those expected in {differing}."
            )

        return cls(**values)


def provenance_of(
    model: PreTrainedModel,
    checkpoint: str,
    data: str | os.PathLike | None,
    documents: Iterable[str] = (),
    command: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The fields of `Provenance`.

    Args:
        model: As loaded from the checkpoint.
        data: A file, or a name that `data.held_out_documents` takes, or None.
        documents: The documents that it returned for that name; not needed for a file.
        command: Its words; those that this process was started with by default.
    """
    words = ["python", *sys.argv] if command is None else command
    device = model.device
    name = data
    checksum = None

    if data is not None and Path(data).is_file():
        name, checksum = Path(data).name, hashlib.sha256(Path(data).read_bytes()).hexdigest()
    elif data is not None:
        checksum = hashlib.sha256("\0".join(documents).encode()).hexdigest()

    return {
        "command": shlex.join(words),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(),
            "tarflow_hf": __version__,
            "torch": torch.__version__,
            "transformers": version("transformers"),
        },
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "checkpoint": checkpoint,
        "revision": getattr(model.config, "_commit_hash", None),
        "weights_sha256": weights_checksum(model),
        "model_type": model.config.model_type,
        "num_parameters": model.num_parameters(),
        "data": name,
        "data_sha256": checksum,
    }


def weights_checksum(model: PreTrainedModel) -> str:
    """SHA-256 over the names, types, shapes and bytes of all weights, in the order of their names.

    It does not depend on how a checkpoint is cut into files.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(
        ...     vocab_size=10, hidden_size=8, num_attention_heads=2, intermediate_size=16, num_hidden_layers=1))
        >>> before = weights_checksum(model)
        >>> torch.nn.init.zeros_(model.model.norm.weight) is not None and before != weights_checksum(model)
        True
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )

    return digest.hexdigest()


def without_nan(value: Any) -> Any:
    """The same with None for numbers that JSON has not.

    Example:
        >>> without_nan({"a": float("nan"), "b": [1.0, float("inf")]})
        {'a': None, 'b': [1.0, None]}
    """
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return None

    return value
