"""Strategies of hypothesis for models and batches, and what counts as an answer."""

import os
import signal
import traceback
from collections import Counter
from contextlib import contextmanager
from functools import wraps
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import tarflow_hf
from helpers.models import flow, make

SOURCE = Path(tarflow_hf.__file__).parent

# In the normal suite the same examples each time; with a number of them (`make fuzz`) new ones.
NUM_EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))

LONGEST_ANSWER = 60  # seconds; what takes longer hangs
LENGTHS = {1: 8, 2: 8, 3: 9}  # the longest text in tokens, by patch size

DECODERS = {
    "llama": {"intermediate_size": 32, "num_key_value_heads": 1},
    "mistral": {"intermediate_size": 32, "num_key_value_heads": 1, "sliding_window": 3},
    "gpt2": {},
    "mamba": {"state_size": 4, "num_hidden_layers": 1},
}


def fuzz(num_examples, *strategies, **named):
    """Runs a test over draws of the strategies: so many in the normal suite."""

    def decorate(test):
        @settings(
            max_examples=NUM_EXAMPLES or num_examples,
            derandomize=not NUM_EXAMPLES,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],
        )
        @given(*strategies, **named)
        @wraps(test)
        def run(*args, **kwargs):
            with in_time():
                test(*args, **kwargs)

        return run

    return decorate


@contextmanager
def in_time():
    """Ends the test with an error if what is inside hangs."""

    def stop(*_):
        raise TimeoutError(f"No answer in {LONGEST_ANSWER} s.")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LONGEST_ANSWER)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# The calls of the test that runs, and those that had a result: a test of errors only shows nothing.
COUNT = Counter()


def answer(call, *args, **kwargs):
    """The result of a call and None; or None and the project's own error, which has a message.

    Any other error is one of the test.
    """
    COUNT["calls"] += 1
    try:
        result = call(*args, **kwargs)
        COUNT["results"] += 1
        return result, None
    except (ValueError, TypeError) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        is_own = Path(last.filename).is_relative_to(SOURCE) and "raise" in last.line
        # The library's checks of its own options, which `generate` hands on.
        is_own = is_own or ("transformers/generation/" in last.filename and "raise" in last.line)
        if not is_own or len(str(error)) < 20:
            raise

        return None, error


@st.composite
def flows(draw, is_first, patch_size, is_causal):
    """One entry of a configuration's flows."""
    coupling = draw(st.sampled_from(["affine", "mixture_cdf", "mixture_rosenblatt"]))
    directions = ["left_to_right", "right_to_left_within_patch", "right_to_left"]
    options = {"direction": draw(st.sampled_from(directions[: 2 if is_causal else 3]))}
    if coupling == "mixture_cdf":
        options["num_components"] = draw(st.integers(1, 3))
        options["autoregressive"] = draw(st.booleans())
    if coupling == "mixture_rosenblatt":
        is_tied = is_first and draw(st.booleans())
        options["projection_bias"] = draw(st.booleans())
        if is_first:
            options["tie_codebook"] = is_tied
        if not is_tied:
            options["num_components"] = draw(st.integers(1, 4))
        if patch_size > 1:
            options["patch_head_layers"] = draw(st.integers(0, 1))
    if is_first:
        options["context"] = draw(st.sampled_from(["latent", "posterior"]))

    return flow(coupling, **options)


@st.composite
def options_of_models(draw, is_causal=False):
    """The arguments of `make` for any flows, patches, decoder and vocabulary."""
    patch_size = draw(st.sampled_from([1, 1, 2, 3]))
    stack = [draw(flows(True, patch_size, is_causal))]
    for _ in range(draw(st.integers(0, 2))):
        stack.append(draw(flows(False, patch_size, is_causal)))

    length = LENGTHS[patch_size]
    decoder = draw(st.sampled_from([None, None, None, *DECODERS]))
    options = {
        "patch_size": patch_size,
        "latent_size": draw(st.integers(1, 3)),
        "vocab_size": draw(st.sampled_from([1, 2, 5, 7])),
        "seed": draw(st.integers(0, 3)),
        "max_position_embeddings": length,
        "conditional": draw(st.booleans()),
        "posterior_top_k": draw(st.sampled_from([None, 1, 3])),
    }
    if decoder is not None:
        sizes = {"hidden_size": 16, "num_attention_heads": 2, "max_position_embeddings": length}
        options["block_config"] = {"model_type": decoder, **sizes, **DECODERS[decoder]}

    return {"flows": stack, **options}


@st.composite
def masks(draw, num_rows, length):
    """Any mask (B, T), most often one with padding on a side."""
    rows = []
    for _ in range(num_rows):
        kind = draw(st.sampled_from(["all", "right", "left", "both", "any"]))
        start = draw(st.integers(0, length)) if kind in ("left", "both") else 0
        end = draw(st.integers(start, length)) if kind in ("right", "both") else length
        row = [int(start <= place < end) for place in range(length)]
        if kind == "any":
            row = draw(st.lists(st.integers(0, 1), min_size=length, max_size=length))

        rows.append(row)

    return torch.tensor(rows, dtype=torch.long).reshape(num_rows, length)


def draw_model(data, **options):
    """A small model in float64; what a failure prints are its options."""
    return make(**data.draw(options_of_models(**options)))


@st.composite
def batches(draw, model, are_masked=True):
    """Ids (B, T) and a mask (B, T) or None. At padding any number stands."""
    config = model.config
    longest, patch_size = config.max_position_embeddings, config.patch_size
    num_rows = draw(st.integers(1, 3))
    length = draw(st.one_of(
        st.integers(1, longest // patch_size).map(lambda n: n * patch_size), st.integers(0, longest + 1)
    ))  # fmt: skip
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    ids = torch.randint(config.vocab_size, (num_rows, length), generator=generator)
    mask = draw(masks(num_rows, length)) if are_masked and draw(st.booleans()) else None
    if mask is not None:
        ids = ids.masked_fill(mask == 0, draw(st.sampled_from([0, -100, 10**6])))
    if draw(st.integers(0, 9)) == 0 and ids.numel():
        ids[0, 0] = draw(st.sampled_from([-1, config.vocab_size, -(2**63), 2**63 - 1]))

    return ids, mask


def real_of(mask, ids):
    return torch.ones_like(ids, dtype=torch.bool) if mask is None else mask != 0


def has_whole_rows(is_real, patch_size):
    """True if every row is some whole patches in one piece."""
    for row in is_real:
        places = row.nonzero().flatten()
        if len(places) == 0 or len(places) % patch_size or places[0] % patch_size:
            return False
        if int(places[-1] - places[0]) + 1 != len(places):
            return False

    return True
