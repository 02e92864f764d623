"""The picture of bits per token."""

import math
import re

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from helpers.pages import HOSTILE, hostile_tokenizer, tokens_of
from tarflow_hf.data import character_tokenizer
from tarflow_hf.report.bits import bits_section


def test_the_picture_says_each_number():
    tokenizer = character_tokenizer()
    ids = torch.tensor(tokenizer("ab cd").input_ids)
    guess = math.log2(27)
    section = bits_section(ids, torch.tensor([-0.01, guess / 2, guess, 99.0, -1.25]), tokenizer)
    minus, box = "\N{MINUS SIGN}", "\N{OPEN BOX}"
    expected = [
        ("a", "0.0", 0.0),
        ("b", "2.4", 0.5),
        (box, "4.8", 1.0),
        ("c", "99.0", 1.0),
        ("d", f"{minus}1.2", 0.0),
    ]
    assert tokens_of(section) == expected
    assert (
        section.count('class="word"') == 2
        and "4.8 bits, as many as a guess among all 27 tokens" in section
    )


def test_white_space_is_seen():
    tokenizer = Tokenizer(
        models.WordLevel({"a": 0, " b": 1, " ": 2, "\n": 3, "\t ": 4}, unk_token="a")
    )
    tokenizer.decoder = decoders.Fuse()
    section = bits_section(
        torch.arange(5), torch.zeros(5), PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    )
    assert [text for text, *_ in tokens_of(section)] == ["a", " b", "␣", "↵", "→␣"]
    words = re.findall(r'class="word">(.*?)</span></span>', section)
    assert ["".join(re.findall("<bdi>(.*?)</bdi>", word)) for word in words] == [
        "a",
        " b␣",
        "↵",
        "→␣",
    ]


def test_hostile_text_stays_text():
    section = bits_section(
        torch.arange(len(HOSTILE)), torch.ones(len(HOSTILE)), hostile_tokenizer()
    )
    assert (
        set(re.findall(r"<(\w+)", section)) == {"p", "span", "bdi", "small"}
        and "\x1b" not in section
    )
    assert [text for text, *_ in tokens_of(section)][:3] == HOSTILE[:3]
