"""Drafts change no token: token for token, with every option, whatever is guessed."""

import pytest
import torch

from helpers.causal_lms import CAUSAL_LMS, VOCABULARY, tiny_causal_lm
from helpers.models import CAUSAL, PATCH_STACKS, STACKS, flow, make
from helpers.streaming import DraftRecorder, Recorder
from tarflow_hf.conversion import from_causal_lm
from tarflow_hf.data import character_tokenizer
from tarflow_hf.modeling import drafts_tarflowlm
from tarflow_hf.modeling.drafts_tarflowlm import ASSISTED, DraftLength, PromptLookup

pytestmark = pytest.mark.usefixtures("one_thread")

FORWARD = {
    name: flows
    for name, flows in {**STACKS, **CAUSAL}.items()
    if flows[0]["direction"] != "right_to_left"
}
LOOKUP = {"prompt_lookup_num_tokens": 6}


class Prophet:
    """Knows how the texts go on, and is wrong about a share of the tokens."""

    cost, sureness = 0.0, None

    def __init__(self, texts, share_wrong, num_tokens=6, seed=0):
        self.texts, self.share_wrong, self.max_tokens = texts.tolist(), share_wrong, num_tokens
        self.random = torch.Generator().manual_seed(seed)

    def begin(self, u, codebook):
        pass

    def propose(self, texts, num_tokens):
        drafts = {}
        for row, text in texts.items():
            # Where texts that are asked for end, the longest match tells which is which.
            known = max(
                self.texts, key=lambda each: sum(a == b for a, b in zip(each, text, strict=False))
            )
            draft = known[len(text) : len(text) + num_tokens]
            is_wrong = torch.rand(len(draft), generator=self.random) < self.share_wrong
            drafts[row] = [(x + bool(w)) % 5 for x, w in zip(draft, is_wrong, strict=True)]

        return drafts, 4


@pytest.fixture
def prophesy(monkeypatch):
    """Returns a function by which a Prophet's guesses, all of them, replace the lookup's."""

    def replace(*arguments, **options):
        prophet = Prophet(*arguments, **options)
        monkeypatch.setattr(drafts_tarflowlm, "PromptLookup", lambda *_: prophet)
        monkeypatch.setattr(DraftLength, "choose", lambda _, num_available, __: num_available)

    return replace


@pytest.fixture
def every_guess(monkeypatch):
    """Takes all guesses along, whatever they cost."""
    monkeypatch.setattr(DraftLength, "choose", lambda _, num_available, __: num_available)


def generate(model, seed=0, **options):
    return model.generate(
        generator=torch.Generator().manual_seed(seed),
        return_dict_in_generate=True,
        output_inverse_report=True,
        **options,
    )


def assert_same(model, **options):
    """Generates with drafts and without; returns the output with them."""
    expected, actual = generate(model, **options), generate(model, **LOOKUP, **options)
    assert torch.equal(actual.sequences, expected.sequences)
    assert actual.inverse_reports[0].method == "drafts"
    return actual


# --------------------------------------------------------------------------------------------------
# Whatever the flows are, and whatever is guessed
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share_wrong", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("stack", FORWARD)
def test_states_are_those_without_drafts(prophesy, stack, patch_size, share_wrong):
    model = make(FORWARD[stack], patch_size)
    noise = torch.randn(1, 16, 2, dtype=torch.float64)
    expected = generate(model, noise=noise, inverse_method="sequential")
    prophesy(expected.sequences, share_wrong)
    actual = generate(model, noise=noise, **LOOKUP)
    assert torch.equal(actual.sequences, expected.sequences)
    torch.testing.assert_close(actual.latents, expected.latents, atol=1e-7, rtol=1e-7)
    report = actual.inverse_reports[0]
    assert report.method == "drafts" and sum(report.num_final) == 16 // patch_size
    assert report.residual <= 2 * torch.finfo(torch.float64).eps


@pytest.mark.parametrize("stack", PATCH_STACKS)
def test_patches_with_a_head_of_their_own(prophesy, stack):
    model = make(PATCH_STACKS[stack], patch_size=2)
    noise = torch.randn(2, 16, 2, dtype=torch.float64)
    expected = generate(model, noise=noise)
    prophesy(expected.sequences, 0.2)
    assert torch.equal(generate(model, noise=noise, **LOOKUP).sequences, expected.sequences)


def separated(model, log_scale=-7.0):
    with torch.no_grad():
        model.codebook.log_scale.fill_(log_scale)
    return model


def test_right_guesses_take_one_pass_for_all(prophesy):
    """The codebook does not overlap."""
    model = separated(make(STACKS["mix-d"]))
    noise = torch.randn(1, 18, 2, dtype=torch.float64)
    prophesy(model.generate(noise=noise), 0.0)
    out = generate(model, noise=noise, **LOOKUP)
    assert out.inverse_reports[0].num_final == [7, 7, 4]
    assert out.tokens_per_forward.tolist() == [6.0]


def test_a_codebook_that_overlaps_takes_another_pass(prophesy):
    """States are read as they are, not as their tokens' means, until nothing changes."""
    model = separated(make(STACKS["mix-d"]), log_scale=-1.5)
    noise = torch.randn(1, 18, 2, dtype=torch.float64)
    expected = generate(model, noise=noise)
    prophesy(expected.sequences, 0.0)
    out = generate(model, noise=noise, **LOOKUP)
    assert (
        out.inverse_reports[0].num_final[0] == 1
    )  # the embeddings of the drafts are not the input
    assert out.inverse_reports[0].iterations < 18
    torch.testing.assert_close(out.latents, expected.latents, atol=1e-9, rtol=1e-9)


def test_wrong_guesses_take_a_pass_for_each_position(prophesy):
    model = separated(make(STACKS["mix-d"]))
    noise = torch.randn(1, 18, 2, dtype=torch.float64)
    prophesy(model.generate(noise=noise), 1.0)
    assert generate(model, noise=noise, **LOOKUP).inverse_reports[0].num_final == [1] * 18


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma3_text", "cohere", "opt"])
def test_thousands_of_tokens_of_converted_models(every_guess, name):
    """In float64: 288 tokens of each of six architectures, of prompts that repeat themselves."""
    assert name in CAUSAL_LMS
    model = from_causal_lm(tiny_causal_lm(name)).double()
    num_passes = 0
    for seed in range(2):
        start = torch.randint(3, VOCABULARY, (1, 4), generator=torch.Generator().manual_seed(seed))
        for options in ({}, {"mixture_temperature": 0.3}, {"top_k": 1}):
            prompt = start.repeat(1, 4)
            out = assert_same(model, inputs=prompt, max_new_tokens=48, **options)
            num_passes += out.inverse_reports[0].iterations

    assert num_passes < 2 * 3 * 48


# --------------------------------------------------------------------------------------------------
# Whatever the options are
# --------------------------------------------------------------------------------------------------


class StopsAfter:
    """A criterion that ends a text with a token divisible by seven."""

    def __call__(self, input_ids, scores, **_):
        return input_ids[:, -1] % 7 == 0


def ban_multiples_of_three(input_ids, scores):
    """A processor that reads the last token."""
    scores = scores.clone()
    scores[input_ids[:, -1] % 2 == 0, ::3] = -torch.inf
    return scores


OPTIONS = {
    "temperature": {"temperature": 0.5},
    "no noise": {"do_sample": False},
    "greedy": {"top_k": 1},
    "top_k": {"top_k": 5, "mixture_temperature": 0.5},
    "top_p": {"top_p": 0.5},
    "min_p": {"min_p": 0.1},
    "sampled tokens": {"decode": "sample", "mixture_temperature": 0.3},
    "end": {"eos_token_id": list(range(3, 40)), "pad_token_id": 0},
    "min_new_tokens": {"eos_token_id": list(range(3, 40)), "pad_token_id": 0, "min_new_tokens": 9},
    "stopping criteria": {"stopping_criteria": [StopsAfter()], "pad_token_id": 0},
    "repetition": {"repetition_penalty": 1.5, "mixture_temperature": 0.5},
    "n-grams": {"no_repeat_ngram_size": 2, "mixture_temperature": 0.2},
    "bad words": {"bad_words_ids": [[5], [7, 9]], "mixture_temperature": 0.2},
    "a processor": {"logits_processor": [ban_multiples_of_three], "mixture_temperature": 0.2},
    "a processor, sampled": {
        "logits_processor": [ban_multiples_of_three],
        "mixture_temperature": 0.2,
        "decode": "sample",
    },
    "prefixes": {
        "prefix_allowed_tokens_fn": lambda row, ids: list(range(row % 2, VOCABULARY, 2)),
        "mixture_temperature": 0.3,
    },
    "several": {"num_return_sequences": 3, "mixture_temperature": 0.3},
    "candidates": {"num_candidates": 3, "mixture_temperature": 0.3},
    "sequential": {"inverse_method": "sequential"},
}


@pytest.fixture(scope="module")
def llama():
    return from_causal_lm(tiny_causal_lm("llama")).double()


def repeating(num_rows=1, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (num_rows, 5), generator=generator).repeat(1, 3)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option(every_guess, llama, options, overlap):
    if overlap:
        llama = separated(from_causal_lm(tiny_causal_lm("llama")).double(), log_scale=-0.7)

    for seed in range(1 if overlap else 2):
        assert_same(llama, inputs=repeating(), max_new_tokens=24, seed=seed, **options)


@pytest.mark.parametrize("name", ["end", "repetition", "stopping criteria", "greedy", "prefixes"])
def test_batches_with_padding_on_the_left(every_guess, llama, name):
    prompts = repeating(3)
    mask = torch.ones_like(prompts)
    mask[0, :4], mask[2, :9] = 0, 0
    out = assert_same(
        llama, inputs=prompts, attention_mask=mask, max_new_tokens=24, **OPTIONS[name]
    )
    assert out.tokens_per_forward.shape == (3,)


def test_stop_strings(every_guess):
    tokenizer, model = character_tokenizer(), separated(make(STACKS["mix-d"], vocab_size=27))
    options = {"inputs": torch.tensor([[1, 2, 3, 1, 2, 3]]), "pad_token_id": 0, "top_k": 3}
    text = tokenizer.decode(generate(model, **options).sequences[0])
    stops = {"stop_strings": [text[10:12]], "tokenizer": tokenizer}
    assert assert_same(model, **options, **stops).sequences.shape[1] <= 12


def test_the_streamer_gets_the_same_tokens(every_guess, llama):
    recorders = Recorder(), Recorder()
    for recorder, options in zip(recorders, ({}, LOOKUP), strict=True):
        options = {**options, "top_k": 1, "streamer": recorder}
        generate(llama, inputs=repeating(), max_new_tokens=20, **options)

    assert recorders[0].parts == recorders[1].parts and recorders[1].ended


@pytest.mark.parametrize("conditional", [False, True])
def test_prompts_and_gaps(every_guess, conditional):
    model = separated(make(STACKS["mix-d, mix-1, mix-1"], conditional=conditional), -2.0)
    text = torch.tensor(
        [[1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3], [0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1]]
    )
    gap = torch.zeros_like(text)
    gap[0, 4:8], gap[1, 6:] = 1, 1
    assert_same(model, inputs=text, infill_mask=gap)
    assert_same(model, inputs=text, max_new_tokens=6)
    assert_same(model, inputs=text, max_new_tokens=6, num_flows=1)


def test_the_saved_options_count(llama):
    llama.generation_config.prompt_lookup_num_tokens = 4
    try:
        assert generate(llama, inputs=repeating()).inverse_reports[0].method == "drafts"
    finally:
        llama.generation_config.prompt_lookup_num_tokens = None


def test_tokens_per_forward_without_drafts(llama):
    options = {"inputs": repeating(2), "max_new_tokens": 8, "eos_token_id": -1}
    assert generate(llama, **options).tokens_per_forward.tolist() == [1.0, 1.0]
    out = generate(llama, **options, inverse_method="parallel")
    num_passes = out.inverse_reports[0].iterations
    assert out.tokens_per_forward.tolist() == pytest.approx([8 / num_passes] * 2)


def test_a_text_that_ended_counts_no_more_passes(every_guess, llama):
    """Its passes are those until its end, as if it were alone."""
    options = {"inputs": repeating(2), "max_new_tokens": 30, "eos_token_id": list(range(3, 9))}
    for extra in ({}, LOOKUP):
        out = generate(llama, **options, **extra, pad_token_id=0)
        num_new = (out.sequences[:, 15:] != 0).sum(-1)
        if not extra:
            assert out.tokens_per_forward.tolist() == [1.0, 1.0] and num_new.unique().numel() == 2
        else:
            assert (out.tokens_per_forward >= 1).all()


# --------------------------------------------------------------------------------------------------
# Guesses that are shown
# --------------------------------------------------------------------------------------------------


def stream(model, **options):
    recorder = DraftRecorder()
    out = generate(model, streamer=recorder, output_states=True, **options)
    assert [token for part in recorder.parts for token in part] == out.sequences[0].tolist()
    return out, recorder.guesses


@pytest.mark.parametrize("stack", ["mix-d, mix-1, mix-1", "left to right", "one of each"])
@pytest.mark.parametrize("prompt", [None, torch.tensor([[1, 2, 3, 4]])], ids=["free", "prompt"])
def test_every_flows_output_is_shown(stack, prompt):
    """Before a flow is inverted its output, as text, from the noise on."""
    model = make({**STACKS, **CAUSAL}[stack])
    if prompt is not None and stack == "one of each":
        prompt = None  # its first flow runs right to left

    options = {"inputs": prompt, "max_new_tokens": 12, "inverse_method": "sequential"}
    out, guesses = stream(model, **options)
    states = [model.decode(state).argmax(-1)[0] for state in out.states[:0:-1]]
    if prompt is not None:
        states = [torch.cat([prompt[0], state[4:]]) for state in states]

    assert guesses == [state.tolist() for state in states]


def test_every_pass_of_a_parallel_inverse_is_shown():
    model = make(STACKS["mix-d"])
    out, guesses = stream(model, max_new_tokens=16, inverse_method="parallel")
    (report,) = out.inverse_reports
    assert len(guesses) == report.iterations  # the noise, and all passes but the last
    num_final = 0
    for guess, number in zip(guesses[1:], report.num_final, strict=False):
        num_final += number
        assert len(guess) == 16 and guess[:num_final] == out.sequences[0, :num_final].tolist()

    wrong = [sum(a != b for a, b in zip(x, out.sequences[0], strict=True)) for x in guesses]
    assert wrong[0] > 0 == wrong[-1]


def test_drafts_are_shown_before_they_are_verified(prophesy):
    model = separated(make(STACKS["mix-d"]))
    noise = torch.randn(1, 18, 2, dtype=torch.float64)
    text = model.generate(noise=noise)
    prophesy(text, 0.0)
    _, guesses = stream(model, noise=noise, **LOOKUP)
    assert guesses[1:] == [text[0, :n].tolist() for n in (6, 13, 17)]


def test_guesses_of_left_padded_prompts_and_of_gaps():
    model = separated(make(STACKS["mix-d, mix-1, mix-1"]), -2.0)
    prompt, mask = torch.tensor([[0, 0, 1, 2]]), torch.tensor([[0, 0, 1, 1]])
    _, guesses = stream(model, inputs=prompt, attention_mask=mask, max_new_tokens=6)
    assert [len(guess) for guess in guesses[:2]] == [10, 10]

    text, gap = torch.tensor([[1, 2, 3, 4, 1, 2]]), torch.tensor([[0, 0, 1, 1, 0, 0]])
    out, guesses = stream(model, inputs=text, infill_mask=gap)
    known = gap[0] == 0
    assert guesses and all((torch.tensor(x) == out.sequences[0])[known].all() for x in guesses)


def test_the_librarys_streamer_shows_them(capsys):
    streamers = pytest.importorskip("transformers.generation.streamers")
    if not hasattr(streamers, "TextDiffusionStreamer"):
        pytest.skip("needs a newer transformers")

    tokenizer, model = character_tokenizer(), make(STACKS["mix-d, mix-1, mix-1"], vocab_size=27)
    streamer = streamers.TextDiffusionStreamer(tokenizer)
    tokens = model.generate(max_new_tokens=8, streamer=streamer)
    printed = capsys.readouterr().out
    assert printed.count("\033[33m") >= 3  # a guess, in yellow
    last = printed.rsplit("\033[J", 1)[1]
    assert last.strip() == tokenizer.decode(tokens[0]).strip()


# --------------------------------------------------------------------------------------------------
# How many guesses, and from where
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("sureness", [1, 4])
def test_useless_guesses_cost_little(device, batch_size, sureness):
    """By its own model of time: at most 2% and the first balance."""
    for num_right in (0, 1):
        length, time, num_positions = DraftLength(batch_size, device), 0.0, 0
        while num_positions < 1000:
            m = length.choose(8, sureness)
            right = min(num_right, m) if num_positions % 17 == 0 else 0
            length.observe(m, right, sureness)
            num_positions += right + 1
            time += length.steps_of_pass(m)
            assert time <= 1.02 * num_positions + length.FIRST_BALANCE


@pytest.mark.parametrize("sureness", [2, ASSISTED])
def test_good_guesses_are_taken_up_even_late(sureness):
    """A lookup is watched while no pass takes it along; an assistant is tried now and then."""
    length = DraftLength(1, "cpu")

    def take(is_right):
        m = length.choose(8, sureness)
        seen = is_right if sureness != ASSISTED and not m else None
        length.observe(m, m * is_right, sureness, seen)
        return m * is_right + 1

    for _ in range(300):
        take(False)

    num_passes, num_positions = 0, 0
    while num_positions < 300:
        num_positions += take(True)
        num_passes += 1

    assert num_passes < 120


def test_guesses_that_no_pass_takes_along_are_learned_from():
    length = DraftLength(1, "cpu")
    assert length.choose(8, 8) > 0
    for _ in range(60):
        length.observe(0, 0, 8, would_be_right=False)

    assert length.balance == pytest.approx(
        length.FIRST_BALANCE + 60 * 0.02
    )  # earned without a guess
    assert length.choose(8, 8) == length.wanted == 0
    for _ in range(60):
        length.observe(0, 0, 8, would_be_right=True)

    assert length.choose(8, 8) == length.wanted == 8


def test_a_missed_draft_makes_room_for_one_like_it():
    length = DraftLength(1, "cpu")
    length.balance = 0.0
    assert length.choose(8, 8) == 0 and length.wanted == 8
    length.regret(8, 0)
    assert length.choose(8, 8) == 0
    length.regret(8, 8)
    assert length.choose(8, 8) == 8


class LateProphet(Prophet):
    """Always wrong up to some place, and never behind it."""

    def propose(self, texts, num_tokens):
        self.share_wrong = max(len(text) < 60 for text in texts.values())
        return super().propose(texts, num_tokens)


@pytest.mark.parametrize("num_rows", [1, 3])
def test_text_that_repeats_late_is_taken_up(monkeypatch, num_rows):
    """The passes without a guess earn the room for one, and show that it would be right."""
    model = separated(make(STACKS["mix-d"], max_position_embeddings=128))
    noise = torch.randn(num_rows, 120, 2, dtype=torch.float64)
    expected = generate(model, noise=noise)
    prophet = LateProphet(expected.sequences, 1.0)
    monkeypatch.setattr(drafts_tarflowlm, "PromptLookup", lambda *_: prophet)
    monkeypatch.setattr(DraftLength, "TIMES", {"cpu": (0.45, 0.01)})  # of a row, in batches too
    out = generate(model, noise=noise, **LOOKUP)
    assert torch.equal(out.sequences, expected.sequences)
    num_final = out.inverse_reports[0].num_final
    assert sum(num_final) == 120 and len(num_final) < 60 + 30 and 7 in num_final


def test_lookup_is_the_librarys_with_its_sureness():
    lookup = PromptLookup(4, 3)
    assert lookup.propose({2: [1, 2, 3, 4, 5, 1, 2, 3]}, 4) == ({2: [4, 5, 1, 2]}, 3)
    texts = {0: [9, 2, 3, 4, 5, 1, 2, 3], 1: [7, 7]}
    assert lookup.propose(texts, 4) == ({0: [4, 5, 1, 2], 1: [7]}, 1)
    assert lookup.propose({0: [1, 2, 3]}, 4) == ({0: []}, 0)
    assert lookup.propose({0: [1]}, 4) == ({0: []}, 0)

    # The longest match by default, not the first of two tokens.
    text = [8, 1, 2, 9, 7, 1, 2, 3, 7, 1, 2]
    assert PromptLookup(1).propose({0: text}, 1) == ({0: [3]}, 3)
    assert PromptLookup(1, 2).propose({0: text}, 1) == ({0: [9]}, 2)


# --------------------------------------------------------------------------------------------------
# Assistants
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def assistants(llama):
    """The model itself, one like it, its source, and models that have little to do with it."""
    alike = from_causal_lm(tiny_causal_lm("llama"))
    with torch.no_grad():
        for parameter in alike.flow.layers[0].parameters():
            parameter.add_(0.001 * torch.randn_like(parameter))

    return {
        "itself": llama,
        "alike": alike,
        "its source": tiny_causal_lm("llama"),
        "another": from_causal_lm(tiny_causal_lm("gpt2", seed=3), latent_size=12),
        "another of the library": tiny_causal_lm("mistral", seed=3),
    }


@pytest.mark.parametrize(
    "name", ["itself", "alike", "its source", "another", "another of the library"]
)
@pytest.mark.parametrize("option", ["temperature", "top_p", "repetition", "sampled tokens", "end"])
def test_assistants_change_no_token(every_guess, llama, assistants, name, option):
    options = {"inputs": repeating(2)[:, :4], "max_new_tokens": 20, **OPTIONS[option]}
    expected = generate(llama, **options)
    actual = generate(llama, **options, assistant_model=assistants[name], num_assistant_tokens=5)
    assert torch.equal(actual.sequences, expected.sequences)
    assert actual.inverse_reports[0].method == "drafts"


@pytest.mark.parametrize("name", ["itself", "its source", "alike"])
@pytest.mark.parametrize("options", [{}, {"top_k": 8}, {"temperature": 0.5}, {"do_sample": False}])
def test_the_same_noise_picks_the_same_tokens(every_guess, llama, assistants, name, options):
    """A model is its own best assistant, and its source as good; one like it nearly so."""
    options = {"inputs": repeating()[:, :3], "max_new_tokens": 24, "eos_token_id": -1, **options}
    assistant = {"assistant_model": assistants[name], "num_assistant_tokens": 5}
    report = generate(llama, **options, **assistant).inverse_reports[0]
    if name == "alike":
        assert report.iterations <= 8
    else:
        assert report.num_final == [3, 6, 6, 6, 6]


def test_other_flows_have_assistants_too(every_guess):
    """Patches, a first flow that is no mixture over the codebook, and no prompt."""
    small = make(STACKS["mix-d"])
    for flows, patch_size in (("mix-d", 2), ("affine", 1), ("mix-d, mix-1, mix-1", 1)):
        model = make(STACKS[flows], patch_size, seed=1)
        for options in ({}, {"inputs": torch.tensor([[1, 2, 3, 4]])}):
            options = {**options, "max_new_tokens": 12}
            expected = generate(model, **options)
            actual = generate(model, **options, assistant_model=small, num_assistant_tokens=4)
            assert torch.equal(actual.sequences, expected.sequences)


def test_the_number_of_tokens_is_the_assistants_own_by_default(every_guess, llama, monkeypatch):
    source = tiny_causal_lm("llama")
    monkeypatch.setattr(source.generation_config, "num_assistant_tokens", 3)
    options = {"inputs": repeating()[:, :3], "max_new_tokens": 12, "eos_token_id": -1}
    report = generate(llama, **options, assistant_model=source).inverse_reports[0]
    assert report.num_final == [3, 4, 4, 4]


@pytest.mark.parametrize(
    ("make_assistant", "message"),
    [
        (lambda: "a name", "must be a model of the library, not 'a name'"),
        (
            lambda: tiny_causal_lm("llama").model,
            "assistant_model, a LlamaModel, is no causal language model",
        ),
        (
            lambda: make(STACKS["mix-d"]),
            "TarFlowLMModel, has a vocabulary of 5 tokens, the model, a TarFlowLMModel, one of 96",
        ),
        (lambda: make(STACKS["affine"], vocab_size=VOCABULARY), "no logits of the next token"),
    ],
    ids=["a string", "no head", "vocabulary", "no logits"],
)
def test_assistants_that_do_not_go_with_the_model(llama, make_assistant, message):
    with pytest.raises(ValueError, match=message):
        llama.generate(max_new_tokens=4, assistant_model=make_assistant())


# --------------------------------------------------------------------------------------------------
# What is refused
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_lookup_num_tokens": -1}, "prompt_lookup_num_tokens must be an integer"),
        ({"prompt_lookup_num_tokens": 2.5}, "prompt_lookup_num_tokens must be an integer"),
        ({"max_matching_ngram_size": 0, **LOOKUP}, "max_matching_ngram_size must be an integer"),
        ({"num_assistant_tokens": 0, **LOOKUP}, "num_assistant_tokens must be an integer"),
        ({"assistant_model": tiny_causal_lm("llama"), **LOOKUP}, "give one of them"),
        ({"synced_gpus": True, **LOOKUP}, "synced_gpus needs as many passes"),
        (
            {"inverse_method": "parallel", **LOOKUP},
            'leave out capture_step, and inverse_method="par',
        ),
        ({"capture_step": True, **LOOKUP}, "leave out capture_step"),
    ],
)
def test_options_that_contradict(llama, options, message):
    with pytest.raises(ValueError, match=message):
        llama.generate(max_new_tokens=4, **options)


def test_flows_that_cannot_be_drafted():
    with pytest.raises(ValueError, match="run left to right, not right_to_left"):
        make([flow("affine", "right_to_left")]).generate(**LOOKUP)
    with pytest.raises(ValueError, match="less than a patch, of patch_size 2"):
        make([flow("affine")], patch_size=2).generate(prompt_lookup_num_tokens=1)
