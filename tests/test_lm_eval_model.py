"""The evaluation harness and the `evaluate` library, offline.

Bounds against enumeration, and tasks from local files.
"""

import json
import math
import runpy
import sys
import warnings
from functools import partialmethod

import datasets
import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from helpers import ROOT
from helpers.enumeration import enumerate_likelihoods
from helpers.models import STACKS, make
from tarflow_hf.data import character_tokenizer
from tarflow_hf.evaluation import cut_text, judge_texts, likelihood, load_judge
from tarflow_hf.training import discrete_baseline, save_model

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import model_registry  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from tarflow_hf.lm_eval_model import BOUND, DIFFERENCE, TarFlowLMEvaluator  # noqa: E402


def letters(number: int) -> PreTrainedTokenizerFast:
    """A tokenizer of the first letters."""
    backend = Tokenizer(
        models.BPE(
            vocab={letter: index for index, letter in enumerate("abcdefgh"[:number])}, merges=[]
        )
    )
    backend.decoder = decoders.Fuse()

    return PreTrainedTokenizerFast(tokenizer_object=backend)


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, args, index) for index, args in enumerate(arguments)]


def evaluator(model, tokenizer=None, **options) -> TarFlowLMEvaluator:
    options = {"device": "cpu", "batch_size": 4, "check_greedy": False, **options}
    return TarFlowLMEvaluator(
        model, letters(model.config.vocab_size) if tokenizer is None else tokenizer, **options
    )


# ------------------------------------------------------------------------------------------- bounds


@pytest.mark.parametrize("is_conditional", [False, True])
def test_scores_against_enumeration(is_conditional):
    """Scores of all texts of two letters.

    log p(x) is reached from below. log p(x2 | x1) is reached from below if the model is
    conditional, and only nearly otherwise.
    """
    model = make(STACKS["mix-d"], vocab_size=3, latent_size=1, conditional=is_conditional)
    exact, _ = enumerate_likelihoods(model, 2, points=150)
    lm = evaluator(model, num_samples=100)

    texts = ["aa", "ab", "cb"]
    for text, bound in zip(
        texts, lm.loglikelihood_rolling(requests("r", *((t,) for t in texts)), True), strict=True
    ):
        truth = exact[tuple("abc".index(letter) for letter in text)]
        assert truth - 0.1 < bound < truth + 0.02

    answers = lm.loglikelihood(requests("l", *((text[0], text[1]) for text in texts)), True)
    for text, (score, is_greedy) in zip(texts, answers, strict=True):
        first, second = ("abc".index(letter) for letter in text)
        if is_conditional:
            truth = enumerate_likelihoods(model, 2, points=150, observed={0: first})[0][(second,)]
            assert truth - 0.1 < score < truth + 0.02
        else:
            truth = exact[first, second] - math.log(
                sum(math.exp(exact[first, other]) for other in range(3))
            )
            one = enumerate_likelihoods(model, 1, points=150)[0][(first,)]
            assert score == pytest.approx(truth, abs=0.15) and one == pytest.approx(
                exact[first, second] - truth
            )

        assert is_greedy is False

    assert lm.get_model_info()["loglikelihood"] == (BOUND if is_conditional else DIFFERENCE)


@pytest.mark.parametrize("is_conditional", [False, True])
@pytest.mark.parametrize("patch_size", [1, 2])
def test_neither_batches_nor_order_change_a_score(patch_size, is_conditional):
    model = make(STACKS["mix-d, mix-1, mix-1"], patch_size, seed=1, conditional=is_conditional)
    texts = [("abcde" * 5,), ("a",), ("ab",), ("",), ("edcba",), ("aabbccdd",)]
    pairs = [("ab", "cd"), ("ab", "e"), ("", "abc"), ("abcab", "c"), ("abcde" * 6, "abc")]
    alone = evaluator(model, num_samples=2, batch_size=1)
    together = evaluator(model, num_samples=2, batch_size=16)
    rolling = alone.loglikelihood_rolling(requests("r", *texts), True)
    assert rolling[3] == 0 and max(rolling[:3]) < 0
    assert together.loglikelihood_rolling(requests("r", *texts[::-1]), True)[::-1] == pytest.approx(
        rolling, rel=1e-6
    )
    scores = [score for score, _ in alone.loglikelihood(requests("l", *pairs), True)]
    again = [score for score, _ in together.loglikelihood(requests("l", *pairs[::-1]), True)][::-1]
    assert again == pytest.approx(scores, rel=1e-6, abs=1e-6)
    other = [
        score
        for score, _ in evaluator(model, num_samples=2, seed=1).loglikelihood(
            requests("l", *pairs), True
        )
    ]
    assert all(a != b for a, b in zip(scores, other, strict=True))


def test_a_long_text_is_the_sum_of_its_pieces():
    model = make(STACKS["mix-d"])
    lm, text = evaluator(model, num_samples=1), "abcde" * 8
    pieces = [(text[start : start + 18],) for start in range(0, 40, 18)]
    whole, *parts = lm.loglikelihood_rolling(requests("r", (text,), *pieces), True)
    assert whole == pytest.approx(sum(parts))


def test_greedy_is_what_generate_writes():
    model = make(STACKS["mix-d"], vocab_size=5)
    tokens = model.generate(torch.tensor([[0, 1]]), max_new_tokens=3, do_sample=False)[
        0, 2:
    ].tolist()
    right = "".join("abcde"[token] for token in tokens)
    wrong = right[:2] + "abcde"[(tokens[2] + 1) % 5]
    lm = evaluator(model, num_samples=1, check_greedy=True)
    greedy = [
        is_greedy
        for _, is_greedy in lm.loglikelihood(requests("l", ("ab", right), ("ab", wrong)), True)
    ]
    assert greedy == [True, False]
    options = {"until": ["zz"], "max_gen_toks": 3}
    (text,) = lm.generate_until(requests("g", ("ab", options)), True)
    assert text == right

    for stop in (right[1], [right[2], right[1:]]):
        (text,) = lm.generate_until(requests("g", ("ab", {**options, "until": stop})), True)
        assert text == right.split(right[1])[0]

    drawn = lm.generate_until(
        requests("g", *[("", {"max_gen_toks": 9, "do_sample": True, "temperature": 1.0})] * 3), True
    )
    assert {len(text) for text in drawn} == {9} and len(set(drawn)) == 3

    # A text that is too long loses its beginning, but keeps half of the 18 positions.
    (text,) = lm.generate_until(requests("g", ("abcde" * 10, {"max_gen_toks": 300})), True)
    assert len(text) == 9
    assert text == lm.generate_until(requests("g", (("abcde" * 10)[-9:], {"max_gen_toks": 9})))[0]
    (text,) = lm.generate_until(requests("g", ("abc", {"max_gen_toks": 300})), True)
    assert len(text) == 15


def test_an_answer_follows_from_seed_and_prompt():
    """Whatever stands beside it; a prompt that comes again gets an answer of its own."""
    model, options = make(STACKS["mix-d"]), {"max_gen_toks": 9, "do_sample": True}
    asked = [(prompt, options) for prompt in ("ab", "abc", "ba", "ab", "")]
    answers = evaluator(model).generate_until(requests("g", *asked), True)
    assert answers[0] != answers[3]

    for first in (1, 2, 4):
        alone = evaluator(model, batch_size=1).generate_until(requests("g", asked[first]), True)
        assert alone == [answers[first]]
    assert evaluator(model).generate_until(requests("g", *asked[::-1]), True)[0] == answers[4]
    assert evaluator(model, seed=1).generate_until(requests("g", *asked), True) != answers


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 4},
        {"max_tokens": 4},
        {"max_completion_tokens": 4},
        {"max_gen_toks": 4, "num_beams": 1, "repetition_penalty": 1.0, "use_cache": True},
        {"max_gen_toks": 4, "do_sample": True, "temperature": 0.0},
        {"max_gen_toks": 4, "do_sample": False, "temperature": 1.0, "top_p": 0.9},
        {"max_gen_toks": 4, "until": None},
    ],
    ids=str,
)
def test_options_of_tasks_that_ask_for_nothing_else(options):
    lm = evaluator(make(STACKS["mix-d"]))
    expected = lm.generate_until(requests("g", ("ab", {"max_gen_toks": 4})), True)
    assert len(expected[0]) == 4
    assert lm.generate_until(requests("g", ("ab", options)), True) == expected


def test_a_temperature_samples_and_no_tokens_are_none():
    lm = evaluator(make(STACKS["mix-d"]))
    none = {"max_gen_toks": 0}
    warm = {"max_gen_toks": 9, "temperature": 0.9}
    sampled = {**warm, "do_sample": True}
    assert lm.generate_until(requests("g", ("ab", none), ("", none)), True) == ["", ""]
    drawn = lm.generate_until(requests("g", ("ab", warm)), True)
    assert drawn == lm.generate_until(requests("g", ("ab", sampled)), True)
    assert drawn != lm.generate_until(requests("g", ("ab", {"max_gen_toks": 9})), True)
    with pytest.raises(ValueError, match="max_gen_toks must be at least 0, not -1"):
        lm.generate_until(requests("g", ("ab", {"max_gen_toks": -1})), True)


def test_a_context_that_is_cut_is_said(monkeypatch):
    """Once; one that loses less than a patch is not."""
    from tarflow_hf import lm_eval_model as module

    said = set()
    monkeypatch.setattr(module.logger, "warning_once", said.add)
    lm = evaluator(make(STACKS["mix-d"], 2, conditional=True), num_samples=1)
    lm.loglikelihood(requests("l", ("abc", "de")), True)
    assert said == set()
    lm.loglikelihood(requests("l", ("abcde" * 6, "de")), True)
    assert said == {"The model takes 18 tokens: some contexts lose their first tokens."}


def test_what_the_tokenizer_drops_is_said(caplog, monkeypatch):
    """Once; a text of which nothing is left is an error that names the document."""
    from tarflow_hf import lm_eval_model as module

    monkeypatch.setattr(module.logger, "propagate", True)
    lm = evaluator(make(STACKS["mix-d"], vocab_size=27), character_tokenizer())
    for _ in range(2):
        lm.loglikelihood_rolling(requests("r", ("größe",)), True)

    said = [record.getMessage() for record in caplog.records if "dropped" in record.getMessage()]
    assert len(said) == 1 and "'ö', 'ß'" in said[0]
    with pytest.raises(ValueError, match=r"Nothing is left of document 0's text: .*'привет'"):
        lm.generate_until([Instance("g", {}, ("привет", {}), 0, ("task", 0, 1))], True)

    with pytest.raises(ValueError, match=r"Nothing is left of document 0's answer: .*' список'"):
        lm.loglikelihood([Instance("l", {}, ("the list", " список"), 0, ("task", 0, 1))], True)


def test_bad_input(flow_folder):
    model = make(STACKS["mix-d"])
    lm = evaluator(model)
    with pytest.raises(ValueError, match=r"must have 1 to 18 tokens .* not 0"):
        lm.loglikelihood(requests("l", ("abc", "")), True)

    with pytest.raises(ValueError, match="not 20"):
        lm.loglikelihood(requests("l", ("a", "abcde" * 4)), True)

    with pytest.raises(ValueError, match=r"generate_until has no options \['beams'\]"):
        lm.generate_until(requests("g", ("a", {"beams": 3})), True)

    with pytest.raises(ValueError, match="num_samples must be at least 1"):
        evaluator(model, num_samples=0)

    with pytest.raises(ValueError, match="needs its tokenizer"):
        TarFlowLMEvaluator(model)

    with pytest.raises(
        ValueError, match=r"no TarFlowLM but LlamaForCausalLM: evaluate it by --model hf"
    ):
        TarFlowLMEvaluator(str(flow_folder / "discrete"))


# ------------------------------------------------------------------------------------- tasks, files

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {name}
doc_to_text: {text}
doc_to_target: {target}
metric_list: [{{metric: {metric}}}]
"""


@pytest.fixture(scope="module")
def flow_folder(tmp_path_factory):
    """A checkpoint, the discrete model beside it, and three tasks on two documents."""
    folder = tmp_path_factory.mktemp("harness")
    model = make(STACKS["mix-d, mix-1, mix-1"], vocab_size=27, max_position_embeddings=32).float()
    save_model(model, character_tokenizer(), folder / "model")
    save_model(discrete_baseline(model.config), character_tokenizer(), folder / "discrete")
    documents = [
        {"text": "the fox jumps over the lazy dog and then it sleeps"},
        {"text": "a short one"},
    ]
    (folder / "documents.jsonl").write_text(
        "".join(json.dumps(document) + "\n" for document in documents)
    )
    (folder / "tasks").mkdir()

    for name, metric, text, target, more in (
        ("loglikelihood_rolling", "bits_per_byte", '""', '"{{text}}"', ""),
        ("multiple_choice", "acc", '"{{text}}"', "0", 'doc_to_choice: ["yes", "no it is not"]\n'),
        (
            "generate_until",
            "exact_match",
            '"{{text}}"',
            '"x"',
            "generation_kwargs: {until: [x], max_gen_toks: 4}\n",
        ),
    ):
        fields = {
            "name": name,
            "data": folder / "documents.jsonl",
            "text": text,
            "target": target,
            "metric": metric,
        }
        (folder / "tasks" / f"{name}.yaml").write_text(TASK.format(**fields) + more)

    return folder


def test_the_runner_on_tasks_from_files(flow_folder, monkeypatch, capfd):
    """Runs the module as `python -m` does.

    It leaves out the harness's own tasks, which take long to list.
    """
    monkeypatch.delitem(model_registry._objs, "tarflowlm")
    monkeypatch.setattr(
        TaskManager, "__init__", partialmethod(TaskManager.__init__, include_defaults=False)
    )
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", flow_folder / "cache")
    command = [
        "lm_eval_model",
        "--model",
        "tarflowlm",
        "--batch_size",
        "3",
        "--output_path",
        flow_folder / "r.json",
    ]
    command += [
        "--model_args",
        f"pretrained={flow_folder / 'model'},num_samples=2,check_greedy=False",
    ]
    command += [
        "--include_path",
        flow_folder / "tasks",
        "--tasks",
        "loglikelihood_rolling,multiple_choice,generate_until",
    ]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    with warnings.catch_warnings(action="ignore"):  # that the module has been imported already
        runpy.run_module("tarflow_hf.lm_eval_model", run_name="__main__")

    assert "bits_per_byte" in capfd.readouterr().out
    (path,) = flow_folder.glob("r*.json")
    found = json.loads(path.read_text())
    assert found["config"]["loglikelihood"] == DIFFERENCE
    assert set(found["results"]) == {"loglikelihood_rolling", "multiple_choice", "generate_until"}

    lm = TarFlowLMEvaluator(str(flow_folder / "model"), num_samples=2, device="cpu")
    texts = [
        json.loads(line)["text"]
        for line in (flow_folder / "documents.jsonl").read_text().splitlines()
    ]
    total = sum(lm.loglikelihood_rolling(requests("r", *((text,) for text in texts)), True))
    bits = -total / math.log(2) / sum(map(len, texts))
    assert found["results"]["loglikelihood_rolling"]["bits_per_byte,none"] == pytest.approx(
        bits, rel=1e-5
    )


@pytest.fixture
def load_metric(monkeypatch, tmp_path):
    """Returns `evaluate.load` from the repository's root, without a network.

    Its caches have a folder of their own.
    """
    evaluate = pytest.importorskip("evaluate")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True, raising=False)
    return lambda name: evaluate.load(f"metrics/{name}", cache_dir=str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", ["model", "discrete"])
def test_bits_per_token_as_a_metric(load_metric, flow_folder, kind):
    from transformers import AutoModelForCausalLM

    texts = ["the fox jumps over the lazy dog and then it sleeps", "a short one", "x"]
    metric, folder = load_metric("bits_per_token"), flow_folder / kind
    found = metric.compute(predictions=texts, checkpoint=str(folder), num_samples=2, device="cpu")
    length = 32  # both take as many tokens of a text
    ids = [torch.tensor(character_tokenizer()(text).input_ids) for text in texts]
    sequences = [sequence for text in ids for sequence in cut_text(text, length)]
    expected = likelihood(AutoModelForCausalLM.from_pretrained(folder), sequences, num_samples=2)
    assert (
        found["bits_per_token"] == pytest.approx(expected.bits_per_token)
        and found["num_tokens"] == 62
    )
    assert found["bits_per_character"] == pytest.approx(expected.bits_per_token)
    again = metric.compute(
        predictions=texts, checkpoint=str(folder), num_samples=2, device="cpu", batch_size=1
    )
    assert again["nats_per_token"] == pytest.approx(found["nats_per_token"], rel=1e-5)
    with pytest.raises(ValueError, match="text without tokens"):
        metric.compute(predictions=[""], checkpoint=str(folder), device="cpu")


def test_generative_perplexity_as_a_metric(load_metric, judge):
    texts = ["the fox", "another text"]
    found = load_metric("generative_perplexity").compute(
        predictions=texts, judge=str(judge), device="cpu"
    )
    judged = judge_texts(texts, *load_judge(judge))
    assert (
        found["perplexity"] == pytest.approx(judged.perplexity) and len(found["perplexities"]) == 2
    )
    of_another = (
        math.log(12) - (3 * math.log(3) + 2 * math.log(2)) / 12
    )  # three t, two e, seven others
    assert found["entropy"] == pytest.approx((math.log(7) + of_another) / 2)
