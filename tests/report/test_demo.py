"""Answers of the demo page against the model itself.

Also its messages about input that it can't take.
"""

import re
import time
from html import unescape

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from helpers.models import STACKS, flow, separated
from helpers.pages import HOSTILE, Page, hostile_tokenizer, tokens_of, written
from tarflow_hf.data import character_tokenizer
from tarflow_hf.evaluation import token_bits
from tarflow_hf.report import demo

TEXT = "the fox is red"


@pytest.fixture(scope="module")
def model():
    return separated(STACKS["mix-d, mix-1, mix-1"])


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer()


def rows_of(answer):
    """Returns the passes, each a list of (text, marked, given)."""
    return Page(answer).rows


def scored(answer):
    """Returns the text whose tokens have numbers, and the sum of these."""
    tokens = tokens_of(answer)
    bits = sum(float(number.replace("\N{MINUS SIGN}", "-")) for _, number, _ in tokens)
    return "".join(text for text, *_ in tokens).replace("\N{OPEN BOX}", " "), bits


def test_write(model, tokenizer):
    answer = demo.write(model, tokenizer, TEXT, 12, temperature=0.9, seed=3)
    assert answer == demo.write(model, tokenizer, TEXT, 12, temperature=0.9, seed=3)
    assert answer != demo.write(model, tokenizer, TEXT, 12, temperature=0.9, seed=4)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    generator = torch.Generator().manual_seed(3)
    expected = tokenizer.decode(
        model.generate(ids, max_new_tokens=12, temperature=0.9, generator=generator)[0]
    )
    rows = rows_of(answer)
    assert written(answer) == expected == "".join(cell[0] for cell in rows[-1]) == scored(answer)[0]
    assert len(rows) == 4 and all(
        "".join(text for text, _, given in row if given) == TEXT for row in rows
    )
    assert "approximates" in answer


def settled(part):
    """Returns what is certain of a text, and the guess behind it."""
    pattern = r'aria-busy="true">(.*?)<span class="guess">(.*?)</span></p>'
    return tuple(map(unescape, re.search(pattern, part, re.DOTALL).groups()))


@pytest.mark.parametrize("prompt", [TEXT, "", "the [...] is red"])
def test_a_text_that_settles(model, tokenizer, prompt, monkeypatch):
    class Every(list):  # a queue from which nothing is left out
        def empty(self):
            return True

        def get(self):
            while not self:
                time.sleep(0.001)
            return self.pop(0)

        put = list.append

    monkeypatch.setattr(demo, "SimpleQueue", Every)
    *parts, answer = demo.settle(model, tokenizer, prompt, 12, seed=3)
    assert answer == demo.write(model, tokenizer, prompt, 12, seed=3)
    text = written(answer)
    states = [settled(part) for part in parts]
    lengths = [len(certain) for certain, _ in states]
    assert lengths == sorted(lengths) and states[-1] == (text, "")
    assert all(text.startswith(certain) for certain, _ in states)
    guesses = [certain + guess for certain, guess in states if guess]
    assert len(guesses) >= 3 and {len(guess) for guess in guesses} == {len(text)}

    monkeypatch.undo()
    *some, last = demo.settle(model, tokenizer, prompt, 12, seed=3)
    assert last == answer and len(some) <= len(parts)
    assert list(demo.settle(model, tokenizer, prompt, 12, seed=3, num_candidates=2)) == [
        demo.write(model, tokenizer, prompt, 12, seed=3, num_candidates=2)
    ]
    with pytest.raises(ValueError, match="there is room for"):
        list(demo.settle(model, tokenizer, "a" * 99, 12))


def test_a_text_stops_where_the_model_does_and_may_begin_with_nothing(model, tokenizer):
    assert len(written(demo.write(model, tokenizer, TEXT, 99))) == 32
    answer = demo.write(
        model, tokenizer, "", 9, num_candidates=3, top_p=0.5, mixture_temperature=0.8
    )
    assert len(written(answer)) == 9 and "approximates" not in answer and "italics" not in answer


def test_what_follows_the_end_of_a_document_is_shown(model, tokenizer):
    with_end = separated(STACKS["mix-d, mix-1, mix-1"], eos_token_id=4, pad_token_id=0)
    texts = [written(demo.write(m, tokenizer, "", 32, seed=1)) for m in (model, with_end)]
    assert texts[0] == texts[1] and "d" in texts[0][:-1]
    after = [
        "".join(cell[0] for cell in rows_of(demo.edit(m, tokenizer, TEXT + " dog", "is"))[1])
        for m in (model, with_end)
    ]
    assert after[0] == after[1] and len(after[0]) == len(TEXT + " dog") and "d" in after[0][:-1]


@pytest.mark.parametrize(
    "prompt", ["the [...] is [..] red", "the […] is [..] red", "[...]", "fox[.....]"]
)
def test_gaps(model, tokenizer, prompt):
    answer = demo.write(model, tokenizer, prompt, 12)
    pattern = re.sub(
        r"\[[.…]+\]", lambda gap: f"(.{{{len(gap[0].replace('…', '...')) - 2}}})", prompt
    )
    assert re.fullmatch(pattern, written(answer))
    given = re.sub(r"\[[.…]+\]", "", prompt)
    assert all(
        "".join(text for text, _, is_given in row if is_given) == given for row in rows_of(answer)
    )


def test_what_is_exact_is_not_called_approximate(tokenizer):
    forward = separated([flow("mixture_rosenblatt"), flow("mixture_cdf", num_components=2)])
    conditional = separated(STACKS["mix-d, mix-1, mix-1"], conditional=True)
    cases = [(forward, "fox", False), (forward, "f[..]x", True), (conditional, "f[..]x", False)]
    for model, prompt, is_approximate in cases:
        assert ("approximates" in demo.write(model, tokenizer, prompt, 4)) == is_approximate


def test_score(model, tokenizer):
    answer = demo.score(model, tokenizer, "The fox, 1 red")
    text, total = scored(answer)
    assert text == "the fox one red"
    ids = tokenizer(text, return_tensors="pt").input_ids
    bits = token_bits(model, ids, 8, torch.Generator().manual_seed(0)).sum().item()
    assert (
        total == pytest.approx(bits, abs=0.05 * len(text))
        and f"Likelihood: {bits / 15:.2f} bits" in answer
    )


@pytest.mark.parametrize(
    ("text", "part", "start", "expected"),
    [
        ("fox or fox", "fox", 0, range(0, 3)),
        ("fox or fox", "fox", 7, range(7, 10)),
        ("fox or fox", "or", 9, range(4, 6)),  # there is no such part at 9
        ("Is 3 red, or", "3", 3, range(2, 9)),  # " three ", whose spaces are those beside it
        ("Is 3 red, or", "red", 5, range(9, 12)),
    ],
)
def test_edit_redraws_the_part_that_was_meant(tokenizer, text, part, start, expected):
    """A flow that changes every token by itself: only the redrawn part changes."""
    model = separated([flow("affine")])
    with torch.no_grad():
        model.flow.layers[0].head.projection.weight.zero_()

    changed = set()
    for seed in range(3):
        answer = demo.edit(model, tokenizer, text, part, start, seed=seed)
        before, after = rows_of(answer)
        before, marks = (
            "".join(cell[0] for cell in before),
            [marked for text, marked, _ in after for _ in text],
        )
        assert before == tokenizer.decode(tokenizer(text).input_ids) and len(marks) == len(before)
        changed |= {n for n, is_marked in enumerate(marks) if is_marked}
        assert answer == demo.edit(model, tokenizer, text, part, start, seed=seed)

    assert changed <= set(expected) and len(changed) > len(expected) // 2


def test_edit_of_a_state(model, tokenizer):
    """Flow 1 runs left to right: the text before the edit of its state stays."""
    _, after = rows_of(demo.edit(model, tokenizer, TEXT, "is", 8, num_flows=1))
    assert after[0][:2] == ("the fox ", False) and any(marked for _, marked, _ in after)


WRITE, SCORE, EDIT = "write", "score", "edit"


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (WRITE, ("a" * 32, 8), "The text has 32 tokens, and there is room for 31"),
        (WRITE, ("a" * 30 + "[...]", 8), "The text has 33 tokens, and there is room for 32"),
        (WRITE, ("日本", 8), "Nothing of this text"),
        (SCORE, ("  ",), "There is no text yet"),
        (SCORE, ("a" * 33,), "The text has 33 tokens, and there is room for 32"),
        (SCORE, ("日本",), "Nothing of this text"),
        (EDIT, (TEXT, ""), "Say which part"),
        (EDIT, (TEXT, "dog"), "Say which part"),
    ],
)
def test_messages(model, tokenizer, function, arguments, message):
    with pytest.raises(ValueError, match=message):
        getattr(demo, function)(model, tokenizer, *arguments)


def test_messages_about_patches(tokenizer):
    model = separated(STACKS["mix-d"], patch_size=4)
    assert scored(demo.score(model, tokenizer, "fox or a"))[0] == "fox or a"
    assert len(written(demo.write(model, tokenizer, "fox ", 8))) == 12

    for call in (
        lambda: demo.score(model, tokenizer, "fox or"),
        lambda: demo.write(model, tokenizer, "fox or", 8),
    ):
        with pytest.raises(
            ValueError, match="This model takes 4 tokens at a time: 6 is 2 too many"
        ):
            call()


def test_characters_that_the_vocabulary_does_not_have():
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "?": 2}, merges=[], unk_token="?"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")
    with pytest.raises(ValueError, match="does not have: é ñ"):
        demo.score(separated(STACKS["mix-d"], vocab_size=3), tokenizer, "aébñé")


def test_hostile_text_stays_text():
    model, tokenizer = separated(STACKS["mix-d"], vocab_size=5), hostile_tokenizer()
    answer = demo.write(model, tokenizer, "", 24)
    page = Page(answer)
    assert {tag for tag, _ in page.tags} <= {"h2", "p", "ol", "li", "mark", "span", "bdi", "small"}
    assert any(token in written(answer) for token in HOSTILE[:3])
