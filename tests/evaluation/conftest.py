"""Models and sequences of the evaluation tests."""

import pytest
import torch

from helpers.evaluation import TEXT
from helpers.models import STACKS, make
from tarflow_hf import TarFlowLMModel
from tarflow_hf.data import character_tokenizer
from tarflow_hf.evaluation import cut_text


@pytest.fixture(scope="module")
def flow() -> TarFlowLMModel:
    return make(STACKS["mix-d, mix-1, mix-1"], vocab_size=27, noise=0.3).float()


@pytest.fixture(scope="module")
def sequences() -> list[dict]:
    ids = torch.tensor(character_tokenizer()(TEXT).input_ids)
    return cut_text(ids, 18)


@pytest.fixture(scope="module")
def model():
    return make(STACKS["mix-d, mix-1, mix-1"], vocab_size=27).float()
