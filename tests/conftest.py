"""Fixtures of several folders.

Without a GPU, Triton's kernels run in its interpreter. Triton reads the variable that asks for it
when the kernels are defined, so it is set here.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest.register_assert_rewrite("helpers")

# Importing it registers the coupling, which the tests of the others don't expect.
collect_ignore = ["helpers/toy_coupling.py"]


@pytest.fixture(scope="module")
def one_thread():
    """Small tensors: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hub on loopback, which the client of this process uses, too."""
    from huggingface_hub import constants

    from helpers.local_hub import LocalHub

    home = tmp_path_factory.mktemp("home")
    with LocalHub() as hub, pytest.MonkeyPatch.context() as patch:
        for name, value in hub.environment(home).items():
            patch.setenv(name, value)

        patch.setattr(constants, "ENDPOINT", hub.endpoint)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        patch.setattr(
            "huggingface_hub.utils._http.time.sleep", lambda seconds: None
        )  # before the client tries again
        yield hub


@pytest.fixture(scope="module")
def clean_room(hub):
    from tarflow_hf.hub import CleanRoom

    with CleanRoom() as clean_room:
        yield clean_room


@pytest.fixture
def one_clean_room(clean_room, monkeypatch):
    """Starts the clean room once for all tests of a file."""

    class Running:
        __enter__ = staticmethod(lambda: clean_room)
        __exit__ = staticmethod(lambda *exception: None)

    monkeypatch.setattr("tarflow_hf.hub.CleanRoom", Running)


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A folder with a random GPT-2 that reads 24 bytes at once and has no padding token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    from tarflow_hf.training import save_model

    torch.manual_seed(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(
        models.BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[])
    )
    backend.pre_tokenizer, backend.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    config = GPT2Config(
        vocab_size=256, n_positions=24, n_embd=16, n_layer=1, n_head=2, initializer_range=0.3
    )
    config.bos_token_id = config.eos_token_id = None
    folder = tmp_path_factory.mktemp("judge")
    save_model(
        GPT2LMHeadModel(config), PreTrainedTokenizerFast(tokenizer_object=backend), folder / "judge"
    )

    return folder / "judge"
