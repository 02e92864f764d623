"""The library's options of `generate`: processors, stopping criteria, and what is refused."""

import itertools

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation import LogitsProcessor, StoppingCriteria

from helpers.models import STACKS, flow, make, separated
from helpers.streaming import Recorder
from tarflow_hf.data import character_tokenizer

IN_ORDER = ["mix-d", "mix-d, mix-1, mix-1", "mix-1"]
BACKWARDS = "mix-1, right to left, posterior"


def noise_of(model, rows=3, length=18, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, length, model.config.latent_size, generator=generator)


def first_flow_steps(model, **options):
    """The output of generate, and the number of slots that the first flow's decoder read."""
    steps = []
    decoder = model.flow.layers[0].decoder
    handle = decoder.register_forward_hook(
        lambda module, args, kwargs, out: steps.append(kwargs["inputs_embeds"].shape[1]),
        with_kwargs=True,
    )
    try:
        return model.generate(**options), sum(steps)
    finally:
        handle.remove()


# ------------------------------------------------------------------------------------ ends of texts


@pytest.mark.parametrize("eos_token_id", [2, [2, 3], torch.tensor(2), torch.tensor([3, 2])])
@pytest.mark.parametrize("stack", [*IN_ORDER, BACKWARDS])
def test_a_token_ends_the_work(stack, eos_token_id):
    model = make(STACKS[stack])
    noise = noise_of(model, rows=4)
    free = model.generate(noise=noise)
    tokens, steps = first_flow_steps(
        model, noise=noise, eos_token_id=eos_token_id, pad_token_id=1, inverse_method="sequential"
    )

    is_end = torch.isin(free, torch.as_tensor(eos_token_id))
    ends = [int(row.nonzero()[0]) + 1 if row.any() else len(row) for row in is_end]
    assert tokens.shape[1] == max(ends) < free.shape[1]
    for row, free_row, end in zip(tokens, free, ends, strict=True):
        assert torch.equal(row[:end], free_row[:end]) and (row[end:] == 1).all()

    assert steps == (free.shape[1] if stack == BACKWARDS else max(ends))


@pytest.mark.parametrize("method", ["sequential", "parallel"])
@pytest.mark.parametrize("capture_step", [False, True])
def test_every_inverse_stops(method, capture_step):
    model = make(STACKS["mix-d, mix-1, mix-1"])
    options = {"noise": noise_of(model), "inverse_method": method, "capture_step": capture_step}
    free = model.generate(**options)
    out = model.generate(**options, eos_token_id=free[:, 4].tolist(), output_inverse_report=True)
    num_tokens = out.sequences.shape[1]
    assert num_tokens <= 5 and torch.equal(out.sequences[:, :1], free[:, :1])
    assert sum(out.inverse_reports[0].num_final) < 18 and (out.latents[:, 17] == 0).all()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("stack", [*IN_ORDER, "mix-d, mix-1 right to left within a patch"])
def test_each_prompt_of_a_batch_ends_where_it_ends_alone(stack, conditional, side):
    patch_size = 2 if "patch" in stack else 1
    model = make(STACKS[stack], patch_size, conditional=conditional)
    prompts = [torch.tensor(ids) for ids in ([2, 1, 3, 4], [3, 2], [1, 1, 4, 2, 0, 3])]
    noise = noise_of(model, length=16)

    ids, mask = torch.zeros(3, 6, dtype=torch.long), torch.zeros(3, 6, dtype=torch.long)
    aligned = noise.clone()  # a prompt's noise stands at its tokens
    for row, prompt in enumerate(prompts):
        places = torch.arange(len(prompt)) + (6 - len(prompt) if side == "left" else 0)
        ids[row, places], mask[row, places] = prompt, 1
        aligned[row, places] = noise[row, 6 - len(prompt) : 6]

    options = {"eos_token_id": [0, 2, 3], "pad_token_id": 4}
    together = model.generate(ids, attention_mask=mask, noise=aligned, **options)
    some_end = False
    for row, prompt in enumerate(prompts):
        alone = model.generate(
            prompt[None], noise=noise[row : row + 1, 6 - len(prompt) :], **options
        )
        new = alone[0, len(prompt) :]
        assert torch.equal(together[row, 6 : 6 + len(new)], new)
        assert (together[row, 6 + len(new) :] == 4).all()
        some_end |= len(new) < 10

    assert some_end and together.shape[1] <= 16


@pytest.mark.parametrize("stack", [*IN_ORDER, BACKWARDS])
def test_strings_end_a_text(stack):
    tokenizer = character_tokenizer()
    model = separated(STACKS[stack])
    noise = noise_of(model, length=32)
    free = model.generate(noise=noise)
    text = tokenizer.decode(free[0])
    stop = [text[9:11], "not in there"]
    streamer = Recorder()
    tokens = model.generate(
        noise=noise[:1], tokenizer=tokenizer, stop_strings=stop, streamer=streamer
    )

    assert tokenizer.decode(tokens[0]) == text[: text.index(stop[0]) + 2]
    assert list(itertools.chain(*streamer.parts)) == tokens[0].tolist() and streamer.ended

    # A prompt that has the string already does not end before it begins.
    prompt = free[:1, :12]
    if stack != BACKWARDS:
        again = model.generate(prompt, noise=noise[:1], tokenizer=tokenizer, stop_strings=stop[0])
        assert again.shape[1] > 12 and stop[0] in tokenizer.decode(again[0])

    saved = GenerationConfig(stop_strings=stop)
    again = model.generate(noise=noise[:1], tokenizer=tokenizer, generation_config=saved)
    assert torch.equal(again, tokens)
    with pytest.raises(ValueError, match="give the tokenizer"):
        model.generate(noise=noise, stop_strings=stop)


class AfterTokens(StoppingCriteria):
    def __init__(self, number):
        self.number, self.seen = number, []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids.clone())
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.number)


def test_criteria_of_ones_own_and_the_clock():
    model = make(STACKS["mix-d"])
    noise, criterion = noise_of(model), AfterTokens(7)
    tokens, steps = first_flow_steps(model, noise=noise, stopping_criteria=[criterion])
    assert steps == 7 and torch.equal(tokens, model.generate(noise=noise)[:, :7])
    assert all(torch.equal(seen, tokens[:, : n + 1]) for n, seen in enumerate(criterion.seen))
    assert model.generate(noise=noise, max_time=1e-9).shape == (3, 1)
    assert model.generate(noise=noise, max_time=1e9).shape == (3, 18)
    assert model.generate(noise=noise, synced_gpus=True, eos_token_id=[0, 1, 2, 3, 4]).shape == (
        3,
        1,
    )


@pytest.mark.parametrize("stack", IN_ORDER)
def test_the_cut_changes_no_sampled_token(stack):
    """Decoded tokens are drawn from numbers of their own, so a streamer or an end changes none."""
    model, generator = make(STACKS[stack]), torch.Generator()
    options = {"noise": noise_of(model, rows=1), "decode": "sample", "generator": generator}
    free, *others = (
        model.generate(**options, **more)
        for more in ({}, {"streamer": Recorder()}, {"stopping_criteria": [AfterTokens(9)]})
        if generator.manual_seed(3)
    )
    assert torch.equal(others[0], free) and torch.equal(others[1], free[:, :9])


def test_candidates_are_cut_after_the_choice():
    model, generator = make(STACKS["mix-d"]), torch.Generator()
    options = {"num_candidates": 4, "generator": generator}
    free = model.generate(**options) if generator.manual_seed(1) else None
    cut = (
        model.generate(**options, eos_token_id=int(free[0, 5]))
        if generator.manual_seed(1)
        else None
    )
    assert cut.shape[1] <= 6 and torch.equal(cut, free[:, : cut.shape[1]])


# ------------------------------------------------------------------------- logits of the next token

PROCESSED = {
    "bad_words_ids": [[2], [1, 3]],
    "suppress_tokens": [0, 4],
    "repetition_penalty": 5.0,
    "no_repeat_ngram_size": 2,
    "min_new_tokens": 6,
    "min_length": 8,
    "sequence_bias": [[[1], 3.0]],
    "begin_suppress_tokens": [1, 2, 3],
    "forced_eos_token_id": 4,
    "exponential_decay_length_penalty": (2, 1.5),
}


def violations(option, tokens, prompt_length=0):
    """The number of places at which the tokens (T,) contradict an option of PROCESSED."""
    tokens, new = tokens.tolist(), tokens.tolist()[prompt_length:]
    pairs = list(itertools.pairwise(tokens))
    return {
        "bad_words_ids": new.count(2) + pairs[max(prompt_length - 1, 0) :].count((1, 3)),
        "suppress_tokens": new.count(0) + new.count(4),
        "no_repeat_ngram_size": len(pairs) - len(set(pairs)),
        "min_new_tokens": new[:6].count(2),
        "min_length": tokens[prompt_length:8].count(2),
        "begin_suppress_tokens": sum(token in (1, 2, 3) for token in new[:1]),
        "forced_eos_token_id": int(new[-1] != 4 and 2 not in new),
    }.get(option, 0)


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("option", PROCESSED)
def test_processors_act_and_each_prompt_is_processed_as_alone(option, conditional):
    model = make(STACKS["mix-d, mix-1, mix-1"], conditional=conditional)
    options = {option: PROCESSED[option], "eos_token_id": 2, "pad_token_id": 0}
    if option in ("repetition_penalty", "no_repeat_ngram_size", "sequence_bias", "bad_words_ids"):
        options["eos_token_id"] = None

    if option == "no_repeat_ngram_size":
        options["max_new_tokens"] = 10

    length = 15 if option == "no_repeat_ngram_size" else 18
    prompts = [torch.tensor([3, 2, 4, 1]), torch.tensor([1])]
    ids, mask = torch.tensor([[3, 2, 4, 1], [0, 0, 0, 1]]), torch.tensor([[1] * 4, [0, 0, 0, 1]])
    noise = noise_of(model, rows=2, length=length - 1)
    together = model.generate(ids, attention_mask=mask, noise=noise, **options)
    changed = free_violations = 0

    for row, prompt in enumerate(prompts):
        start = 4 - len(prompt)
        alone = model.generate(prompt[None], noise=noise[row : row + 1, start:], **options)[0]
        assert torch.equal(together[row, start : start + len(alone)], alone)
        assert violations(option, alone, len(prompt)) == 0

        plain = {"eos_token_id": options["eos_token_id"], "pad_token_id": 0}
        free = model.generate(prompt[None], noise=noise[row : row + 1, start:], **plain)[0]
        free_violations += violations(option, free, len(prompt))
        changed += len(free) != len(alone) or not torch.equal(free, alone)

    assert changed or free_violations == 0


class Watch(LogitsProcessor):
    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append((input_ids.clone(), scores.clone()))
        return scores


def test_a_processor_reads_what_was_written_and_the_weights_of_the_mixture():
    model, watch = make(STACKS["mix-d"]), Watch()
    noise = noise_of(model)
    out = model.generate(
        noise=noise, logits_processor=[watch], repetition_penalty=1.5, return_dict_in_generate=True
    )
    assert len(watch.seen) == 18
    for n, (ids, _) in enumerate(watch.seen):
        assert torch.equal(ids, out.sequences[:, :n])

    # The weights, before the penalty, are those of the head at the latents that came out.
    layer, codebook = model.flow.layers[0], model.codebook()
    context = layer.context(layer.inputs(out.latents, codebook))
    (weight, bias), *_ = layer.head.projection()
    logits = torch.nn.functional.linear(context, weight, bias)
    torch.testing.assert_close(watch.seen[0][1], logits[:, 0], atol=1e-10, rtol=0)


def test_allowed_tokens_and_neutral_processors():
    model = make(STACKS["mix-d"])
    noise = noise_of(model, rows=2)
    allowed = [[0, 1], [3]]
    tokens = model.generate(noise=noise, prefix_allowed_tokens_fn=lambda row, ids: allowed[row])
    assert set(tokens[0].tolist()) <= {0, 1} and set(tokens[1].tolist()) == {3}
    assert torch.equal(
        model.generate(noise=noise, logits_processor=[Watch()]), model.generate(noise=noise)
    )


def test_gaps_are_processed():
    for conditional in (False, True):
        model = make(STACKS["mix-d"], conditional=conditional)
        ids = torch.randint(5, (2, 12), generator=torch.Generator().manual_seed(0))
        gaps = torch.zeros(2, 12, dtype=torch.long)
        gaps[0, 2:7] = gaps[1, 5:11] = 1
        watch = Watch()
        tokens = model.generate(
            ids, infill_mask=gaps, bad_words_ids=[[2], [3]], logits_processor=[watch]
        )
        assert torch.equal(tokens[gaps == 0], ids[gaps == 0])
        assert not torch.isin(tokens[gaps == 1], torch.tensor([2, 3])).any()
        for before, _ in watch.seen:
            place = before.shape[1]
            if gaps[:, place].any():  # at known tokens nothing is written
                assert all(any(torch.equal(x, row[:place]) for row in tokens) for x in before)


def test_small_weights_are_left_out():
    model = separated([flow("mixture_rosenblatt")])
    noise = noise_of(model, length=32)
    assert torch.equal(model.generate(noise=noise, min_p=1.0), model.generate(noise=noise, top_k=1))
    for option in ({"typical_p": 0.2}, {"epsilon_cutoff": 0.2}, {"eta_cutoff": 0.5}):
        assert not torch.equal(model.generate(noise=noise, **option), model.generate(noise=noise))


# --------------------------------------------------------------------------- taken, and not taken

REFUSED = {
    "num_beams": 2,
    "penalty_alpha": 0.6,
    "guidance_scale": 1.5,
    "output_scores": True,
    "output_hidden_states": True,
    "output_attentions": True,
    "remove_invalid_values": True,
    "encoder_repetition_penalty": 1.5,
    "diversity_penalty": 0.5,
    "length_penalty": 2.0,
}


@pytest.mark.parametrize("option", REFUSED)
def test_the_same_error_wherever_an_option_comes_from(option):
    model = make(STACKS["mix-d"])
    given = {option: REFUSED[option]}
    with pytest.raises(ValueError, match=option) as keyword:
        model.generate(max_new_tokens=4, **given)

    config = GenerationConfig(max_new_tokens=4)
    setattr(config, option, REFUSED[option])
    with pytest.raises(ValueError) as in_config:
        model.generate(generation_config=config)

    model.generation_config = config
    with pytest.raises(ValueError) as saved:
        model.generate()

    assert str(keyword.value) == str(in_config.value) == str(saved.value)


@pytest.mark.parametrize("option", PROCESSED)
def test_logits_options_need_logits(option):
    for flows, patch_size in (
        (STACKS["affine"], 1),
        (STACKS["mix-d, own codebook"], 1),
        (STACKS["mix-d"], 2),
    ):
        model = make(flows, patch_size)
        given = {option: PROCESSED[option]}
        for options in (given, {"generation_config": GenerationConfig(**given)}):
            with pytest.raises(ValueError, match=f"{option} process the logits of the next token"):
                model.generate(eos_token_id=2, **options)


def test_options_that_contradict_the_way_it_is_done():
    model = make(STACKS["mix-d"])
    ids, gaps = torch.zeros(1, 4, dtype=torch.long), torch.tensor([[0, 1, 1, 0]])
    cases = [
        ({"bad_words_ids": [[1]], "inverse_method": "parallel"}, "read what was written"),
        ({"bad_words_ids": [[1]], "capture_step": True}, "read what was written"),
        ({"max_time": 1.0, "num_candidates": 2}, "max_time stops"),
        ({"input_ids": ids, "infill_mask": gaps, "max_time": 1.0}, "keeps its length"),
        ({"input_ids": ids, "infill_mask": gaps, "min_new_tokens": 1}, "keeps its length"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": -1.0}, "penalty"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            model.generate(**options)

    with pytest.raises(ValueError, match="max_time stops"):
        make(STACKS[BACKWARDS]).generate(max_time=1.0)


NEUTRAL = {
    "num_beams": 1, "stopping_criteria": None, "logits_processor": None, "repetition_penalty": 1.0,
    "synced_gpus": False, "min_p": 0.0, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
    "guidance_scale": 1.0, "penalty_alpha": 0.0, "no_repeat_ngram_size": 0, "min_new_tokens": 0,
    "min_length": 0, "bad_words_ids": None, "assistant_model": None, "prompt_lookup_num_tokens": 0,
    "num_beam_groups": 1, "diversity_penalty": 0.0, "length_penalty": 1.0, "early_stopping": False,
    "use_cache": True, "output_scores": False, "output_attentions": False, "tokenizer": None,
    "stop_strings": None, "max_time": None, "remove_invalid_values": False, "labels": torch.ones(2, 3),
    "encoder_no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1.0, "negative_prompt_ids": None,
    "trust_remote_code": False, "custom_generate": None, "suppress_tokens": None,
}  # fmt: skip


@pytest.mark.parametrize("option", NEUTRAL)
def test_what_asks_for_nothing_is_taken(option):
    model = make(STACKS["affine"])
    noise, value = noise_of(model), NEUTRAL[option]
    expected = model.generate(noise=noise)
    assert torch.equal(model.generate(noise=noise, **{option: value}), expected)
    if hasattr(GenerationConfig(), option):
        config = GenerationConfig(**{option: value})
        assert torch.equal(model.generate(noise=noise, generation_config=config), expected)
        model.generation_config = config
        assert torch.equal(model.generate(noise=noise), expected)
