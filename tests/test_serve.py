"""The library's server on a small model, asked by the official client."""

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import torch
import uvicorn

from helpers.models import STACKS, separated
from helpers.words import letters_with_a_template
from tarflow_hf import TarFlowLMModel
from tarflow_hf.data import character_tokenizer, token_ids
from tarflow_hf.serve import make_app

TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


@contextlib.contextmanager
def served(folder, model, chat_template=None, tokenizer=None):
    """The address of a server of the model, by default with characters for tokens."""
    tokenizer = character_tokenizer() if tokenizer is None else tokenizer
    tokenizer.chat_template = chat_template
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = uvicorn.Config(make_app(str(folder), "cpu"), port=0, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)

    try:
        yield f"http://localhost:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    with served(folder, separated(STACKS["mix-d"]), TEMPLATE) as address:
        yield address, str(folder)


@pytest.fixture
def complete(server):
    address, name = server
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    return lambda **options: client.completions.create(**{"model": name, "prompt": "ab"} | options)


def text_of(answer):
    return answer.choices[0].text


def test_completions_are_those_of_generate(server, complete):
    _, name = server
    model, tokenizer = TarFlowLMModel.from_pretrained(name).eval(), character_tokenizer()
    ids = tokenizer("the list", return_tensors="pt").input_ids
    generator = torch.Generator().manual_seed(3)
    expected = tokenizer.decode(
        model.generate(ids, max_new_tokens=12, top_p=0.8, generator=generator)[0, 8:]
    )
    answer = complete(prompt="the list", max_tokens=12, seed=3, top_p=0.8)
    assert text_of(answer) == expected and answer.model == name
    assert answer.usage.prompt_tokens == 8 and answer.usage.completion_tokens == 12
    assert answer.choices[0].finish_reason == "length"

    stop = expected[4:6]
    stopped = complete(prompt="the list", max_tokens=12, seed=3, top_p=0.8, stop=[stop])
    assert text_of(stopped) == expected[: expected.index(stop) + 2]
    assert stopped.choices[0].finish_reason == "stop"
    assert len(text_of(complete(prompt="", max_tokens=4))) == 4
    assert text_of(complete(temperature=0)) == text_of(complete(temperature=0, seed=5))


def test_streams(complete):
    whole = text_of(complete(max_tokens=10, seed=1))
    parts = [chunk.choices[0].text for chunk in complete(max_tokens=10, seed=1, stream=True)]
    assert "".join(parts) == whole and len([part for part in parts if part]) == 10


def test_a_seed_gives_its_text_whatever_else_is_asked(complete):
    alone = [text_of(complete(max_tokens=20, seed=seed)) for seed in range(8)]
    assert len(set(alone)) == 8
    with ThreadPoolExecutor(8) as pool:
        unseeded = [pool.submit(complete, max_tokens=20) for _ in range(8)]
        together = list(
            pool.map(lambda seed: text_of(complete(max_tokens=20, seed=seed)), range(8))
        )

    assert together == alone and len({text_of(x.result()) for x in unseeded}) == 8


def test_a_stream_that_is_cut_off_leaves_the_server_alive(server, complete):
    for _ in range(5):
        stream = complete(max_tokens=29, stream=True)
        next(iter(stream))
        stream.close()

    assert len(text_of(complete(max_tokens=5))) == 5
    assert httpx.get(f"{server[0]}/health").json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "x" * 40}, "The prompt has 40 tokens"),
        ({"prompt": ["a", "b"]}, "prompt must be a string"),
        ({"max_tokens": 0}, "max_tokens must be an integer"),
        ({"temperature": -1}, "temperature must be positive"),
        ({"top_p": 3}, "top_p must be above 0"),
        ({"top_p": 3, "stream": True}, "top_p must be above 0"),
        ({"seed": -1}, "seed must be an integer"),
        ({"extra_body": {"seed": True}}, "seed must be an integer"),
        ({"extra_body": {"max_tokens": True}}, "max_tokens must be an integer"),
        ({"stop": 5}, "stop must be a string"),
        ({"stop": ["a", None]}, "stop must be a string"),
        ({"n": 3}, "n is not served"),
        ({"echo": True}, "echo is not served"),
        ({"presence_penalty": 0.5}, "presence_penalty is not served"),
        ({"extra_body": {"logit_bias": [1]}}, "options of the request"),
        ({"prompt": "привет"}, "Nothing is left of the prompt"),
        ({"model": "other"}, "pinned to"),
        ({"suffix": "b"}, "suffix needs a model that is conditional"),
        ({"extra_body": {"generation_config": '{"num_beams": 3}'}}, "no options"),
        ({"extra_body": {"generation_config": "{"}}, "options of the request"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_bad_requests_have_their_status(complete, options, message):
    with pytest.raises(openai.BadRequestError, match=message):
        complete(**options)


def test_what_asks_for_nothing_is_taken(complete):
    plain = text_of(complete(seed=3, max_tokens=8))
    assert text_of(complete(seed=3, max_tokens=8, n=1, echo=False, presence_penalty=0)) == plain
    config = '{"return_dict_in_generate": true, "output_states": true, "max_new_tokens": 8}'
    assert len(text_of(complete(seed=3, extra_body={"generation_config": config}))) == 8


def test_a_bias_keeps_a_token_out(complete):
    token = character_tokenizer()("e").input_ids[0]
    options = {"seed": 1, "max_tokens": 16}
    assert "e" in "".join(text_of(complete(**options, logit_bias={str(token): 50})))
    assert "e" not in text_of(complete(**options, logit_bias={str(token): -100}))


def test_malformed_requests(server):
    address = server[0] + "/v1/completions"
    assert httpx.post(address, content="{nonsense").status_code == 422
    assert httpx.post(address, json=[1, 2]).status_code == 422
    assert httpx.post(address, json={"prompt": "a", "typo": 1}).status_code == 422
    assert httpx.get(server[0] + "/v1/models").json()["data"][0]["id"] == server[1]


def test_chats_where_there_is_a_template(server, tmp_path):
    address, name = server
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    options = {
        "model": name,
        "messages": [{"role": "user", "content": "hello"}],
        "seed": 2,
        "max_tokens": 9,
    }
    answer = client.chat.completions.create(**options).choices[0].message.content
    parts = client.chat.completions.create(**options, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == answer
    assert len(answer) == 9
    response = client.responses.create(model=name, input="hello", max_output_tokens=9)
    assert len(response.output_text) == 9
    with pytest.raises(openai.BadRequestError, match="top_p must be above 0"):
        client.responses.create(model=name, input="hello", top_p=3)

    for messages in ([], [{"content": "hello"}]):
        with pytest.raises(openai.BadRequestError, match="messages must be a list"):
            client.chat.completions.create(model=name, messages=messages)

    with served(tmp_path, separated(STACKS["mix-d"])) as base:
        client = openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.BadRequestError, match="no chat template"):
            client.chat.completions.create(**options | {"model": str(tmp_path)})


def test_a_suffix_bounds_a_gap(tmp_path):
    model = separated(STACKS["mix-d, mix-1, mix-1"], conditional=True)
    with served(tmp_path, model) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        options = {"model": str(tmp_path), "prompt": "the ", "suffix": " list", "seed": 4}
        answer = client.completions.create(**options, max_tokens=6)
        assert len(text_of(answer)) == 6

        tokenizer, generator = character_tokenizer(), torch.Generator().manual_seed(4)
        ids = torch.tensor(
            [[*tokenizer("the ").input_ids, *[0] * 6, *tokenizer(" list").input_ids]]
        )
        gap = torch.tensor([[0] * 4 + [1] * 6 + [0] * 5])
        filled = model.generate(ids, infill_mask=gap, generator=generator)
        assert text_of(answer) == tokenizer.decode(filled[0, 4:10])
        with pytest.raises(openai.BadRequestError, match="No room between"):
            client.completions.create(**options | {"prompt": "x" * 28})


def test_prompt_and_suffix_have_no_special_tokens(tmp_path):
    """As in training, though the tokenizer's template puts some around a text by itself."""
    model = separated(STACKS["mix-d"], conditional=True, vocab_size=29)
    tokenizer = letters_with_a_template()
    prompt, suffix = (token_ids(tokenizer, text) for text in ("the", "list"))
    options = {"model": str(tmp_path), "prompt": "the", "seed": 4, "max_tokens": 6}
    with served(tmp_path, model, tokenizer=tokenizer) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        answer = client.completions.create(**options)
        parts = client.completions.create(**options, stream=True)
        streamed = "".join(part.choices[0].text for part in parts)
        filled = client.completions.create(**options, suffix="list")

    generator = torch.Generator().manual_seed(4)
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=6, generator=generator)
    expected = tokenizer.decode(ids[0, 3:], skip_special_tokens=True)
    assert text_of(answer) == streamed == expected and answer.usage.prompt_tokens == 3

    gap = torch.tensor([[0] * 3 + [1] * 6 + [0] * 4])
    ids = torch.tensor([prompt + [0] * 6 + suffix])
    generator = torch.Generator().manual_seed(4)
    ids = model.generate(ids, infill_mask=gap, generator=generator)
    assert text_of(filled) == tokenizer.decode(ids[0, 3:9], skip_special_tokens=True)
