"""Causal language models become flows and come back, exactly or with a reason."""

import contextlib
import io
import re
import runpy
import string
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from tokenizers import Tokenizer, decoders, models, processors
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    TextIteratorStreamer,
    pipeline,
)

from helpers import ROOT
from helpers.causal_lms import CAUSAL_LMS, TIED, VOCABULARY, tiny_causal_lm
from helpers.checkpoints import MIX_1, MIX_D, make
from tarflow_hf import TarFlowLMModel
from tarflow_hf.conversion import (
    append_flow,
    from_causal_lm,
    next_token_log_probs,
    probe,
    to_causal_lm,
)
from tarflow_hf.hub import nats_per_token

pytestmark = pytest.mark.usefixtures("one_thread")

START = 1
BOTH = [(name, {}) for name in CAUSAL_LMS] + [
    (name, TIED) for name in ("llama", "gemma", "granite", "cohere", "opt", "phi3")
]


def draw_ids(batch_size=2, length=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch_size, length), generator=generator)


def with_start(ids):
    return torch.cat([torch.full_like(ids[:, :1], START), ids], 1)


def nats(source, ids):
    """The source's log-likelihood (B,) of ids behind the start token, in nats."""
    with torch.no_grad():
        log_prob = source(with_start(ids)).logits[:, :-1].log_softmax(-1)

    return log_prob.gather(-1, ids.unsqueeze(-1)).sum((-1, -2))


@pytest.fixture(scope="module")
def llama():
    return tiny_causal_lm("llama", **TIED)


# --------------------------------------------------------------------------------------------------
# Exactness, of each architecture
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), BOTH, ids=lambda value: value or "untied")
def test_there_and_back_is_exact(name, options):
    source = tiny_causal_lm(name, **options)
    ids = draw_ids()
    with torch.no_grad():
        logits = source(with_start(ids)).logits
        assert logits.log_softmax(-1).std() > 0.1  # a model with something to get wrong

    model = from_causal_lm(source)
    with torch.no_grad():
        log_prob = next_token_log_probs(model, ids)
        torch.testing.assert_close(log_prob, logits[:, :-1].log_softmax(-1), rtol=0, atol=1e-3)
        elbo = model(ids).elbo

    torch.testing.assert_close(elbo / 12, nats(source, ids) / 12, rtol=0, atol=1e-4)

    back = to_causal_lm(model)
    assert type(back) is type(source)
    with torch.no_grad():
        torch.testing.assert_close(back(with_start(ids)).logits, logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma3_text"])
def test_a_left_padded_batch_is_continued_as_each_prompt_alone(name):
    model = from_causal_lm(tiny_causal_lm(name))
    prompts = draw_ids()[:, :6]
    mask = torch.ones_like(prompts)
    mask[0, :3] = 0
    noise = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(0))
    together = model.generate(prompts, attention_mask=mask, noise=noise)
    first = model.generate(prompts[:1, 3:], noise=noise[:1, 3:])
    second = model.generate(prompts[1:], noise=noise[1:])
    for row, alone in ((together[:1, 3:], first), (together[1:], second)):
        assert torch.equal(row[:, : alone.shape[1]], alone)  # which ends where its text does
        assert (row[:, alone.shape[1] :] == 0).all()


def left_padded(ids):
    """Ids whose rows are of different lengths, and their mask, with padding on the left."""
    lengths = torch.tensor([ids.shape[1] - 5, ids.shape[1]])
    mask = (torch.arange(ids.shape[1]) >= ids.shape[1] - lengths[:, None]).long()
    return ids.masked_fill(mask == 0, 77), mask, lengths.tolist()


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma3_text", "mixtral"])
def test_a_left_padded_batch_is_scored_as_each_row_alone(name):
    source = tiny_causal_lm(name)
    model = from_causal_lm(source)
    model = model if name == "mixtral" else model.double()  # whose experts have no float64
    ids, mask, lengths = left_padded(draw_ids())
    output = model(ids, mask, labels=ids.masked_fill(mask == 0, -100))
    log_prob = next_token_log_probs(model, ids, mask)
    logits = output.logits.log_softmax(-1)
    total = 0.0

    for row, length in enumerate(lengths):
        alone = ids[row : row + 1, -length:]
        own = model(alone)
        torch.testing.assert_close(output.elbo[row], own.elbo[0])
        torch.testing.assert_close(output.latents[row, -length:], own.latents[0])
        torch.testing.assert_close(log_prob[row, -length:], next_token_log_probs(model, alone)[0])
        torch.testing.assert_close(logits[row, -length:], own.logits[0].log_softmax(-1))

        expected = nats(source, alone)
        torch.testing.assert_close(output.elbo[row].float() / length, expected[0] / length)
        total += own.elbo[0]

    torch.testing.assert_close(output.loss, -total / sum(lengths))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    assert torch.equal(model(ids, mask, position_ids=positions).elbo, output.elbo)
    with pytest.raises(ValueError, match="position_ids"):
        model(ids, mask, position_ids=positions + 1)


@torch.no_grad()
def test_a_left_padded_stack_is_its_rows_alone_both_ways():
    model = make(flows=[MIX_D, MIX_1, {**MIX_1, "direction": "left_to_right"}], conditional=True)
    model = model.double().eval()
    ids, mask, lengths = left_padded(torch.randint(5, (2, 8)))
    ids = ids.clamp(max=4)
    latents = model.encode(ids)
    observed = torch.zeros_like(ids, dtype=torch.bool)
    observed[:, -2:-1] = True

    for options in ({}, {"observed_ids": ids, "observed_mask": observed}):
        flow = model.flow(latents, mask, **options)
        back = model.flow(flow.noise, mask, reverse=True, **options).latents
        assert (flow.noise[mask == 0] == 0).all()
        for row, length in enumerate(lengths):
            own_options = {key: value[row : row + 1, -length:] for key, value in options.items()}
            own = model.flow(latents[row : row + 1, -length:], **own_options)
            torch.testing.assert_close(flow.noise[row, -length:], own.noise[0])
            torch.testing.assert_close(flow.log_prob[row], own.log_prob[0])
            is_missing = ~observed[row, -length:] if options else slice(None)
            expected = latents[row, -length:][is_missing]
            torch.testing.assert_close(back[row, -length:][is_missing], expected)


def test_a_refused_source_keeps_its_modes(llama):
    source = tiny_causal_lm("llama").train()
    source.model.layers[0].eval()
    modes = [part.training for part in source.modules()]
    for options in ({"start_token_id": VOCABULARY}, {"latent_size": 1}, {}):
        with pytest.raises(ValueError) if options else contextlib.nullcontext():
            from_causal_lm(source, **options)

        assert [part.training for part in source.modules()] == modes


def test_the_sources_dtype_stays(llama):
    source = tiny_causal_lm("llama", torch.bfloat16)
    model = from_causal_lm(source)
    dtypes = {name: weight.dtype for name, weight in model.named_parameters()}
    assert {dtypes[name] for name in dtypes if "codebook" in name} == {torch.float32}
    assert {dtypes[name] for name in dtypes if "codebook" not in name} == {torch.bfloat16}
    assert source.dtype == torch.bfloat16 and model.dtype == torch.bfloat16

    found = probe(source, model, draw_ids())
    assert found.elbo_nats == pytest.approx(found.source_nats, abs=1e-2)
    back = to_causal_lm(model)
    assert back.dtype == torch.bfloat16
    assert torch.equal(back(draw_ids()).logits, source(draw_ids()).logits)


def test_a_source_as_short_as_the_probe():
    """It has room for the start token and one token less than the probe has."""
    source = tiny_causal_lm("gpt2", n_positions=32)
    model = from_causal_lm(source)
    assert model.config.max_position_embeddings == 32
    ids = draw_ids()[:, :8]
    start = torch.full_like(ids[:, :1], model.config.start_token_id)
    expected = source(torch.cat([start, ids], 1), labels=torch.cat([start, ids], 1)).loss
    torch.testing.assert_close(model(ids, labels=ids).loss, expected, rtol=1e-4, atol=1e-4)
    assert from_causal_lm(tiny_causal_lm("gpt2", n_positions=9)).config.vocab_size == VOCABULARY


# --------------------------------------------------------------------------------------------------
# What is refused
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_source_whose_buffers_were_rounded_is_refused(dtype):
    """Its rotary embeddings turn otherwise, the more the further from the first token."""
    with pytest.raises(
        ValueError, match=r"buffer rotary_emb.inv_freq .* Load the source with dtype"
    ):
        from_causal_lm(tiny_causal_lm("llama").to(dtype))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_position_embeddings": 0}, "max_position_embeddings"),
        ({"dtype": torch.float64}, "LlamaForCausalLM is loaded already"),
        ({"gguf_file": "x.gguf"}, "LlamaForCausalLM is loaded already"),
        ({"start_token_id": "a"}, "start_token_id must be in 0"),
        ({"source": torch.nn.Linear(2, 2)}, "source must be a causal language model"),
        ({"source": 3}, "source must be a causal language model"),
    ],
)
def test_arguments_that_say_nothing_are_refused(llama, options, message):
    with pytest.raises(ValueError, match=message):
        from_causal_lm(**{"source": llama, **options})


def refused(name, **options):
    if name == "t5":
        sizes = {"d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 32}
        return AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **sizes))
    if name == "bert":
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        sizes |= {"vocab_size": 32, "intermediate_size": 16, **options}
        config = AutoConfig.for_model("bert", **sizes)
        return AutoModelForCausalLM.from_config(config)
    if name == "llama's body":
        return AutoModel.from_config(tiny_causal_lm("llama").config)

    return tiny_causal_lm(name, **options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gemma2", {}, "soft"),
        ("t5", {}, "encoder-decoder"),
        ("bert", {}, "is not causal"),
        ("bert", {"is_decoder": True}, "decoder's output"),
        ("llama's body", {}, "base model"),
    ],
)
def test_what_a_flow_does_not_express_is_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        from_causal_lm(refused(name, **options), start_token_id=START)


def test_a_codebook_that_overlaps_is_refused(llama):
    with pytest.raises(ValueError, match=r"codebook overlaps: latent_size=1 .* larger latent_size"):
        from_causal_lm(llama, latent_size=1)
    with pytest.raises(ValueError, match=r"smaller log_scale"):
        from_causal_lm(llama, latent_size=2, log_scale=-1.0)

    assert from_causal_lm(llama, latent_size=4, log_scale=-5.0).config.latent_size == 4


def test_a_source_is_as_long_as_its_rotary_embeddings_stay_the_same():
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 8.0}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    options = {"rope_parameters": rope, "original_max_position_embeddings": 16}
    model = from_causal_lm(tiny_causal_lm("phi3", **options))
    assert model.config.max_position_embeddings == 15

    ids = draw_ids(length=15)
    assert torch.equal(model.generate(noise=model.noise_of(ids)), ids)


def test_a_start_token_is_found_given_or_missed():
    source = tiny_causal_lm("llama", bos_token_id=None, eos_token_id=7)
    source.generation_config.bos_token_id = None
    assert from_causal_lm(source).config.start_token_id == 7
    assert from_causal_lm(source, start_token_id=9).config.start_token_id == 9

    source.config.eos_token_id = source.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="start_token_id"):
        from_causal_lm(source)
    with pytest.raises(ValueError, match=r"0, \.\.\., 95"):
        from_causal_lm(source, start_token_id=VOCABULARY)


def test_models_that_are_no_causal_language_models_do_not_go_back(llama):
    with pytest.raises(ValueError, match=r"No causal language model .*conditional=True"):
        to_causal_lm(from_causal_lm(llama, conditional=True))
    with pytest.raises(ValueError, match="flows above the first, and a learned start"):
        to_causal_lm(make(flows=[MIX_D, {**MIX_D, "num_components": 4}]))
    with pytest.raises(ValueError, match="patches"):
        to_causal_lm(make(flows=[MIX_D], patch_size=2))

    model = from_causal_lm(llama)
    with torch.no_grad():
        model.codebook.log_scale.fill_(0.0)
    with pytest.raises(ValueError, match="codebook overlaps"):
        to_causal_lm(model)


# --------------------------------------------------------------------------------------------------
# Flows above
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    ("options", "conditional"),
    [
        ({"coupling": "affine"}, False),
        ({"coupling": "mixture_cdf"}, True),
        ({"coupling": "mixture_cdf", "autoregressive": False}, False),
    ],
)
def test_a_flow_above_leaves_the_model_what_it_was(options, conditional, llama, tmp_path):
    model = from_causal_lm(llama, conditional=conditional)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    ids = draw_ids(4)
    elbo = model(ids).elbo

    flow = {"direction": "right_to_left", "num_hidden_layers": 1, **options}
    assert append_flow(model, flow) is model and len(model.config.flows) == 2
    for name, weight in before.items():
        assert torch.equal(model.state_dict()[name], weight), name

    assert torch.equal(model(ids, num_flows=1).elbo, elbo)
    largest = 1e-4 if options["coupling"] == "affine" else 0.03  # nats a token
    assert ((model(ids).elbo - elbo) / 12).abs().max() < largest
    assert_tied(model)

    if conditional:
        first, second = (layer.observed_embedding for layer in model.flow.layers)
        assert torch.equal(first.embedding.weight, second.embedding.weight)

    latents = model.encode(ids)
    noise = model.flow(latents).noise
    torch.testing.assert_close(model.flow(noise, reverse=True).latents, latents, rtol=0, atol=1e-3)

    model.save_pretrained(tmp_path)
    loaded = TarFlowLMModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).elbo, model(ids).elbo)


def test_a_flow_above_has_its_models_dtype_and_mode(llama):
    model = from_causal_lm(tiny_causal_lm("qwen3", torch.bfloat16)).train()
    append_flow(model, MIX_1)
    dtypes = {weight.dtype for weight in model.flow.layers[1].parameters()}
    assert dtypes == {torch.bfloat16} and model.flow.layers[1].decoder.training
    assert type(model.flow.layers[1].decoder) is type(model.flow.layers[0].decoder)

    own = {"coupling": "mixture_rosenblatt", "num_hidden_layers": 1, "num_components": 6}
    append_flow(model, {**own, "direction": "right_to_left", "tie_codebook": False})
    layer = model.flow.layers[2]
    dtypes = {name: weight.dtype for name, weight in layer.named_parameters()}
    kept = {name for name in dtypes if name.startswith("head.codebook")}
    assert {dtypes.pop(name) for name in kept} == {torch.float32} and len(kept) == 2
    assert set(dtypes.values()) == {torch.bfloat16}
    for name, buffer in layer.decoder.named_buffers():  # the frequencies of rotary embeddings
        expected = model.flow.layers[0].decoder.get_buffer(name)
        assert buffer.dtype == expected.dtype == torch.float32 and torch.equal(buffer, expected)

    flows = model.config.flows
    with pytest.raises(ValueError, match=r"flows\[3\].context must be latent"):
        append_flow(model, {**MIX_1, "context": "posterior"})

    assert model.config.flows == flows and len(model.flow.layers) == 3


# --------------------------------------------------------------------------------------------------
# Tied tables
# --------------------------------------------------------------------------------------------------


def assert_tied(model):
    flow = model.flow.layers[0]
    assert flow.embedding is flow.head.projection.weight


@pytest.mark.parametrize("name", ["llama", "gemma", "cohere"])
def test_tied_tables_stay_tied(name, tmp_path):
    source = tiny_causal_lm(name, **TIED)
    model = from_causal_lm(source)
    num_added = model.codebook.mean.numel() + model.codebook.log_scale.numel()
    assert model.num_parameters() == source.num_parameters() + num_added
    assert_tied(model)

    ids = draw_ids()
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    assert_tied(model.eval())

    model.save_pretrained(tmp_path)
    loaded = TarFlowLMModel.from_pretrained(tmp_path)
    assert_tied(loaded)
    assert loaded.num_parameters() == model.num_parameters()
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size < 4 * model.num_parameters() + 20_000

    latents = model.encode(ids)
    torch.testing.assert_close(
        loaded(ids, latents=latents).elbo, model(ids, latents=latents).elbo, rtol=0, atol=1e-4
    )
    torch.testing.assert_close(
        to_causal_lm(loaded)(with_start(ids)).logits[:, :-1].log_softmax(-1),
        next_token_log_probs(model, ids),
        rtol=0,
        atol=1e-4,
    )


def test_untied_tables_stay_apart():
    source = tiny_causal_lm("llama")
    model = from_causal_lm(source)
    num_added = model.codebook.mean.numel() + model.codebook.log_scale.numel()
    assert model.num_parameters() == source.num_parameters() + num_added


# --------------------------------------------------------------------------------------------------
# The script
# --------------------------------------------------------------------------------------------------

TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"


@pytest.fixture(scope="module")
def source_folder(tmp_path_factory):
    """A folder with a source that ties its tables, its tokenizer, a chat template and a licence."""
    folder = tmp_path_factory.mktemp("source") / "tiny-llama"
    alphabet = [f"<{n}>" for n in range(3)] + sorted(string.printable[:93])
    backend = Tokenizer(models.BPE(vocab={token: n for n, token in enumerate(alphabet)}, merges=[]))
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(
        single="<1> $A", special_tokens=[("<1>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<1>", eos_token="<2>", pad_token="<0>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)

    source = tiny_causal_lm("llama", torch.bfloat16, **TIED)
    source.generation_config.update(
        do_sample=True, temperature=0.5, top_k=20, repetition_penalty=1.1, num_beams=1
    )
    source.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    return folder


@pytest.fixture(scope="module")
def converted(source_folder, tmp_path_factory):
    """The folder that the script writes, and what it prints."""
    output = tmp_path_factory.mktemp("converted") / "out"
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", ["convert.py", str(source_folder), str(output)])
        runpy.run_path(str(ROOT / "examples" / "convert.py"), run_name="__main__")

    return output, printed.getvalue()


def test_the_script_prints_the_probe(converted):
    found = re.match(
        r"source (\S+) nats a token, minus ELBO (\S+); .* closest means (\S+) scales", converted[1]
    )
    source, elbo, closest = map(float, found.groups())
    assert source == pytest.approx(elbo, abs=1e-2) and closest > 12


def test_the_script_brings_all_that_belongs_to_a_model(converted):
    folder = converted[0]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = TarFlowLMModel.from_pretrained(folder)
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer("ab").input_ids == tokenizer("ab", add_special_tokens=False).input_ids

    options = model.generation_config
    assert (options.eos_token_id, options.pad_token_id) == (2, 0)
    assert (options.mixture_temperature, options.top_k, options.repetition_penalty) == (
        0.5,
        20,
        1.1,
    )
    assert options.temperature == 1.0

    assert model.dtype == torch.bfloat16 and model.codebook.mean.dtype == torch.float32
    assert_tied(model)

    card = ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.base_model) == ("mit", "tiny-llama")
    assert "Every text begins behind token 1" in card.text

    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], return_tensors="pt", return_dict=True
    )
    tokens = model.generate(**chat, max_new_tokens=4)
    assert torch.equal(tokens[:, : chat["input_ids"].shape[1]], chat["input_ids"])


def test_a_converted_model_chats_in_a_pipeline(converted):
    """Alone, in a batch and through a streamer: the answer is that of `generate`."""
    model, tokenizer = (
        each.from_pretrained(converted[0]) for each in (AutoModelForCausalLM, AutoTokenizer)
    )
    write = pipeline("text-generation", model=str(converted[0]), tokenizer=tokenizer)
    chats = [[{"role": "user", "content": text}] for text in ("hi", "a longer question")]
    options = {"max_new_tokens": 6, "do_sample": False}
    answers = []
    for chat in chats:
        inputs = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        tokens = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
        answers.append(
            {"role": "assistant", "content": tokenizer.decode(tokens, skip_special_tokens=True)}
        )

    assert all(answer["content"] for answer in answers)
    assert [write(chat, **options)[0]["generated_text"] for chat in chats] == [
        [*chat, answer] for chat, answer in zip(chats, answers, strict=True)
    ]
    together = write(chats, batch_size=2, **options)
    assert [each[0]["generated_text"][-1] for each in together] == answers

    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    write(chats[1], streamer=streamer, **options)
    assert "".join(streamer) == answers[1]["content"]


def test_what_the_script_writes_needs_transformers_and_torch_only(converted, clean_room):
    model = TarFlowLMModel.from_pretrained(converted[0]).eval()
    tokenizer = AutoTokenizer.from_pretrained(converted[0])
    expected = nats_per_token(model, tokenizer, "a text")
    found = clean_room.nats_per_token(str(converted[0]), "a text")
    assert found == pytest.approx(expected, abs=1e-5)


def test_a_folder_is_a_source_and_brings_its_tokenizer(source_folder):
    model = from_causal_lm(source_folder)
    assert model.dtype == torch.bfloat16 and model.config.start_token_id == 1
    assert from_causal_lm(str(source_folder), dtype=torch.float32).dtype == torch.float32


def test_noise_of_the_same_seed_has_other_numbers_than_the_codebook(llama):
    """A codebook drawn by the seed itself would begin the noise of `manual_seed(seed)`."""
    for seed in (0, 7):
        means = from_causal_lm(llama, seed=seed).codebook.mean
        noise = torch.randn(means.shape, generator=torch.Generator().manual_seed(seed))
        assert (means - noise).abs().amin() > 0 and (means[0] - noise[0]).norm() > 1
