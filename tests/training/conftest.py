"""The tokenizer and the text of the training tests."""

import pytest

from helpers.training import TEXT
from tarflow_hf.data import PackedTokens, character_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer()


@pytest.fixture(scope="module")
def data(tokenizer):
    return PackedTokens([TEXT], tokenizer, 16)
