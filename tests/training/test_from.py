"""Runs that begin with a causal language model: what is trained, what stays, and the script's --from."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import AutoTokenizer

from helpers import ROOT
from helpers.causal_lms import TIED, tiny_causal_lm
from helpers.scripts import script
from helpers.training import TEXT, config, entries
from tarflow_hf import TarFlowLMModel
from tarflow_hf.conversion import from_causal_lm
from tarflow_hf.data import character_tokenizer
from tarflow_hf.training import (
    TrainingConfig,
    add_lora,
    discrete_baseline,
    make_stages,
    merge_lora,
    train,
)

pytestmark = pytest.mark.usefixtures("one_thread")

LORA = {"lora_rank": 2, "lora_alpha": 4}


def converted(**options):
    return from_causal_lm(tiny_causal_lm("llama", **TIED), conditional=True, **options)


def run(folder, data, tokenizer, **options):
    """Trains a converted model for some steps."""
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.manual_seed(0)
    fixed = {"batch_size": 4, "warmup_steps": 1, "log_every": 1, "save_minutes": 0, "save_every": 2}
    training = TrainingConfig(
        **{"output_dir": str(folder), "num_steps": 4, "keep_checkpoints": 9, **fixed, **options}
    )
    return train(converted(), data, data, tokenizer, training)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory, data, tokenizer):
    """The folder of a run with LoRA, and its model."""
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("adapted")
    return folder, run(folder, data, tokenizer, **LORA)


def test_lora_trains_its_matrices_and_the_new_parts_only(adapted):
    before = converted().state_dict()
    after = load_file(adapted[0] / "checkpoint-4" / "model.safetensors")
    is_new = {name: ".lora_" in name or ".observed_embedding." in name for name in after}
    assert sum(".lora_" in name for name in after) == 2 * 2 * 7  # all linear maps of two layers

    for name, weight in after.items():
        if "lora_B" in name:
            assert weight.abs().max() > 0
        elif "lora_A" not in name:
            old = before[name.replace(".base_layer", "")]
            assert torch.equal(weight, old) != is_new[name], name


@torch.no_grad()
def test_what_lora_has_learnt_is_merged_and_saved(adapted):
    folder, model = adapted
    trained = load_file(folder / "checkpoint-4" / "model.safetensors")
    path = "flow.layers.0.decoder.layers.1.mlp.up_proj"
    a, b = (trained[f"{path}.lora_{name}.default.weight"] for name in "AB")
    merged = trained[f"{path}.base_layer.weight"] + 4.0 / 2 * b @ a
    torch.testing.assert_close(model.get_submodule(path).weight, merged)

    loaded = TarFlowLMModel.from_pretrained(folder / "model")
    assert loaded.state_dict().keys() == converted().state_dict().keys()
    ids = torch.randint(27, (2, 10), generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded(ids).elbo, model(ids).elbo)
    assert not torch.equal(loaded(ids).elbo, converted()(ids).elbo)


def test_a_run_with_lora_resumes_exactly(adapted, tmp_path, data, tokenizer):
    run(tmp_path, data, tokenizer, **LORA)
    for left in ("checkpoint-4", "model"):
        for file in (tmp_path / left).iterdir():
            file.unlink()
        (tmp_path / left).rmdir()

    resumed = run(tmp_path, data, tokenizer, **LORA, resume=True)
    for name, weight in adapted[1].state_dict().items():
        assert torch.equal(resumed.state_dict()[name], weight), name

    with pytest.raises(ValueError, match="lora_rank was 2 and is 3"):
        run(tmp_path, data, tokenizer, **{**LORA, "lora_rank": 3}, resume=True)


def test_the_average_of_a_run_with_lora_can_be_trained_on(tmp_path, data, tokenizer):
    pytest.importorskip("peft")
    model = run(tmp_path, data, tokenizer, ema_decay=0.5, **LORA)
    assert model.state_dict().keys() == converted().state_dict().keys()
    assert all(parameter.requires_grad for parameter in model.parameters())


@torch.no_grad()
def test_adapters_change_nothing_before_they_are_trained():
    pytest.importorskip("peft")
    model, other = converted(), converted()
    add_lora(model, TrainingConfig(lora_rank=3, lora_targets=["q_proj"]))
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 2
    ids = torch.randint(27, (2, 10))
    assert torch.equal(model(ids).elbo, other(ids).elbo)
    merge_lora(model)
    assert model.state_dict().keys() == other.state_dict().keys()


def test_lora_says_what_it_needs(monkeypatch, tmp_path, data, tokenizer):
    monkeypatch.setattr("tarflow_hf.training.adapters.find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r'lora_rank=2 needs PEFT: pip install "tarflow_hf\[peft\]"'
    ):
        run(tmp_path, data, tokenizer, **LORA)

    with pytest.raises(ValueError, match="lora_rank must be 0 for a discrete model"):
        add_lora(discrete_baseline(config()), TrainingConfig(**LORA))

    assert not list(tmp_path.iterdir())


def test_a_codebook_that_is_left_alone(tmp_path, data, tokenizer):
    model = run(tmp_path, data, tokenizer, num_steps=2, freeze_codebook=True)
    before = converted().state_dict()
    same = {
        name for name, weight in model.state_dict().items() if torch.equal(weight, before[name])
    }
    assert same == {"flow.codebook.mean", "flow.codebook.log_scale"}


def test_an_option_that_is_younger_than_the_run_had_its_default(tmp_path, data, tokenizer):
    run(tmp_path, data, tokenizer, num_steps=2)
    path = tmp_path / "checkpoint-2" / "run.json"
    saved = json.loads(path.read_text())
    assert saved["training"].pop("freeze_codebook") is False
    path.write_text(json.dumps(saved))
    run(tmp_path, data, tokenizer, num_steps=2, resume=True)
    with pytest.raises(ValueError, match="freeze_codebook was False and is True"):
        run(tmp_path, data, tokenizer, num_steps=2, resume=True, freeze_codebook=True)


def test_stages_may_begin_above_the_first_flow():
    model = TarFlowLMModel(config())
    training = TrainingConfig(mode="progressive_then_joint", first_flow=2, stage_steps=[3, 1])
    stages = make_stages(model, training)
    assert [(stage.name, stage.num_flows) for stage in stages] == [("flow 2", 2), ("joint", 2)]
    stages[0].choose_parameters(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "layers.1." in name}

    with pytest.raises(ValueError, match="first_flow is for the stages of a progressive mode"):
        TrainingConfig(first_flow=2)
    with pytest.raises(ValueError, match="first_flow is 3, but the stack has 2 flows"):
        make_stages(model, TrainingConfig(mode="progressive", first_flow=3))


# --------------------------------------------------------------------------------------------------
# The script
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def train_from(tmp_path, capsys, monkeypatch):
    """Runs train.py in a folder with a source, one without a tokenizer, and a text."""
    monkeypatch.chdir(tmp_path)
    source = tiny_causal_lm("llama", torch.bfloat16, **TIED)
    source.save_pretrained("source")
    source.save_pretrained("bare")
    character_tokenizer().save_pretrained("source")
    Path("text.txt").write_text(TEXT * 3)
    common = ["--dataset", "text.txt", "--batch_size", "4", "--test_sequences", "2"]
    common += ["--sequence_length", "16", "--output_dir", "run"]

    return partial(script, "train.py", *common, capsys=capsys, monkeypatch=monkeypatch)


def test_a_source_learns_to_fill_gaps_and_goes_on(train_from):
    pytest.importorskip("peft")
    printed = train_from("--from", "source", "--num_steps", "2", "--log_every", "1")
    assert "Saved to run/model" in printed and "A sample:" in printed
    model = TarFlowLMModel.from_pretrained("run/model")
    assert model.config.conditional and len(model.flow.layers) == 1
    assert model.dtype == torch.float32 and model.config.max_position_embeddings == 64
    assert (
        AutoTokenizer.from_pretrained("run/model").get_vocab() == character_tokenizer().get_vocab()
    )
    assert model.generation_config.eos_token_id == 2

    saved = json.loads(Path("run/checkpoint-2/run.json").read_text())["training"]
    assert (saved["source"], saved["lora_rank"], saved["freeze_codebook"]) == ("source", 16, True)

    with pytest.warns(UserWarning, match="num_steps was 2 and is 3"):
        train_from("--from", "source", "--num_steps", "3", "--log_every", "1", "--resume")

    assert [entry["step"] for entry in entries(Path("run")) if "loss" in entry] == [1, 2, 3]
    with pytest.raises(ValueError, match="source was 'source' and is 'run/model'"):
        train_from("--from", "run/model", "--num_steps", "3", "--resume")


def test_a_source_gets_a_flow_above_it_and_is_trained_on(train_from):
    recipe = ["--recipe", "convert_then_stack", "--stage_steps", "1", "1"]
    train_from("--from", "source", *recipe, "--log_every", "1")
    stages = [entry["stage"] for entry in entries(Path("run")) if "loss" in entry]
    assert stages == ["flow 2", "joint"]
    model = TarFlowLMModel.from_pretrained("run/model")
    assert [flow["coupling"] for flow in model.config.flows] == [
        "mixture_rosenblatt",
        "mixture_cdf",
    ]

    # A TarFlowLM is taken as it is.
    Path("again.json").write_text(json.dumps({"conditional": False}))
    options = ["--config", "again.json", "--num_steps", "1", "--lora_rank", "0"]
    train_from("--from", "run/model", *options, "--output_dir", "again")
    again = TarFlowLMModel.from_pretrained("again/model")
    assert again.config.flows == model.config.flows
    assert torch.equal(again.codebook.mean, model.codebook.mean)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--from", "source", "--recipe", "demo"], "recipe demo describes a model of its own"),
        (
            ["--recipe", "convert_then_infill"],
            "convert_then_infill converts a model: give it by --from",
        ),
        (["--from", "source", "--model", "ar"], "leave out --model ar"),
        (["--from", "bare"], "bare has no tokenizer: give one by --tokenizer"),
        (["--from", "source", "--sequence_length", "65"], "sequence_length must be at most 64"),
        (
            ["--from", "source", "--config", "other.json"],
            "no option of a conversion 'flows': there are append_flows",
        ),
        (
            ["--from", str(ROOT / "checkpoints" / "python-docs")],
            "latent_size=8, and the recipe wants 16",
        ),
    ],
)
def test_what_does_not_go_together(train_from, options, message):
    Path("other.json").write_text(json.dumps({"flows": []}))
    with pytest.raises(ValueError, match=message):
        train_from(*options)

    assert not Path("run").exists()
