"""Saving and loading, from folders and from a Hub, with this package and without it.

Also the pipeline, and the library's Trainer.
"""

import ast
import copy
import inspect
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.dynamic_module_utils import get_relative_imports

from helpers.checkpoints import (
    CODE,
    MIX_1,
    MIX_D,
    SAVED,
    SOURCE,
    WITHIN_PATCH,
    assert_same_output,
    assert_same_state,
    make,
    observe,
)
from helpers.local_hub import LocalHub, Repository
from helpers.models import flow
from tarflow_hf import TarFlowLMModel
from tarflow_hf.data import character_tokenizer

DTYPES = [torch.float32, torch.bfloat16]
OWN_CODEBOOK = flow("mixture_rosenblatt", tie_codebook=False, num_components=3)

QWEN3 = {
    "model_type": "qwen3",
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
}

MODELS = {
    "mix-d, mix-1": {"flows": [MIX_D, MIX_1]},
    "patches": {"flows": [MIX_D, MIX_1], "patch_size": 2},
    "own codebooks": {"flows": [OWN_CODEBOOK, {**OWN_CODEBOOK, "direction": "right_to_left"}]},
    "affine": {"flows": [flow("affine"), flow("affine", "right_to_left")]},
    "another block": {"flows": [MIX_D, MIX_1], "block_config": QWEN3},
    "top codes": {"flows": [MIX_D], "posterior_top_k": 3},
    "patch head": {
        "flows": [{**MIX_D, "patch_head_layers": 1}, flow("affine", WITHIN_PATCH)],
        "patch_size": 2,
    },
    "conditional": {"flows": [MIX_D, MIX_1], "conditional": True},
}


def continue_text(model, tokenizer=None, **options):
    """Returns the pipeline's continuations of a prompt and of an empty one."""
    write = pipeline("text-generation", model=model, tokenizer=tokenizer, **options)
    texts = []

    for prompt in ["the c", ""]:
        torch.manual_seed(0)
        texts.append(write(prompt, max_new_tokens=5, temperature=0.9)[0]["generated_text"])

    return texts


def names_in(folder):
    return {path.name for path in folder.iterdir()}


def state_in(model, dtype):
    """A model's weights as loaded in `dtype`.

    A codebook's scales are too fine for bfloat16, and stay in float32.
    """
    return {
        name: x if "codebook" in name.split(".") else x.to(dtype)
        for name, x in model.state_dict().items()
    }


# ------------------------------------------------------------------------------------ what is saved


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Each of MODELS, and the folder that it is saved in."""
    root = tmp_path_factory.mktemp("saved")
    models = {name: (make(**options), root / name) for name, options in MODELS.items()}
    for model, folder in models.values():
        model.save_pretrained(folder)
    return models


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


def test_models_differ_in_what_they_say():
    """Otherwise the comparisons below would compare nothing."""
    outputs = [observe(make(**options)) for options in MODELS.values()]
    assert all(len(each["tokens"].unique()) > 1 for each in outputs)
    bounds = torch.stack([each["elbo"][0] for each in outputs])
    assert (torch.pdist(bounds[:, None]) > 0.01).all()


def test_a_checkpoint_holds_all_of_the_code_and_nothing_of_this_machine(saved, name):
    _, folder = saved[name]
    assert names_in(folder) == SAVED
    for file, path in CODE.items():
        assert (folder / file).read_bytes() == path.read_bytes()
    assert str(folder.parent) not in (folder / "config.json").read_text()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loading_restores_every_weight(saved, name, dtype):
    model, folder = saved[name]
    loaded, info = AutoModel.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert type(loaded) is TarFlowLMModel and not loaded.training
    assert not any(info.values()), info
    assert_same_state(loaded.state_dict(), state_in(model, dtype))
    if dtype == torch.float32:
        assert_same_output(loaded, observe(model))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_saving_again_keeps_weights_and_dtypes(saved, name, dtype, tmp_path):
    _, folder = saved[name]
    loaded = AutoModel.from_pretrained(folder, dtype=dtype)
    loaded.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert_same_state(again.state_dict(), loaded.state_dict())
    assert_same_output(again, observe(loaded))


# ---------------------------------------------------------------------- checkpoints that do not fit


KEY = "flow.layers.0.start"

UNFIT = {
    "missing_keys": lambda weights: weights.pop(KEY),
    "unexpected_keys": lambda weights: weights.update({"flow.layers.2.start": torch.zeros(16)}),
    "mismatched_keys": lambda weights: weights.update({KEY: torch.zeros(8)}),
}


def save_unfit(model, kind, folder):
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    UNFIT[kind](weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("kind", UNFIT)
@pytest.mark.parametrize(
    "load", [AutoModel.from_pretrained, TarFlowLMModel.from_pretrained], ids=["auto", "class"]
)
def test_a_checkpoint_that_does_not_fit_is_an_error_that_names_the_weight(
    saved, kind, load, tmp_path
):
    save_unfit(saved["mix-d, mix-1"][0], kind, tmp_path)
    with pytest.raises((RuntimeError, ValueError), match=r"flow\.layers\.[02]\.start"):
        load(tmp_path)


@pytest.mark.parametrize("kind", UNFIT)
def test_who_asks_for_the_loading_report_gets_it_instead_of_the_error(saved, kind, tmp_path):
    save_unfit(saved["mix-d, mix-1"][0], kind, tmp_path)
    options = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    _, info = TarFlowLMModel.from_pretrained(tmp_path, **options)
    assert [name for name in info if info[name]] == [kind]


def test_misshapen_weights_can_be_made_anew_on_request(saved, tmp_path):
    model, _ = saved["mix-d, mix-1"]
    save_unfit(model, "mismatched_keys", tmp_path)
    state = TarFlowLMModel.from_pretrained(tmp_path, ignore_mismatched_sizes=True).state_dict()
    assert_same_state(state, {**model.state_dict(), KEY: state[KEY]})
    assert 0 < state[KEY].std() < 0.1  # initialised, not what memory happened to hold


def test_a_truncated_checkpoint_is_an_error(saved, tmp_path):
    saved["mix-d, mix-1"][0].save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(SafetensorError, match="file not fully covered"):
        AutoModel.from_pretrained(tmp_path)


# -------------------------------------------------------------- other processes, and a loopback Hub


@pytest.fixture(scope="module")
def hub():
    with LocalHub() as hub:
        yield hub


def run_python(script, folder, hub, python_path=None):
    """Runs a script in a fresh process, and returns its `results`."""
    functions = "".join(map(inspect.getsource, [observe, continue_text]))
    path = folder / "results.pt"
    environment = {**os.environ, **hub.environment(folder / "home")}
    environment["NUMBA_DISABLE_JIT"] = "1"  # each copy of the code would be compiled again
    environment.pop("PYTHONPATH", None)
    if python_path is not None:
        environment["PYTHONPATH"] = str(python_path)

    process = subprocess.run(
        [sys.executable, "-c", script + functions + "torch.save(main(), sys.argv[1])", str(path)],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,  # nobody answers whether code may be run
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr

    return torch.load(path)


WITH_THE_PACKAGE = """
import sys
from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator, pipeline

from tarflow_hf.data import character_tokenizer


def main():
    loaded = {}
    for folder in Path("saved").iterdir():
        for dtype in [torch.float32, torch.bfloat16]:
            model, info = AutoModel.from_pretrained(folder, dtype=dtype, output_loading_info=True)
            problems = [str(problem) for problems in info.values() for problem in problems]
            loaded[folder.name, str(dtype)] = {**observe(model), "state": model.state_dict(), "problems": problems}
    AutoModelForCausalLM.from_pretrained("saved/mix-d, mix-1").push_to_hub("tester/tarflow")
    character_tokenizer().push_to_hub("tester/tarflow")
    AutoModelForCausalLM.from_pretrained("saved/patches").push_to_hub("tester/tarflow", revision="patches")

    trained = AutoModel.from_pretrained("saved/mix-d, mix-1")
    ids = torch.arange(16)
    trainer = Trainer(
        trained,
        TrainingArguments("trainer", push_to_hub=True, hub_model_id="tester/trained", max_steps=1, use_cpu=True),
        data_collator=default_data_collator,
        train_dataset=[{"input_ids": ids, "labels": ids}] * 2,
        processing_class=character_tokenizer(),
    )
    trainer.train()
    trainer.push_to_hub()  # what is pushed on the way has no code

    model = AutoModel.from_pretrained("tester/tarflow")
    model.save_pretrained("again")
    outputs = {"output": observe(model), "trained": observe(trained.eval())}
    return {"loaded": loaded, "class": type(model).__module__, **outputs}


"""

# None in sys.modules: as if it were not installed, wherever it is.
WITHOUT_THE_PACKAGE = """
import sys

sys.modules["tarflow_hf"] = sys.modules["triton"] = None

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, pipeline


def main():
    sources = ["saved/mix-d, mix-1", "tester/tarflow"]
    results = {"refusals": {}, "classes": {}, "outputs": {}}
    for auto_class in [AutoConfig, AutoModel, AutoModelForCausalLM]:
        for source in sources:
            try:
                auto_class.from_pretrained(source)
            except ValueError as error:
                results["refusals"][auto_class.__name__, source] = str(error)

    def load(source, auto_class, **options):
        model = auto_class.from_pretrained(source, trust_remote_code=True, **options)
        results["classes"][auto_class.__name__, source] = f"{type(model).__module__}.{type(model).__name__}"
        if auto_class is not AutoConfig:
            results["outputs"][auto_class.__name__, source, options.get("revision", "main")] = observe(model)
        return model

    for source in sources:
        config = load(source, AutoConfig)
        for auto_class in [AutoModel, AutoModelForCausalLM]:
            model = load(source, auto_class)
            again = f"again/{auto_class.__name__}/{source}"
            model.save_pretrained(again)
            load(again, auto_class)
        new = AutoModel.from_config(config, trust_remote_code=True)
        new.save_pretrained(f"new/{source}")
    model.push_to_hub("tester/again")
    load("tester/again", AutoModelForCausalLM)
    load("tester/trained", AutoModel)
    load("tester/tarflow", AutoModel, revision="patches")
    for folder in Path("saved").iterdir():
        load(str(folder), AutoModel)
    results["texts"] = continue_text("tester/tarflow", trust_remote_code=True)

    def message_of(load, *arguments, **options):
        try:
            load(*arguments, trust_remote_code=True, **options)
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    results["faults"] = {
        name: message_of(AutoModelForCausalLM.from_pretrained, f"tester/{name}")
        for name in ["no-code", "other-code", "cut-short", "no-weights", "unfit", "of-the-future", "nowhere"]
    }

    def version_of(source, **options):
        model = AutoModel.from_pretrained(source, trust_remote_code=True, **options)
        return getattr(sys.modules[type(model).__module__], "VERSION", None), observe(model)

    results["versions"] = {
        "main": version_of("tester/versions"),
        "v1": version_of("tester/versions", revision="v1"),
        "main, code of v1": version_of("tester/versions", code_revision="v1"),
        "main again": version_of("tester/versions"),
    }
    return results


"""


def with_weights(files, change):
    weights = load(files["model.safetensors"])
    change(weights)
    return {**files, "model.safetensors": save(weights, metadata={"format": "pt"})}


FAULTS = {
    "no-code": lambda files: {name: files[name] for name in files if not name.endswith(".py")},
    "other-code": lambda files: {**files, "modeling_tarflowlm.py": b"class OtherModel: pass\n"},
    "cut-short": lambda files: {**files, "model.safetensors": files["model.safetensors"][:-100]},
    "no-weights": lambda files: {
        name: files[name] for name in files if name != "model.safetensors"
    },
    "unfit": lambda files: with_weights(files, lambda weights: weights.pop(KEY)),
    "of-the-future": lambda files: {
        **files,
        "config.json": files["config.json"].replace(b'"mixture_cdf"', b'"spline"'),
    },
}


@pytest.fixture(scope="module")
def with_the_package(saved, hub, tmp_path_factory):
    folder = tmp_path_factory.mktemp("with")
    (folder / "saved").symlink_to(saved["patches"][1].parent)
    return {**run_python(WITH_THE_PACKAGE, folder, hub, SOURCE), "folder": folder}


@pytest.fixture(scope="module")
def without_the_package(saved, hub, with_the_package, tmp_path_factory):
    good, other = hub.files("tester/tarflow"), hub.files("tester/tarflow", "patches")
    for name, damage in FAULTS.items():
        hub.repositories[f"tester/{name}"] = repository = Repository()
        repository.commit("main", damage(good))

    hub.repositories["tester/versions"] = repository = Repository()
    for version, files in ((1, good), (2, other)):
        code = files["modeling_tarflowlm.py"] + f"\nVERSION = {version}\n".encode()
        repository.tags[f"v{version}"] = repository.commit(
            "main", {**files, "modeling_tarflowlm.py": code}
        )

    folder = tmp_path_factory.mktemp("without")
    (folder / "saved").symlink_to(saved["patches"][1].parent)
    return {**run_python(WITHOUT_THE_PACKAGE, folder, hub), "folder": folder}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_fresh_process_restores_every_weight(saved, name, dtype, with_the_package):
    loaded = with_the_package["loaded"][name, str(dtype)]
    assert loaded["problems"] == []
    assert_same_state(loaded["state"], state_in(saved[name][0], dtype))
    if dtype == torch.float32:
        assert_same_output(loaded, observe(saved[name][0]))


@pytest.mark.parametrize("repo_id", ["tester/tarflow", "tester/again"])
def test_pushing_brings_all_files_to_the_hub(hub, saved, repo_id, without_the_package):
    files = hub.files(repo_id)
    tokenizer = (
        {"tokenizer.json", "tokenizer_config.json"} if repo_id == "tester/tarflow" else set()
    )
    assert set(files) == SAVED | tokenizer | {"README.md"}
    for file, path in CODE.items():
        assert files[file] == path.read_bytes()

    assert (
        files["model.safetensors"] == (saved["mix-d, mix-1"][1] / "model.safetensors").read_bytes()
    )


def test_remote_code_needs_trust(without_the_package):
    refusals = without_the_package["refusals"]
    assert len(refusals) == 6
    assert all("trust_remote_code=True" in message for message in refusals.values())


def test_remote_code_runs_without_the_package(saved, without_the_package):
    expected = observe(saved["mix-d, mix-1"][0])
    for auto_class in ["AutoModel", "AutoModelForCausalLM"]:
        for source in ["saved/mix-d, mix-1", "tester/tarflow"]:
            for place in [source, f"again/{auto_class}/{source}"]:
                assert_same_output(
                    without_the_package["outputs"][auto_class, place, "main"], expected
                )

    assert_same_output(
        without_the_package["outputs"]["AutoModelForCausalLM", "tester/again", "main"], expected
    )

    for (auto_class, _), found in without_the_package["classes"].items():
        assert found.startswith("transformers_modules.")
        assert found.endswith("TarFlowLMConfig" if auto_class == "AutoConfig" else "TarFlowLMModel")


def test_remote_code_runs_every_kind_of_model(saved, name, without_the_package):
    assert_same_output(
        without_the_package["outputs"]["AutoModel", f"saved/{name}", "main"],
        observe(saved[name][0]),
    )


def test_what_was_loaded_saves_its_code_again(with_the_package, without_the_package):
    folders = [with_the_package["folder"] / "again"]
    for source in ["saved/mix-d, mix-1", "tester/tarflow"]:
        for start in ["again/AutoModel", "again/AutoModelForCausalLM", "new"]:
            folders.append(without_the_package["folder"] / start / source)

    for folder in folders:
        assert names_in(folder) == SAVED
        auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
        assert set(auto_map) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
        assert not any(
            "--" in reference for reference in auto_map.values()
        )  # none that leads to another repository


def test_the_package_needs_no_remote_code(saved, with_the_package):
    assert with_the_package["class"] == "tarflow_hf.modeling.modeling_tarflowlm"
    assert_same_output(with_the_package["output"], observe(saved["mix-d, mix-1"][0]))


def test_a_revision_is_a_model_of_its_own(saved, without_the_package):
    expected = observe(saved["patches"][0])
    assert_same_output(
        without_the_package["outputs"]["AutoModel", "tester/tarflow", "patches"], expected
    )


def test_a_class_is_pinned_by_its_revision_and_two_live_in_one_process(saved, without_the_package):
    versions = without_the_package["versions"]
    for name, code, weights in [
        ("v1", 1, "mix-d, mix-1"),
        ("main", 2, "patches"),
        ("main, code of v1", 1, "patches"),
        ("main again", 2, "patches"),
    ]:
        assert versions[name][0] == code, name
        assert_same_output(versions[name][1], observe(saved[weights][0]))


def test_what_trainer_pushes_loads_without_the_package(hub, with_the_package, without_the_package):
    assert set(hub.files("tester/trained")) >= SAVED | {
        "README.md",
        "tokenizer.json",
        "training_args.bin",
    }
    assert_same_output(
        without_the_package["outputs"]["AutoModel", "tester/trained", "main"],
        with_the_package["trained"],
    )


@pytest.mark.parametrize(
    "fault, message",
    [
        (
            "no-code",
            r"OSError: tester/no-code does not appear to have a file named configuration_tarflowlm\.py",
        ),
        ("other-code", r"AttributeError: .*modeling_tarflowlm' has no attribute 'TarFlowLMModel'"),
        ("cut-short", r"SafetensorError: .*file not fully covered"),
        (
            "no-weights",
            r"OSError: tester/no-weights does not appear to have a file named .*model\.safetensors",
        ),
        (
            "unfit",
            r"ValueError: The checkpoint tester/unfit does not fit .* missing_keys \['flow\.layers\.0\.start'\]",
        ),
        (
            "of-the-future",
            r"ValueError: flows\[1\]\.coupling must be one of affine, .*, not 'spline'",
        ),
        ("nowhere", r"(?s)OSError: tester/nowhere is not a local folder.*hf auth login"),
    ],
)
def test_a_repository_that_does_not_load_says_why(without_the_package, fault, message):
    assert re.match(message, without_the_package["faults"][fault])


# ------------------------------------------------------------------------------------- the pipeline


def test_pipeline_continues_a_prompt_and_no_prompt(saved, capfd):
    model, _ = saved["mix-d, mix-1"]
    tokenizer = character_tokenizer()
    continued, new = continue_text(model, tokenizer)
    assert "not supported" not in capfd.readouterr().err
    assert continued.startswith("the c") and len(continued) == 10 and len(new) == 5

    torch.manual_seed(0)
    input_ids = torch.tensor([tokenizer("the c").input_ids])
    tokens = model.generate(input_ids, max_new_tokens=5, temperature=0.9)
    assert continued == tokenizer.decode(tokens[0])


def test_pipeline_takes_lists_and_options(saved):
    write = pipeline(
        "text-generation", model=saved["mix-d, mix-1"][0], tokenizer=character_tokenizer()
    )
    first, second = write(
        ["a cat", "dogs"], max_new_tokens=4, num_return_sequences=2, return_full_text=False
    )
    assert [len(each["generated_text"]) for each in first + second] == [4, 4, 4, 4]
    with pytest.raises(ValueError, match="num_beams"):
        write("a cat", max_new_tokens=4, num_beams=2)


@pytest.mark.parametrize("prompt", ["a cat", ""])
def test_pipeline_repeats_itself_where_nothing_is_drawn(saved, prompt):
    write = pipeline(
        "text-generation", model=saved["mix-d, mix-1"][0], tokenizer=character_tokenizer()
    )
    texts = {
        write(prompt, max_new_tokens=4, do_sample=False)[0]["generated_text"] for _ in range(4)
    }
    assert len(texts) == 1


def test_pipeline_writes_the_same_from_the_hub(saved, without_the_package):
    assert without_the_package["texts"] == continue_text(
        saved["mix-d, mix-1"][0], character_tokenizer()
    )


# -------------------------------------------------------------------------------------- the Trainer


TEXTS = [
    "a cat",
    "the dog barks",
    "to be or not",
    "mice",
    "o",
    "words",
    "one",
    "a pen",
    "blue",
    "so",
    "then",
    "when",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model before and after three steps of Trainer on padded texts.

    With them, each call of the model with its random state.
    """
    tokenizer = character_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    model = make(flows=[MIX_D, MIX_1], vocab_size=len(tokenizer))
    before, calls = copy.deepcopy(model), []
    trainer = Trainer(
        model,
        TrainingArguments(
            str(tmp_path_factory.mktemp("trainer")),
            max_steps=3,
            per_device_train_batch_size=2,
            per_device_eval_batch_size=4,
            gradient_accumulation_steps=2,
            optim="sgd",
            learning_rate=0.01,
            lr_scheduler_type="constant",
            max_grad_norm=0,
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        train_dataset=[tokenizer(text) for text in TEXTS],
        eval_dataset=[tokenizer(text) for text in TEXTS[:6]],
        processing_class=tokenizer,
    )
    record = lambda module, args, inputs: calls.append((inputs, torch.get_rng_state()))  # noqa: E731
    model.register_forward_pre_hook(record, with_kwargs=True)
    trainer.train()

    return trainer, before, model, calls


def replay(model, call):
    """Returns the model's own loss on the batch and with the noise of a recorded call.

    It is the batch's share of a step's mean over all tokens.
    """
    inputs, random_state = call
    torch.set_rng_state(random_state)
    out = model(**inputs)
    torch.testing.assert_close(out.loss, -out.elbo.sum() / inputs["num_items_in_batch"])
    return out.loss


def test_trainer_logs_the_models_loss_and_descends_it(trained):
    trainer, before, after, calls = trained
    model = copy.deepcopy(before).train()
    assert any((inputs["labels"] == -100).any() for inputs, _ in calls[:6])

    for step in range(3):
        parts = calls[2 * step : 2 * step + 2]
        num_tokens = sum(inputs["attention_mask"].sum() for inputs, _ in parts)
        assert all(inputs["num_items_in_batch"] == num_tokens for inputs, _ in parts)
        loss = sum(replay(model, part) for part in parts)
        assert trainer.state.log_history[step]["loss"] == pytest.approx(
            float(loss.detach()), rel=1e-5
        )
        gradients = torch.autograd.grad(loss, list(model.parameters()))

        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= 0.01 * gradient

    torch.testing.assert_close(model.state_dict(), after.state_dict(), rtol=1e-5, atol=1e-6)
    assert not torch.equal(after.codebook.mean, before.codebook.mean)


def test_trainer_evaluates_the_models_loss(trained):
    trainer, _, after, calls = trained
    begin = len(calls)
    metrics = trainer.evaluate()
    first, second = calls[begin:]
    assert [len(inputs["labels"]) for inputs, _ in (first, second)] == [4, 2]
    model = copy.deepcopy(after).eval()
    model._forward_pre_hooks.clear()

    with torch.no_grad():
        expected = (
            4 * replay(model, first) + 2 * replay(model, second)
        ) / 6  # Trainer weighs by sequences

    assert metrics["eval_loss"] == pytest.approx(float(expected), rel=1e-5)
    assert "test_loss" in trainer.predict(trainer.eval_dataset).metrics


def test_trainer_checkpoints_carry_code_and_weights(trained, tmp_path):
    trainer, _, after, _ = trained
    trainer.save_model(str(tmp_path))

    for folder in [tmp_path, Path(trainer.args.output_dir) / "checkpoint-3"]:
        assert names_in(folder) >= SAVED
        loaded, info = AutoModel.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values())
        assert_same_state(loaded.state_dict(), after.state_dict())


# ----------------------------------------------------------- what the code that travels may contain


LIBRARIES = {"numpy", "torch", "transformers"}

STANDARD = {
    "collections",
    "contextlib",
    "contextvars",
    "dataclasses",
    "difflib",
    "enum",
    "functools",
    "inspect",
    "itertools",
    "math",
    "typing",
}

OPTIONAL = {"numba", "triton"}

FORBIDDEN_NAMES = {
    "__builtins__",
    "__import__",
    "breakpoint",
    "compile",
    "eval",
    "exec",
    "globals",
    "input",
    "open",
}


def imports(nodes):
    """Yields (level, module) of every import within the nodes; the level counts the dots."""
    for node in ast.walk(ast.Module(list(nodes), [])):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module


def is_guarded(node):
    """Returns True for `try: ... except ImportError: ...`."""
    return isinstance(node, ast.Try) and all(
        handler.type is not None and ast.unparse(handler.type) == "ImportError"
        for handler in node.handlers
    )


@pytest.mark.parametrize("file", CODE)
def test_code_that_travels_imports_only_what_every_machine_has(file):
    body = ast.parse(CODE[file].read_text()).body
    # Only at the top of a file: the check that a Hub's code goes through overlooks no other kind of
    # optional import.
    guarded = [statement for node in body if is_guarded(node) for statement in node.body]
    others = [node for node in body if not is_guarded(node)]
    assert {
        module.split(".")[0] for level, module in imports(others) if level == 0
    } <= LIBRARIES | STANDARD
    assert {module.split(".")[0] for level, module in imports(guarded) if level == 0} <= OPTIONAL

    relative = {(level, module) for level, module in imports(body) if level > 0}
    assert {(level, f"{module}.py") for level, module in relative} <= {(1, name) for name in CODE}

    # The library finds the files to copy by searching the text: it must find what is imported, and
    # nothing else.
    assert set(get_relative_imports(CODE[file])) == {module for _, module in relative}


# The ways to files, the network and other processes that lead through what may be imported.
# (Triton's own `load` reads memory, its `jit` compiles kernels.)
FORBIDDEN_PARTS = {
    *(
        "cached_file",
        "classes",
        "cpp_extension",
        "distributed",
        "dynamic_module_utils",
        "from_file",
        "fromfile",
        "hub",
    ),
    *(
        "jit",
        "library",
        "load",
        "load_library",
        "memmap",
        "multiprocessing",
        "ops",
        "package",
        "push_to_hub",
        "save",
    ),
    *(
        "save_pretrained",
        "serialization",
        "tofile",
        "__builtins__",
        "__globals__",
        "__subclasses__",
        "currentframe",
        "f_builtins",
        "f_globals",
        "getmodule",
    ),
}


def names_reached(tree):
    """Yields the names that a file uses.

    A name stands on its own, as an attribute (dotted as far as it leads), in an import or in
    `getattr`.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            yield text if re.fullmatch(r"[\w.]+", text) else node.attr
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr"):
            yield node.args[1].value if isinstance(node.args[1], ast.Constant) else ""


def forbidden_names(tree):
    for name in names_reached(tree):
        parts = name.split(".")
        if parts[0] in FORBIDDEN_NAMES or (
            parts[0] not in ("tl", "triton") and FORBIDDEN_PARTS & set(parts)
        ):
            yield name


@pytest.mark.parametrize("file", CODE)
def test_code_that_travels_touches_neither_files_nor_the_system(file):
    assert list(forbidden_names(ast.parse(CODE[file].read_text()))) == []


@pytest.mark.parametrize(
    "line",
    [
        "open('x')",
        "torch.load('x')",
        "from torch import hub",
        "import torch.nn as nn; nn.modules.module.torch.hub.load('x')",
        "from transformers.utils.hub import cached_file",
        "getattr(torch, 'load')('x')",
        "self.save_pretrained('x')",
        "f().__globals__",
        "__import__('os')",
        "torch.utils.cpp_extension.load_inline('x', '')",
    ],
)
def test_what_does_touch_them_would_be_found(line):
    assert list(forbidden_names(ast.parse(line)))


# ---------------------------------------------------------------------------- the shipped checkpoint

SHIPPED = Path(__file__).parents[2] / "checkpoints" / "python-docs"

LOAD_SHIPPED = """
import sys

sys.modules["tarflow_hf"] = None

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
noise = torch.randn(1, 24, 8, generator=torch.Generator().manual_seed(0))
print(type(model).__module__, repr(tokenizer.decode(model.generate(noise=noise)[0])))
"""


@pytest.mark.parametrize("name", sorted(path.name for path in SHIPPED.parent.iterdir()))
def test_a_shipped_checkpoint_has_the_present_code(name):
    """Its code is links to the package's: a new file wants a new one, by `ln -s`."""
    code = {path.name: path.read_text() for path in (SHIPPED.parent / name).glob("*.py")}
    assert code == {name: path.read_text() for name, path in CODE.items()}


@pytest.mark.parametrize("is_copied", [False, True])
def test_the_shipped_checkpoint_runs_without_the_package(is_copied, tmp_path):
    folder = shutil.copytree(SHIPPED, tmp_path / "copy") if is_copied else SHIPPED
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""}
    if is_copied:
        environment["NUMBA_DISABLE_JIT"] = "1"  # compiled once is enough
    run = subprocess.run(
        [sys.executable, "-c", LOAD_SHIPPED, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr
    module, text = run.stdout.strip().splitlines()[-1].split(" ", 1)
    assert module.startswith("transformers_modules.")

    model, tokenizer = AutoModel.from_pretrained(SHIPPED), character_tokenizer()
    noise = torch.randn(1, 24, 8, generator=torch.Generator().manual_seed(0))
    assert text == repr(tokenizer.decode(model.generate(noise=noise)[0]))


def test_the_shipped_tokenizer_makes_batches():
    """Padding, collators, truncation: the library's habits, and nothing changes a row's result."""
    model = AutoModelForCausalLM.from_pretrained(SHIPPED).eval()
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    texts = ["the function returns", "a list"]
    rows = [tokenizer(text) for text in texts]
    batch = DataCollatorForLanguageModeling(tokenizer, mlm=False)(rows)
    together = model(**batch)
    for index, text in enumerate(texts):
        ids = tokenizer(text, return_tensors="pt").input_ids
        alone = model(ids, labels=ids).elbo
        torch.testing.assert_close(together.elbo[index : index + 1], alone, rtol=1e-4, atol=1e-3)

    assert together.loss.isfinite()
    assert tokenizer.model_max_length == model.config.max_position_embeddings
    long = tokenizer("word " * 100, truncation=True, return_tensors="pt")
    assert long.input_ids.shape == (1, 256) and model(**long).elbo.isfinite()

    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    written = write(texts, batch_size=2, max_new_tokens=4)
    assert [x[0]["generated_text"].startswith(text) for x, text in zip(written, texts, strict=True)]
    assert write("word " * 100, max_new_tokens=4, handle_long_generation="hole")


def test_the_checkpoint_of_books_knows_sentences():
    """It scores them below their words in another order, and continues a prompt in whole words."""
    folder = SHIPPED.parent / "doyle"
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sentence = "I have no doubt that you are right, and that he came to the house last night."
    other = "doubt house I the night came that you right, have he and to are last no that."

    def bits(text):
        ids = tokenizer(text, return_tensors="pt").input_ids
        return -model(ids, labels=ids).elbo.item() / math.log(2) / len(text)

    assert bits(sentence) < 1.6 < 2.2 < bits(other)
    prompt = tokenizer("It was late when we reached", return_tensors="pt").input_ids
    written = model.generate(prompt, max_new_tokens=24, top_k=1)
    assert tokenizer.decode(written[0]).startswith("It was late when we reached the ")


def test_an_end_token_is_learned_where_the_vocabulary_grows():
    """The habit pad = end: an end token inside a text counts, padding of the same id does not."""
    model = AutoModelForCausalLM.from_pretrained(SHIPPED).eval()
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    ids = tokenizer(["a list<|endoftext|>", "of"], padding=True, return_tensors="pt")
    with pytest.raises(ValueError, match=r"vocab_size - 1 = 26.*resize_token_embeddings"):
        model(**ids)

    model.resize_token_embeddings(len(tokenizer))
    model.config.pad_token_id = tokenizer.pad_token_id
    batch = DataCollatorForLanguageModeling(tokenizer, mlm=False)(
        [tokenizer("a list<|endoftext|>"), tokenizer("of")]
    )
    loss = model(**batch).loss
    assert loss.isfinite()
    shorter = tokenizer(["a list", "of"], padding=True, return_tensors="pt")
    rest = model(**shorter).elbo
    assert model(**ids).elbo[0] < rest[0] - 5  # the end is part of the text
    torch.testing.assert_close(model(**ids).elbo[1], rest[1], rtol=1e-4, atol=1e-3)
