"""docs/ecosystem.md has a row for each habit of the library, and a test behind each row."""

import copy
import re

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
    TorchAoConfig,
    pipeline,
)

from helpers import ROOT
from helpers.checkpoints import MIX_1, MIX_D, assert_same_output, assert_same_state, make, observe
from helpers.models import flow
from tarflow_hf.data import character_tokenizer
from tarflow_hf.training import recompute_activations

FLOWS = [MIX_D, MIX_1]


def ids_and_latents():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(27, (2, 8), generator=generator), torch.randn(2, 8, 2, generator=generator)


def loss_and_gradients(model, function=None):
    """Returns the loss at given latents, and the gradient of every trained parameter."""
    ids, latents = ids_and_latents()
    model.zero_grad()
    loss = (model if function is None else function)(
        input_ids=ids, labels=ids, latents=latents
    ).loss
    loss.backward()

    return loss.detach(), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model, and the folder that it is saved in."""
    folder = tmp_path_factory.mktemp("ecosystem") / "model"
    model = make(flows=FLOWS)
    model.save_pretrained(folder)
    return model, folder


def test_every_row_names_tests_that_exist():
    rows = re.findall(r"^\| .*$", (ROOT / "docs" / "ecosystem.md").read_text(), re.MULTILINE)
    rows = [row for row in rows if not row.startswith("| what")]
    assert len(rows) >= 20

    for row in rows:
        names = re.findall(r"`([\w/]+\.py)::(test_\w+)`", row)
        assert names, f"no test in {row}"
        for file, name in names:
            assert f"def {name}(" in (ROOT / "tests" / file).read_text(), name


# ------------------------------------------------------------------------------------------ loading


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 0.15), (torch.float16, 0.03)], ids=str
)
def test_half_precision_weights(saved, dtype, tolerance):
    model, folder = saved
    ids, latents = ids_and_latents()
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert {half.dtype, half.codebook.mean.dtype} == {dtype, torch.float32}
    out, exact = half(ids, labels=ids, latents=latents), model(ids, labels=ids, latents=latents)
    assert out.elbo.dtype == torch.float32
    torch.testing.assert_close(out.loss, exact.loss, atol=tolerance, rtol=0)  # nats per token
    out.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in half.parameters())
    assert half.generate(noise=latents).shape == (2, 8)


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
@torch.no_grad()  # flex attention has no gradients on a CPU
def test_attention_implementations(saved, implementation):
    model, folder = saved
    other = AutoModel.from_pretrained(folder, attn_implementation=implementation)
    assert {layer.decoder.config._attn_implementation for layer in other.flow.layers} == {
        implementation
    }
    with torch.compiler.set_stance("force_eager"):  # compiling flex attention takes long on a CPU
        assert_same_output(other, observe(model))


def test_device_map_spreads_whole_flows_over_memory_and_disk(tmp_path):
    model = make(flows=[*FLOWS, MIX_1])
    model.save_pretrained(tmp_path / "model")
    sizes = [sum(p.nbytes for p in layer.parameters()) for layer in model.flow.layers]
    memory = {
        "cpu": int(1.1 * (sizes[0] + max(sizes)))
    }  # for the first, and to bring any of the others there
    other = AutoModel.from_pretrained(
        tmp_path / "model", device_map="auto", max_memory=memory, offload_folder=tmp_path / "disk"
    )
    devices = other.hf_device_map
    assert {f"flow.layers.{i}": devices[f"flow.layers.{i}"] for i in range(3)} == {
        "flow.layers.0": "cpu",
        "flow.layers.1": "disk",
        "flow.layers.2": "disk",
    }
    assert_same_output(other, observe(model))


# -------------------------------------------------------------------------------------- compilation


@pytest.mark.parametrize(
    "options",
    [
        {"flows": FLOWS},
        {
            "flows": [{**MIX_D, "patch_head_layers": 1}, flow("affine", "right_to_left")],
            "patch_size": 2,
        },
    ],
    ids=["mix-d, mix-1", "patches, affine"],
)
def test_a_training_step_compiles_without_a_graph_break(options):
    model = make(**options).train()
    torch._dynamo.reset()
    compiled = torch.compile(
        model, backend="aot_eager", fullgraph=True
    )  # which makes of a break an error
    for a, b in zip(loss_and_gradients(model, compiled), loss_and_gradients(model), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_compiled_model_takes_every_length():
    model = make(flows=[MIX_D])
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)

    for length in (4, 8, 6):
        ids = torch.randint(27, (2, length))
        torch.manual_seed(0)
        elbo = compiled(ids).elbo
        torch.manual_seed(0)
        torch.testing.assert_close(elbo, model(ids).elbo)


# --------------------------------------------------------------------------------------------- PEFT


@pytest.mark.parametrize(
    "target_modules", [["q_proj", "v_proj"], "all-linear"], ids=["attention", "all linear maps"]
)
def test_lora_is_trained_saved_loaded_and_merged(saved, target_modules, tmp_path):
    peft = pytest.importorskip("peft")
    model, folder = saved
    base = AutoModelForCausalLM.from_pretrained(folder)
    adapted = peft.get_peft_model(
        base, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=target_modules)
    )
    weights = {
        name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad
    }
    assert weights and all("lora" in name for name in weights)
    assert sum("flow.layers.1" in name for name in weights) >= 4  # every flow has some
    optimizer = torch.optim.Adam(weights.values(), lr=0.02)
    losses = []

    for _ in range(6):
        losses.append(loss_and_gradients(adapted)[0])
        optimizer.step()

    assert losses[-1] < losses[0] - 0.05
    adapted.eval()
    expected = observe(adapted)
    assert (expected["elbo"] - observe(model)["elbo"]).abs().max() > 0.1

    adapted.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert_same_output(loaded, expected)
    assert_same_output(
        AutoModelForCausalLM.from_pretrained(tmp_path / "adapter"), expected
    )  # the library's own door
    merged = loaded.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModel.from_pretrained(tmp_path / "merged")
    assert_same_state(again.state_dict(), merged.state_dict())
    assert_same_output(again, expected)


def test_gradient_checkpointing_of_an_adapted_model_changes_no_gradient():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        make(flows=FLOWS), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    ).train()
    _, expected = loss_and_gradients(model)
    recompute_activations(model)
    model.enable_input_require_grads()  # as Trainer does
    _, gradients = loss_and_gradients(model)
    torch.testing.assert_close(gradients, expected)
    assert len(expected) == 8 and max(gradient.abs().max() for gradient in expected.values()) > 0


def test_forward_takes_what_says_nothing_and_refuses_the_rest(saved):
    model, _ = saved
    ids, latents = ids_and_latents()
    expected = model(ids, latents=latents).elbo
    assert torch.equal(
        model(ids, latents=latents, inputs_embeds=None, return_dict=None).elbo, expected
    )
    with pytest.raises(TypeError, match=r"no arguments \['inputs_embeds'\]"):
        model(ids, inputs_embeds=latents)


# ------------------------------------------------------------------------------------- quantisation


def quantised_linears(model):
    return {
        name
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear8bitLt", "Linear4bit")
    }


@pytest.mark.parametrize(("bits", "tolerance"), [(8, 0.002), (4, 0.01)])
def test_bitsandbytes(bits, tolerance, tmp_path):
    pytest.importorskip("bitsandbytes")
    folder = ROOT / "checkpoints" / "python-docs"
    model = AutoModel.from_pretrained(folder)
    config = BitsAndBytesConfig(
        **{f"load_in_{bits}bit": True}, llm_int8_skip_modules=[".*head", ".*projection"]
    )
    quantised = AutoModel.from_pretrained(folder, quantization_config=config)

    # Seven in each block of Llama, in all flows, and none elsewhere: what parametrises a coupling
    # stays as it is.
    assert len(quantised_linears(quantised)) == 7 * model.config.num_hidden_layers
    assert all(".decoder." in name for name in quantised_linears(quantised))
    assert quantised.get_memory_footprint() < model.get_memory_footprint()
    quantised.save_pretrained(tmp_path / "quantised")
    again = AutoModel.from_pretrained(tmp_path / "quantised")
    assert quantised_linears(again) == quantised_linears(quantised)

    text = "the function returns a list of strings that the module defines"
    ids = character_tokenizer()(text, return_tensors="pt").input_ids
    loss, expected = (each(ids, labels=ids).loss for each in (quantised, model))
    assert 0 < abs(loss - expected) < tolerance, loss - expected  # nats per token
    assert_same_output(again, observe(quantised))


@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_torchao(kind, tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    folder = ROOT / "checkpoints" / "python-docs"
    model = AutoModel.from_pretrained(folder)
    config = TorchAoConfig(getattr(quantization, kind)())
    quantised = AutoModel.from_pretrained(folder, quantization_config=config)
    linears = [each for each in quantised.modules() if isinstance(each, torch.nn.Linear)]
    assert len(linears) > 7 * model.config.num_hidden_layers  # the projections, too
    assert all(type(each.weight.data).__name__ == "Int8Tensor" for each in linears)

    text = "the function returns a list of strings that the module defines"
    ids = character_tokenizer()(text, return_tensors="pt").input_ids
    noise = torch.randn(1, 40, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss, expected = (each(ids, labels=ids).loss for each in (quantised, model))
        written = quantised.generate(noise=noise)

    assert 0 < abs(loss - expected) < 0.005, loss - expected  # nats per token
    assert (written == model.generate(noise=noise)).float().mean() > 0.8

    quantised.save_pretrained(tmp_path / "quantised")
    again = AutoModel.from_pretrained(tmp_path / "quantised")
    assert_same_output(again, observe(quantised))
    assert torch.equal(again.generate(noise=noise), written)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_dynamic_quantisation():
    model = make(seed=1, flows=FLOWS)
    quantised = copy.deepcopy(model)
    for layer in quantised.flow.layers:
        layer.decoder = torch.ao.quantization.quantize_dynamic(
            layer.decoder, {torch.nn.Linear}, dtype=torch.qint8
        )

    names = [
        type(module).__module__
        for module in quantised.modules()
        if type(module).__name__ == "Linear"
    ]
    assert sum("quantized.dynamic" in name for name in names) == 14
    actual, expected = observe(quantised), observe(model)
    torch.testing.assert_close(actual["elbo"] / 8, expected["elbo"] / 8, atol=0.3, rtol=0)
    assert (actual["elbo"] != expected["elbo"]).all()


# ------------------------------------------------------------------------- what does not fit a flow


def test_the_vocabulary_cannot_shrink(saved):
    with pytest.raises(ValueError, match="cannot shrink to 20"):
        saved[0].resize_token_embeddings(20)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"guidance_scale": 1.5},
        {"output_scores": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_generation_by_next_token_distributions_is_refused(saved, options):
    model, option = copy.deepcopy(saved[0]), next(iter(options))
    with pytest.raises(ValueError, match=rf"no options \['{option}'\]"):
        model.generate(max_new_tokens=4, **options)

    config = GenerationConfig(max_new_tokens=4, **options)
    with pytest.raises(ValueError, match=rf"no options \['{option}'\]"):
        model.generate(generation_config=config)

    model.generation_config = config
    with pytest.raises(ValueError, match=rf"no options \['{option}'\]"):
        model.generate()


def test_a_base_model_has_no_chat_template(saved):
    write = pipeline("text-generation", model=saved[0], tokenizer=character_tokenizer())
    with pytest.raises(ValueError, match="chat_template is not set"):
        write([{"role": "user", "content": "hello"}], max_new_tokens=4)
