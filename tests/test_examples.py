"""The short examples, run as from the command line on a small model."""

import json
import os
import re
import runpy
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from huggingface_hub import ModelCard
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Trainer
from transformers.trainer_jit_checkpoint import CheckpointManager

from helpers import ROOT
from helpers.checkpoints import MIX_1, MIX_D, make
from helpers.local_hub import LocalHub
from tarflow_hf import TarFlowLMModel
from tarflow_hf.data import character_tokenizer
from tarflow_hf.noise import check_same_space
from tarflow_hf.training import save_model

pytestmark = pytest.mark.usefixtures("one_clean_room")

TEXT = (
    "the quick brown fox jumps over the lazy dog and then it sleeps in the sun until the evening comes\n"
    * 12
)

FLOWS = [MIX_D, MIX_1]

OPTIONS = {"model": {}, "patches": {"patch_size": 2}, "conditional": {"conditional": True}}


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """Runs a script in a folder with a checkpoint `model`, `patches`, `conditional` and a text."""
    monkeypatch.chdir(tmp_path)
    for name, options in OPTIONS.items():
        save_model(make(flows=FLOWS, **options), character_tokenizer(), tmp_path / name)

    Path("text.txt").write_text(TEXT)
    monkeypatch.setattr(
        "tarflow_hf.training.share_cores", lambda: None
    )  # which would last beyond these tests

    def run(script: str, *arguments: str) -> str:
        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        capsys.readouterr()
        runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_drafts_are_shown_in_a_terminal(run):
    pytest.importorskip("transformers", minversion="5.23")  # has a streamer for them
    options = ["model", "--prompt", "the fox ", "--max_new_tokens", "4", "--seed", "1"]
    printed = run("generate.py", *options, "--show_drafts", "--sleep_time", "0")
    assert printed.count("\033[33m") == 2  # the outputs of two flows, in yellow
    text = re.sub(r"\0337.*?\0338\033\[J", "", printed, flags=re.DOTALL)
    assert text.strip() == run("generate.py", *options).strip()
    with pytest.raises(SystemExit):
        run("generate.py", *options, "--show_drafts", "--num_samples", "2")


def cells_of(line):
    """The mark, the number, and both tokens with their bits, of a line in two columns."""
    found = re.fullmatch(r"(>| ) +(\d+) +('.*?'|\".*?\") +(\S+) +('.*?'|\".*?\") +(\S+)", line)
    return None if found is None else found.groups()


@pytest.fixture
def mild(run):
    """Checkpoints in the place of those of `run`, as training leaves them.

    Their tokens lie apart, and the flow above, which begins as the identity, changes little.
    """
    for name, options in OPTIONS.items():
        model = make(flows=FLOWS, latent_size=6, **options)
        with torch.no_grad():
            model.codebook.log_scale.fill_(-3.0)
            for parameter in model.flow.layers[1].head.parameters():
                parameter.mul_(0.1)

        model.save_pretrained(name)


@pytest.mark.usefixtures("mild")
@pytest.mark.parametrize("name", ["model", "patches", "conditional"])
def test_counterfactuals_begin_with_what_is_the_same(run, name):
    text, prompt = "the quick brown ", "the slow"
    printed = run("counterfactual.py", name, text, "--prompt", prompt, "--no_color")
    rows = [cells for line in printed.splitlines() if (cells := cells_of(line))]
    one, other = ("".join(eval(row[place]) for row in rows) for place in (2, 4))
    assert one == text and other.startswith(prompt) and len(rows) == 16
    assert [row[1] for row in rows if row[0] == ">"] == ["4"]
    total = float(printed.split(" bits: " + text)[0].split()[-1])
    assert sum(float(row[3]) for row in rows) == pytest.approx(total, abs=0.2)

    # Under no other condition the text comes back.
    same = run("counterfactual.py", name, text, "--prompt", "the quic", "--no_color")
    assert ">" not in {line[0] for line in same.splitlines() if cells_of(line)}
    with pytest.raises(SystemExit):
        run("counterfactual.py", name, text)


@pytest.mark.usefixtures("mild")
@pytest.mark.parametrize("name", ["model", "patches"])
def test_the_nearest_text_contains_its_word(run, name):
    text, word = "the fox ", "cat"
    options = ["--contains", word, "--num_draws", "2", "--no_color"]
    printed = run("counterfactual.py", name, text, *options)
    assert word in printed.split(" bits: ")[-1].splitlines()[0]

    script = runpy.run_path(str(ROOT / "examples" / "counterfactual.py"))
    model = TarFlowLMModel.from_pretrained(name).eval()
    tokenizer = character_tokenizer()
    tokens, ids = (torch.tensor(tokenizer(x).input_ids) for x in (text, word))
    noise = model.noise_of(tokens[None])
    near = script["nearest_noise"](model, noise, ids, num_draws=2)
    assert word in tokenizer.decode(model.generate(noise=near)[0])
    change = (near - noise).square().sum().sqrt()

    # A draw of noise for the same text is further away.
    drawn = model.noise_of(model.generate(noise=near))
    assert 0 < change < (drawn - noise).square().sum().sqrt() / 2

    # Noise that says the word already stays as it is.
    assert torch.equal(script["nearest_noise"](model, near, ids, num_draws=1), near)
    # and of what it moves, nothing is moved in vain.
    moved = (near != noise).flatten().nonzero()
    reset = near.flatten().repeat(len(moved), 1).scatter(1, moved, noise.flatten()[moved])
    texts = tokenizer.batch_decode(model.generate(noise=reset.reshape(-1, *near.shape[1:])))
    assert texts and not any(word in text for text in texts)
    with pytest.raises(ValueError, match="no room"):
        script["nearest_noise"](model, noise[:, :2], ids)


def test_compare_by_common_noise(run):
    same = run("compare.py", "model", "model", "--num_texts", "4", "--num_tokens", "8")
    assert same.startswith("4 of 4 texts of 8 tokens are the same.")
    assert "B - A +0.00000" in same and "0.00000 paired" in same

    options = ["--num_texts", "6", "--num_tokens", "16", "--data", "text.txt"]
    rounded = run("compare.py", "model", "model", "--int8_b", *options)
    together, apart = map(float, re.search(r"error (\S+) paired, (\S+) unpaired", rounded).groups())
    assert 0 < together < apart


OTHER_SPACES = {
    "vocab_size": {"vocab_size": 30},
    "latent_size": {"latent_size": 3},
    "patch_size": {"patch_size": 2},
}


@pytest.mark.parametrize("name", OTHER_SPACES)
def test_models_of_other_spaces_share_no_noise(name):
    one, other = make(flows=FLOWS), make(flows=FLOWS, **OTHER_SPACES[name])
    tokenizers = [character_tokenizer(), character_tokenizer()]
    check_same_space(one, make(flows=FLOWS), *tokenizers)
    with pytest.raises(ValueError, match=f"differ in {name}, .* cannot share noise"):
        check_same_space(one, other, *tokenizers)


@pytest.mark.parametrize("script", ["compare.py", "counterfactual.py"])
def test_models_of_other_vocabularies_share_no_noise(run, script):
    """There are as many tokens, in another order."""
    swapped = json.loads(character_tokenizer().backend_tokenizer.to_str())
    vocabulary = swapped["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    save_model(make(flows=FLOWS), character_tokenizer(), "swapped")
    Path("swapped", "tokenizer.json").write_text(json.dumps(swapped))
    arguments = ["swapped"] if script == "compare.py" else ["the fox", "--checkpoint", "swapped"]
    with pytest.raises(ValueError, match=r"differ, in 2 tokens such as \['a', 'b'\]"):
        run(script, "model", *arguments)
    with pytest.raises(ValueError, match="differ in patch_size, 1 and 2"):
        run(script, "model", *arguments[:-1], "patches")


@pytest.mark.parametrize("script", ["finetune.py", "infill.py", "push.py", "score.py"])
def test_they_are_short_and_open_with_their_launch_lines(script):
    lines = (ROOT / "examples" / script).read_text().splitlines()
    assert len(lines) < 60 and any(f"examples/{script} " in line for line in lines[2:6])


def test_score_orders_texts_whatever_shares_their_batch(run):
    texts = ["a cat", "the dog barks", "to be or not"]
    lines = run("score.py", "model", *texts, "--num_samples", "2").splitlines()
    per_token = [float(line.split("nats, ")[1].split()[0]) for line in lines]
    assert per_token == sorted(per_token) and {line.split(": ")[1] for line in lines} == set(texts)

    model, ids = (
        TarFlowLMModel.from_pretrained("model").eval(),
        character_tokenizer()("a cat").input_ids,
    )
    generator = torch.Generator().manual_seed(0)

    with torch.no_grad():
        bound = model.importance_weighted_bound(
            torch.tensor([ids]), num_samples=2, generator=generator
        )

    alone = run("score.py", "model", "a cat", "--num_samples", "2")
    assert alone == f"{-bound.item():9.3f} nats, {-bound.item() / 5:.4f} per token: a cat\n"
    assert ": the dog barks\n" in run("score.py", "patches", "the dog barks")  # half a patch, too


@pytest.mark.parametrize(
    "name, text",
    [("model", "the ___ sat"), ("conditional", "__e cat ___"), ("patches", "th__cats__")],
)
def test_infill_keeps_what_it_is_given(run, name, text):
    lines = run("infill.py", name, text, "--num_samples", "3").splitlines()
    assert len(lines) == 3 and all(len(line) == len(text) for line in lines)
    assert all(given in ("_", new) for line in lines for given, new in zip(text, line, strict=True))
    assert any("_" not in line for line in lines)


def test_finetune_lowers_the_loss_and_saves_what_loads(run):
    options = [
        "--output_dir",
        "mine",
        "--max_steps",
        "60",
        "--learning_rate",
        "1e-2",
        "--report_to",
        "none",
        "--use_cpu",
    ]
    printed = run(
        "finetune.py",
        "model",
        "text.txt",
        *options,
        "--disable_tqdm",
        "true",
        "--lr_scheduler_type",
        "constant",
    )
    before, after = printed.split("per token: ")[-1].replace(" before, ", " ").split()[:2]
    assert float(after) < float(before) - 0.1
    assert not torch.equal(
        TarFlowLMModel.from_pretrained("mine").codebook.mean,
        TarFlowLMModel.from_pretrained("model").codebook.mean,
    )
    assert run("score.py", "mine", "a cat").endswith("a cat\n")


def test_push_prints_and_publishes_the_card(run, hub: LocalHub):
    evaluation = {
        "command": "python examples/evaluate.py ...",
        "date": "2026-01-02",
        "bits_per_character": 2.5,
    }
    Path("evaluation.json").write_text(json.dumps(evaluation))
    recipe = str(ROOT / "examples" / "recipes" / "demo.json")
    arguments = [
        "push.py",
        "model",
        "tester/pushed",
        "--recipe",
        recipe,
        "--evaluation",
        "evaluation.json",
    ]
    printed = run(*arguments, "--print_card")
    assert "inside Python's standard library" in printed and "tester/pushed" not in hub.repositories
    url = run(*arguments, "--private", "--tag", "v1").splitlines()[-1]
    repository = hub.repositories["tester/pushed"]
    assert (
        repository.private and url == f"{hub.endpoint}/tester/pushed/commit/{repository.tags['v1']}"
    )
    card = hub.files("tester/pushed")["README.md"].decode()
    assert card.strip() == printed.strip()
    assert ModelCard(card).data.eval_results[0].metric_value == 2.5


TRAIN = [
    "--dataset",
    "text.txt",
    "--config",
    "config.json",
    "--num_steps",
    "2",
    "--batch_size",
    "4",
]

TRAIN += ["--test_sequences", "2", "--test_samples", "1", "--output_dir", "run"]


@pytest.fixture
def train(run):
    fields = {
        "latent_size": 2,
        "max_position_embeddings": 16,
        "hidden_size": 16,
        "num_attention_heads": 2,
    }
    Path("config.json").write_text(json.dumps({**fields, "flows": FLOWS}))

    return lambda *options: run("train.py", *TRAIN, *options)


def test_train_publishes_what_it_has_saved(train, hub: LocalHub):
    printed = train("--push_to_hub", "trained", "--private")
    assert f"{hub.endpoint}/tester/trained/commit/" in printed
    files = hub.files("tester/trained")
    assert files["model.safetensors"] == Path("run/model/model.safetensors").read_bytes()
    card = files["README.md"].decode()
    assert hub.repositories["tester/trained"].private and "--push_to_hub trained" in card
    assert (
        "| steps | 2 |" in card and "Data: `text.txt`" in card and 'repo = "tester/trained"' in card
    )


@pytest.mark.parametrize(
    "options, message",
    [
        (["--push_to_hub", "someone/trained"], "choose tester or lab"),
        (["--push_to_hub", "trained", "--model", "ar"], "push_to_hub is for a tarflowlm"),
    ],
)
def test_train_refuses_before_it_trains(train, options, message):
    with pytest.raises(ValueError, match=message):
        train(*options)
    assert not Path("run").exists()


@pytest.mark.filterwarnings("error")
def test_finetune_goes_on_where_it_stopped(run):
    """A new run in its folder is refused; `--help` explains; a half-written save is not taken."""
    options = ["--output_dir", "mine", "--save_steps", "2", "--logging_steps", "1"]
    options += ["--report_to", "none", "--use_cpu", "--disable_tqdm", "true"]
    run("finetune.py", "model", "text.txt", *options, "--max_steps", "4")
    with pytest.raises(FileExistsError, match=r"checkpoint-4.*--resume_from_checkpoint true, or"):
        run("finetune.py", "model", "text.txt", *options, "--max_steps", "6")

    Path("mine/checkpoint-5").mkdir()
    Path("mine/checkpoint-best").mkdir()
    Path("mine/checkpoint-best/trainer_state.json").write_text("{}")
    resumed = [*options, "--max_steps", "6", "--resume_from_checkpoint", "true"]
    printed = run("finetune.py", "model", "text.txt", *resumed)
    assert sum("'loss'" in line for line in printed.splitlines()) == 2
    with pytest.raises(SystemExit, match="0"):
        run("finetune.py", "--help")


def test_finetune_says_what_the_tokenizer_drops(run):
    Path("text.txt").write_text(TEXT.replace("fox", "größe"))
    options = ["--output_dir", "mine", "--max_steps", "1", "--report_to", "none", "--use_cpu"]
    printed = run("finetune.py", "model", "text.txt", *options)
    assert "characters of the training text" in printed and "'ö', 'ß'" in printed


@pytest.fixture
def sigterm_is_an_error():
    """Makes SIGTERM, where nothing takes it, a failed test instead of the end of all tests."""

    def fail(*_arguments):
        raise AssertionError("SIGTERM")

    before = signal.signal(signal.SIGTERM, fail)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("sigterm_is_an_error")
def test_finetune_is_saved_on_sigterm(run, monkeypatch):
    """Before its first save, which would be at step 500."""
    monkeypatch.setattr(CheckpointManager.__init__, "__defaults__", (0,))  # seconds it waits
    step = Trainer.training_step

    def step_with_signal(trainer, *arguments):
        if trainer.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)  # for the thread that the handler has started
        return step(trainer, *arguments)

    options = ["--output_dir", "mine", "--report_to", "none", "--use_cpu", "--disable_tqdm", "true"]
    options += ["--logging_steps", "1", "--max_steps", "5"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="Stopped, and saved"):
        patch.setattr(Trainer, "training_step", step_with_signal)
        run("finetune.py", "model", "text.txt", *options)

    (saved,) = Path("mine").glob("checkpoint-*")
    assert saved.name == "checkpoint-2" and not Path("mine/model.safetensors").exists()
    printed = run("finetune.py", "model", "text.txt", *options, "--resume_from_checkpoint", "true")
    assert sum("'loss'" in line for line in printed.splitlines()) == 3
    assert Path("mine/model.safetensors").exists()


@pytest.mark.parametrize("script", ["compare.py", "evaluate.py", "finetune.py", "train.py"])
def test_a_file_of_documents_is_read_by_its_column(run, monkeypatch, tmp_path, script):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    Path("my.jsonl").write_text(json.dumps({"body": ""}) + "\n")
    arguments = {
        "compare.py": ["model", "model", "--data", "my.jsonl"],
        "evaluate.py": ["model", "--data", "my.jsonl"],
        "finetune.py": ["model", "my.jsonl", "--output_dir", "mine", "--use_cpu"],
        "train.py": ["--dataset", "my.jsonl"],
    }[script]
    with pytest.raises(ValueError, match="no column 'text'; choose its text column among 'body'"):
        run(script, *arguments)
    with pytest.raises(ValueError, match=r"no sequence|too short"):
        run(script, *arguments, "--text_column", "body")


# --- Messages


def error_of(run, *arguments):
    """The error of a script that has no network, and stands at the end without another above it."""
    with pytest.raises(Exception) as caught:
        run(*arguments)

    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    return str(caught.value)


CHECKPOINT_FIRST = {
    "edit.py": ["a text"],
    "evaluate.py": ["--data", "text.txt"],
    "evaluate_samples.py": ["--data", "text.txt", "--no_judge"],
    "finetune.py": ["text.txt", "--output_dir", "mine", "--report_to", "none", "--use_cpu"],
    "generate.py": [],
    "infill.py": ["a ___ text"],
    "latent_evolution.py": ["--data", "text.txt"],
    "push.py": ["tester/name", "--print_card"],
    "report.py": ["--data", "text.txt"],
    "score.py": ["a text"],
    "show_passes.py": [],
}


@pytest.fixture
def offline(monkeypatch):
    """Fails where something asks the Hub, which without a network takes minutes to give up."""

    def refuse(*_arguments, **_options):
        raise AssertionError("The Hub was asked.")

    for name in ("hf_hub_download", "get_hf_file_metadata"):
        monkeypatch.setattr(f"huggingface_hub.file_download.{name}", refuse)
    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", refuse)
    monkeypatch.setattr("transformers.utils.hub.snapshot_download", refuse)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("script", CHECKPOINT_FIRST)
def test_a_checkpoint_that_is_not_there_is_said_at_once(run, script):
    rest = CHECKPOINT_FIRST[script]
    reason = error_of(run, script, "runs/modle/x", *rest)
    assert (
        reason.startswith("There is no file or folder runs/modle/x: ") and "has no runs" in reason
    )
    assert "Give the folder of a checkpoint" in reason

    Path("run/model").mkdir(parents=True)
    Path("run/model/config.json").write_text("{}")
    assert "It holds a run, whose model is run/model." in error_of(run, script, "run", *rest)
    assert "run/model has a model and no tokenizer" in error_of(run, script, "run/model", *rest)


@pytest.mark.usefixtures("offline")
def test_other_paths_that_lead_nowhere(run):
    for arguments in (
        ["train.py", "--from", "no/such/folder"],
        ["convert.py", "no/such/folder", "out"],
        ["flops.py", "--checkpoint", "no/such/folder"],
        ["train.py", "--tokenizer", "no/such/folder"],
        ["evaluate_samples.py", "model", "--data", "text.txt", "--judge", "no/such/folder"],
    ):
        assert error_of(run, *arguments).startswith("There is no file or folder no/such/folder")

    for script in ("evaluate.py", "latent_evolution.py", "report.py"):
        reason = error_of(run, script, "model", "--data", "txet.txt")
        assert "did you mean text.txt? Give a UTF-8 text file" in reason


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["infill.py", "model", "a text"], "no gap: write an underscore"),
        (
            ["train.py", "--dataset", "text.txt", "--text_column", "body"],
            "--text_column body is for",
        ),
        (
            ["train.py", "--dataset", "text.txt", "--dataset_config", "a"],
            "--dataset_config a is for",
        ),
        (["train.py", "--private"], "give --push_to_hub, too"),
        (["train.py", "--gguf_file", "x.gguf"], "give the source .--from., too"),
        (["train.py", "--lora_targets", "q_proj"], "give lora_rank, too"),
        (["edit.py", "model", "a text", "--redraw", "4:10"], "beyond the text, which has 6 tokens"),
        (["flops.py", "--recipe", "demo"], "demo can't be read as JSON: .*No such file"),
        (
            ["push.py", "model", "me/it", "--evaluation", "text.txt"],
            "text.txt can't be read as JSON",
        ),
        (["score.py", "model", "a text " * 30], "210 tokens is longer than .* Cut it"),
    ],
)
def test_wrong_arguments_are_named(run, arguments, message):
    assert re.search(message, error_of(run, *arguments))


def test_a_place_to_write_to_is_looked_at_first(run, capsys):
    Path("folder").mkdir()
    with pytest.raises(SystemExit):
        run("evaluate.py", "model", "--data", "text.txt", "--output", "folder")
    assert "folder is a folder: give the name of a file in it" in capsys.readouterr().err

    options = ["--max_sequences", "1", "--num_samples", "1", "--output", "new/place/scores.json"]
    run("evaluate.py", "model", "--data", "text.txt", *options)
    assert Path("new/place/scores.json").is_file()


def test_a_gap_leaves_the_rest_as_it_was(run):
    """Also with a tokenizer that puts a space in front of each text."""
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz"]
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained("model")
    filled = run("infill.py", "model", "func____n of").removesuffix("\n")
    assert len(filled) == 12 and filled.startswith("func") and filled.endswith("n of")


@pytest.mark.parametrize("given", ["4", "4:", "7:4", "a:b", "4:4"])
def test_a_part_that_is_none_is_refused(run, given, capsys):
    with pytest.raises(SystemExit):
        run("edit.py", "model", "a text", "--redraw", given)
    assert f"must be START:END, such as 4:12, not '{given}'" in capsys.readouterr().err


def test_an_edit_says_what_it_changed(run, capsys, monkeypatch):
    text, options = "the quick brown", ["--redraw", "4:6", "--seed", "1"]
    edited = run("edit.py", "model", text, *options).removesuffix("\n")
    num_changed = sum(a != b for a, b in zip(text, edited, strict=True))
    assert num_changed > 2  # what is read after them changes, too
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(sys, "argv", ["edit.py", "model", text, *options])
    runpy.run_path(str(ROOT / "examples" / "edit.py"), run_name="__main__")
    shown = capsys.readouterr()
    assert f"2 of 15 tokens were redrawn, {num_changed} changed.\n" in shown.err
    marked = re.findall("\x1b\\[7m(.*?)\x1b\\[27m", shown.out)
    assert sum(map(len, marked)) == num_changed
    assert re.sub("\x1b\\[2?7m", "", shown.out) == edited + "\n"
