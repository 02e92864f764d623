"""Damaged and hostile checkpoints: a clear error, and nothing of them is executed."""

import json
import os
import pickle

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from helpers.models import STACKS, make
from tarflow_hf import TarFlowLMModel


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    make(STACKS["mix-d"]).float().save_pretrained(path)
    return path


def set_fields(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]

    return value


CONFIGS = {
    "another architecture": (
        '{"model_type": "bert", "vocab_size": 5}',
        "a 'bert', not of a tarflow",
    ),
    "a list": ("[1, 2]", "an object of fields, not"),
    "nothing": ("", "not a valid JSON file"),
    "half of it": ('{"model_type": "tarflowlm", "flo', "not a valid JSON file"),
    "nested lists": ("[" * 100_000, "nested too deeply"),
    "nested objects": ('{"flows":' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_damaged_configuration(folder, name):
    content, message = CONFIGS[name]
    (folder / "config.json").write_text(content)
    with pytest.raises((ValueError, OSError), match=message):
        TarFlowLMModel.from_pretrained(folder)


FIELDS = {
    "flows": (nested(100), r"flows\[0\] must be a dict"),
    "block_config": ({"model_type": "nonsense"}, "model_type of an architecture"),
    "vocab_size": ("5; import os", "vocab_size must be an integer"),
    "latent_size": (1e300, "latent_size must be an integer"),
    "patch_size": (-1, "patch_size must be an integer"),
}


@pytest.mark.parametrize("load", [TarFlowLMModel, AutoModelForCausalLM])
@pytest.mark.parametrize("field", FIELDS)
def test_a_damaged_field(folder, field, load):
    value, message = FIELDS[field]
    set_fields(folder, **{field: value})
    with pytest.raises(ValueError, match=message):
        load.from_pretrained(folder)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
@pytest.mark.parametrize("load", [TarFlowLMModel, AutoModelForCausalLM])
def test_truncated_weights(folder, share, load):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises((SafetensorError, OSError)):
        load.from_pretrained(folder)


@pytest.mark.parametrize("length", [10**9, 2**63])
def test_a_header_that_lies_about_its_length(folder, length):
    (folder / "model.safetensors").write_bytes(length.to_bytes(8, "little") + b"{" * 100)
    with pytest.raises((SafetensorError, OSError)):
        TarFlowLMModel.from_pretrained(folder)


def test_weights_of_another_shape_are_named_and_not_all_of_many(folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["flow.codebook.mean"] = torch.zeros(3, 7)
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"mismatched_keys .*flow\.codebook\.mean.*\(?3, 7"):
        TarFlowLMModel.from_pretrained(folder)

    save_file({"other": torch.zeros(3)}, path, {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"missing_keys .* and \d+ more; unexpected_keys \['other'\]"
    ):
        TarFlowLMModel.from_pretrained(folder)


class Hostile:
    """A pickle that makes a folder when it is read."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("write", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))])
@pytest.mark.parametrize("load", [TarFlowLMModel, AutoModelForCausalLM])
def test_a_pickle_is_not_executed(folder, tmp_path, write, load):
    (folder / "model.safetensors").unlink()
    write({"flow.codebook.mean": Hostile(tmp_path / "made")}, folder / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"weights_only|[Uu]npickl|safetensors|torch.load"):
        load.from_pretrained(folder)

    assert not (tmp_path / "made").exists()


def test_code_that_a_configuration_names_is_not_executed(folder, tmp_path):
    """Neither that of the checkpoint nor that of its decoder, unless the caller trusts it."""
    code = f"import os\nos.mkdir({str(tmp_path / 'made')!r})\n"
    (folder / "hostile.py").write_text(code)
    names = {"AutoConfig": "hostile.Config", "AutoModel": "hostile.Model"}
    config = json.loads((folder / "config.json").read_text())
    set_fields(folder, auto_map=names, block_config=config["block_config"] | {"auto_map": names})
    for load in (TarFlowLMModel, AutoModelForCausalLM):
        load.from_pretrained(folder)

    assert not (tmp_path / "made").exists()
