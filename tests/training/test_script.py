"""The training script and its recipes, end to end."""

import json
import os
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from helpers import ROOT
from helpers.scripts import script
from helpers.training import STACK, TEXT, config, run
from tarflow_hf import TarFlowLMConfig, TarFlowLMModel
from tarflow_hf.data import character_tokenizer, word_tokenizer
from tarflow_hf.training import make_stages, slow_vocabulary


def arguments_of(*arguments: str, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    return runpy.run_path(str(ROOT / "examples" / "train.py"))["parse_arguments"]()


RECIPES = {path.stem: path.read_text() for path in (ROOT / "examples" / "recipes").iterdir()}


@pytest.mark.parametrize(
    "recipe", sorted(name for name, text in RECIPES.items() if '"conversion"' not in text)
)
def test_recipes(tmp_path, data, tokenizer, monkeypatch, recipe):
    """Each recipe is read by its name, and runs two steps in each stage at reduced size."""
    run_options, training, fields = arguments_of("--recipe", recipe, monkeypatch=monkeypatch)
    fields |= {
        "vocab_size": 27,
        "max_position_embeddings": 16,
        "hidden_size": 8,
        "num_attention_heads": 2,
    }
    fields["flows"] = [{**flow, "num_hidden_layers": 1} for flow in fields["flows"]]
    for flow in fields["flows"]:
        flow |= {name: 2 for name in ("num_components", "head_hidden_size") if name in flow}

    reduced = TarFlowLMConfig(**fields)
    baseline = run_options.model == "ar"
    num_stages = len(make_stages(TarFlowLMModel(reduced), training))
    assert training.stage_steps is None or len(training.stage_steps) == num_stages
    options = {"mode": training.mode, "num_steps": 2 * num_stages, "eval_sequences": 2}
    _, losses = run(tmp_path, data, tokenizer, reduced, baseline=baseline, **options)
    assert len(losses) == 2 * num_stages and all(1 < loss < 20 for loss in losses.values())
    assert run_options.dataset == {
        "demo": "python-docs",
        "python": "python-docs",
        "text8": "afmck/text8",
        "ptb": "ptb:ptb",
        "wikitext2": "wikitext2:wikitext2",
        "doyle": "doyle",
    }.get(recipe.split("_")[0], "Skylion007/openwebtext")


def test_a_tokenizer_of_ones_own_leads_to_a_single_flow(monkeypatch):
    """A latent size of log2 of the vocabulary comes with it. A file of --config is taken as it is."""
    get = partial(arguments_of, monkeypatch=monkeypatch)
    assert get("--tokenizer", "text8")[0].recipe == get()[0].recipe == "demo"
    run_options, _, fields = get("--tokenizer", "folder")
    assert run_options.recipe == "demo_one_flow" and len(fields["flows"]) == 1
    assert get("--tokenizer", "folder", "--recipe", "demo_mix1")[0].recipe == "demo_mix1"

    build = runpy.run_path(str(ROOT / "examples" / "train.py"))["build"]
    words = " ".join(f"w{index}" for index in range(1000))
    small = {**fields, "hidden_size": 8, "num_attention_heads": 1}
    for text, latent_size in (("a", 2), (words, 10)):  # and the end of a line, and unknown words
        assert build(run_options, small, word_tokenizer([text]))[0].latent_size == latent_size

    run_options.config = "mine.json"
    assert build(run_options, small, word_tokenizer(["a"]))[0].latent_size == 16


def test_the_command_line_wins_over_the_recipe(tmp_path, monkeypatch):
    get = partial(arguments_of, monkeypatch=monkeypatch)
    run_options, training, fields = get(
        "--recipe", "text8_mixd", "--stage_steps", "3", "2", "1", "--dataset", "x.txt"
    )
    assert (
        training.mode == "progressive"
        and training.stage_steps == [3, 2, 1]
        and run_options.dataset == "x.txt"
    )
    assert [flow["num_hidden_layers"] for flow in fields["flows"]] == [2, 2, 8] and fields[
        "latent_size"
    ] == 5
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"config": {"latent_size": 3}, "options": {"num_steps": 7}}))
    _, training, fields = get("--recipe", str(path))
    assert training.num_steps == 7 and fields == {"latent_size": 3}
    saved = tmp_path / "config.json"
    config().save_pretrained(tmp_path)
    _, training, fields = get("--recipe", str(path), "--config", str(saved))
    assert training.num_steps == 7 and fields["hidden_size"] == 16
    TarFlowLMConfig(**fields)


@pytest.mark.parametrize(
    "content, arguments, message",
    [
        (None, ["--recipe", "text8_mixed"], "no recipe 'text8_mixed': did you mean text8_mixd"),
        (
            None,
            ["--recipe", "zebra"],
            "no recipe 'zebra': there are convert_then_infill, .*, text8_deep",
        ),
        (None, ["--recipe", "zebra.json"], "no recipe 'zebra.json'"),
        ({"opts": {}}, [], "no key in the recipe .*'opts': did you mean options"),
        (
            {"options": {"num_step": 1}},
            [],
            "no option of train.py, .*'num_step': did you mean num_steps",
        ),
        (
            {"config": {"hiden_size": 1}},
            [],
            "no field of TarFlowLMConfig 'hiden_size': did you mean hidden_size",
        ),
        ({}, ["--learning_rat3", "1"], "no option '--learning_rat3': did you mean --learning_rate"),
        ({}, ["astray"], "no option before 'astray'"),
    ],
)
def test_names_that_do_not_exist(tmp_path, monkeypatch, content, arguments, message):
    if content is not None:
        path = tmp_path / "mine.json"
        path.write_text(json.dumps(content))
        arguments = ["--recipe", str(path), *arguments]

    with pytest.raises(ValueError, match=message):
        arguments_of(*arguments, monkeypatch=monkeypatch)


def test_a_tokenizer_with_more_tokens_than_the_vocabulary(tmp_path, data, tokenizer, monkeypatch):
    """The script says so before it reads the corpus, `train` before its first step."""
    small = config(vocab_size=26, flows=STACK[2:])
    small.save_pretrained(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["train.py", "--config", str(tmp_path / "config.json"), "--dataset", "none"]
    )
    with pytest.raises(
        ValueError, match=r"more than the model's vocab_size, 26.*Leave vocab_size out"
    ):
        runpy.run_path(str(ROOT / "examples" / "train.py"), run_name="__main__")

    for baseline in (False, True):
        with pytest.raises(
            ValueError, match="tokenizer has 27 tokens, more than the model's vocab_size, 26"
        ):
            run(tmp_path / "run", data, tokenizer, small, baseline=baseline)

    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "path", sorted((ROOT / "examples" / "accelerate").iterdir()), ids=lambda path: path.stem
)
def test_accelerate_reads_its_configs(path):
    from accelerate.commands.config import load_config_from_file

    loaded = load_config_from_file(str(path))
    assert loaded.mixed_precision == "bf16" and loaded.num_processes == 8 * loaded.num_machines


def test_the_scripts_end_to_end(tmp_path, capsys, monkeypatch):
    """Trains a flow and its baseline on a text file, samples, and scores text."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT * 3)
    Path("config.json").write_text(json.dumps(replace_sizes(config().to_diff_dict())))
    options = [
        "--dataset",
        "text.txt",
        "--config",
        "config.json",
        "--num_steps",
        "6",
        "--batch_size",
        "4",
    ]
    options += ["--test_sequences", "8", "--test_samples", "2"]
    run = partial(script, capsys=capsys, monkeypatch=monkeypatch)

    # In a process of its own: as the command line has it, and as if `datasets` were not installed.
    Path("datasets.py").write_text("raise ImportError('not installed')")
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--num_processes=1",
        str(ROOT / "examples/train.py"),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT / "src")])}
    done = subprocess.run(
        [*command, *options, "--output_dir", "flow"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (
        "A sample:" in done.stdout
        and "bound, 2 samples" in done.stdout
        and "Saved to flow/model" in done.stdout
    )
    assert "exact" in run("train.py", *options, "--output_dir", "ar", "--model", "ar")

    sample = ["generate.py", "flow/model", "--num_samples", "2", "--show_states", "--seed", "3"]
    first = run(*sample)
    assert first == run(*sample) and first.count("[before flow 1]") == 2
    assert run("generate.py", "flow/model", "--prompt", "the fox").startswith("the fox")

    cut = run(
        "evaluate.py", "flow/model", "--data", "text.txt", "--num_samples", "1", "--num_flows", "1"
    )
    scored = run("evaluate.py", "flow/model", "--data", "text.txt", "--num_samples", "3")
    assert "per word" in scored and "Sequences do not overlap" in scored
    assert cut.splitlines()[1] != scored.splitlines()[1]
    num_tokens = len(character_tokenizer()(TEXT * 3).input_ids)
    assert (
        f"{num_tokens:,} tokens" in scored
        and "bound, 1 sample" in scored
        and "bound, 3 samples" in scored
    )
    assert f"{num_tokens:,} tokens" in run("evaluate.py", "ar/model", "--data", "text.txt")


def replace_sizes(fields: dict) -> dict:
    names = (
        "latent_size",
        "max_position_embeddings",
        "hidden_size",
        "num_attention_heads",
        "flows",
    )

    return {name: fields[name] for name in names}


@pytest.mark.parametrize(
    "content, message", [("{", "can't be read as JSON: Expecting"), ("[1]", "an object.* not list")]
)
@pytest.mark.parametrize("option", ["--recipe", "--config"])
def test_a_file_that_holds_no_json_is_named(tmp_path, monkeypatch, option, content, message):
    path = tmp_path / "mine.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"mine\.json .*{message}"):
        arguments_of(option, str(path), monkeypatch=monkeypatch)


def test_a_run_is_refused_before_its_data_are_read(tmp_path, monkeypatch):
    (tmp_path / "checkpoint-5").mkdir()
    arguments = ["train.py", "--dataset", "none", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(FileExistsError, match=r"another run \(checkpoint-5\).*--resume, or choose"):
        runpy.run_path(str(ROOT / "examples" / "train.py"), run_name="__main__")


@pytest.mark.parametrize(
    "vocab_size, num_flows, is_slow", [(2000, 2, True), (2000, 1, False), (27, 2, False)]
)
def test_a_stack_that_will_be_slow_is_said(vocab_size, num_flows, is_slow):
    note = slow_vocabulary(config(vocab_size=vocab_size, flows=STACK[:num_flows]))
    assert (note is not None) == is_slow
    assert not is_slow or ("2,000 tokens" in note and "--recipe demo_one_flow" in note)


@pytest.mark.parametrize(
    "variables, is_shared",
    [
        ({}, False),
        ({"OMP_NUM_THREADS": "1"}, False),
        ({"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no"}, True),
        ({"OMP_NUM_THREADS": "3", "LOCAL_WORLD_SIZE": "1"}, False),
    ],
)
@pytest.mark.parametrize("was_told", [False, True])
def test_cores_are_shared_only_where_a_launcher_took_one(
    monkeypatch, one_thread, variables, is_shared, was_told
):
    from tarflow_hf.training import config as module

    for name in ("OMP_NUM_THREADS", "ACCELERATE_MIXED_PRECISION", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    seen = []
    monkeypatch.setattr(module, "_launcher_was_told", lambda: was_told)
    monkeypatch.setattr(module.torch, "set_num_threads", seen.append)
    module.share_cores()
    assert bool(seen) == (is_shared and not was_told)
