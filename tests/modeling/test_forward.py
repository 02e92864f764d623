"""`forward` as its callers use it: trainers, collators, wrappers, evaluation loops."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorForLanguageModeling,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_pt_utils import LabelSmoother

from helpers.models import STACKS, flow, make
from tarflow_hf.data import character_tokenizer
from tarflow_hf.modeling.evaluation_noise import fixed_noise


def ids_of(*shape, seed=0):
    return torch.randint(5, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model():
    return make(STACKS["mix-d, mix-1, mix-1"])


# ---------------------------------------------------------------------------------- what is taken


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": True},
        {"use_cache": False},
        {"return_dict": True},
        {"output_attentions": False},
        {"output_hidden_states": False},
        {"inputs_embeds": None},
        {"position_ids": torch.arange(8).expand(2, -1)},
        {"num_items_in_batch": 16},
        {"logits_to_keep": 0},
        {"token_type_ids": torch.zeros(2, 8, dtype=torch.long)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_changes_nothing_is_taken(model, options):
    ids = ids_of(2, 8)
    expected, out = model(ids, labels=ids), model(ids, labels=ids, **options)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-12, atol=0)
    assert torch.equal(out.elbo, expected.elbo) and out.keys() == expected.keys()


def test_positions_of_padded_rows_and_of_packed_ones(model):
    ids, mask = ids_of(2, 8), torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    expected = model(ids, mask).elbo
    assert torch.equal(model(ids, mask, position_ids=positions).elbo, expected)
    with pytest.raises(ValueError, match="packed into one row"):
        model(ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]))


def test_what_would_be_ignored_is_refused(model):
    for name, value in {"output_attentions": True, "inputs_embeds": torch.zeros(2, 8, 2)}.items():
        with pytest.raises(TypeError, match=rf"no arguments \['{name}'\]"):
            model(ids_of(2, 8), **{name: value})


def test_tuples_and_hidden_states_by_the_configuration():
    model, ids = make(STACKS["mix-d"]), ids_of(2, 8)
    model.config.output_hidden_states = True
    assert len(model(ids).hidden_states) == 2
    assert model(ids, output_hidden_states=False).hidden_states is None

    model.config.return_dict = False
    assert isinstance(model(ids), tuple)
    assert not isinstance(model(ids, return_dict=True), tuple)


def test_tuples_and_hidden_states(model):
    ids = ids_of(2, 8)
    out = model(ids, labels=ids, output_hidden_states=True)
    assert len(out.hidden_states) == 4 and torch.equal(out.hidden_states[0], out.latents)
    assert torch.equal(out.hidden_states[-1], out.noise)
    loss, elbo, *_ = model(ids, labels=ids, return_dict=False)
    torch.testing.assert_close((loss, elbo), (out.loss, out.elbo))


def test_logits_of_the_next_token_are_the_weights_of_its_mixture():
    model, ids = make(STACKS["mix-d"]), ids_of(2, 8)
    out = model(ids)
    logits = out.logits
    assert logits.shape == (2, 8, 5) and torch.equal(out["logits"], logits) and "logits" not in out

    # log p(z_t | z_<t) of all but the first, summed by hand.
    codebook = model.codebook()
    components = codebook.log_prob_all(out.latents[:, 1:])
    log_prob = torch.logsumexp(logits[:, :-1].log_softmax(-1) + components, -1).sum(-1)
    first = model.flow(out.latents[:, :1], output_noise=False).log_prob
    torch.testing.assert_close(first + log_prob, out.prior_log_prob)

    stack = make(STACKS["mix-d, mix-1, mix-1"])(ids)
    assert not hasattr(stack, "logits")
    with pytest.raises(AttributeError, match="only a model that is one mixture_rosenblatt flow"):
        _ = stack.logits


@pytest.mark.parametrize("stack", ["mix-d", "mix-d, mix-1, mix-1", "affine"])
def test_outputs_are_pickled_without_the_model(stack):
    model, ids = make(STACKS[stack]), ids_of(2, 8)
    with torch.no_grad():
        out = model(ids, num_items_in_batch=16)
    content = pickle.dumps(out)
    again = pickle.loads(content)
    assert list(again) == list(out) and type(again) is type(out)
    assert all(torch.equal(again[name], out[name]) for name in [*out, "logits"])
    assert hasattr(again, "logits") == hasattr(out, "logits")
    assert pickle.loads(pickle.dumps(again)).keys() == out.keys()
    assert len(content) < len(pickle.dumps(model.flow.layers[0]))


# --------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize("patch_size", [1, 2])
def test_labels_of_a_conditional_model_say_what_is_observed(patch_size):
    model = make(STACKS["mix-d, mix-1, mix-1"], patch_size, conditional=True)
    ids, mask = ids_of(3, 8), torch.ones(3, 8, dtype=torch.long)
    mask[1, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, :4] = labels[1, :2] = labels[2, 4:6] = -100
    observed = (labels == -100) & (mask == 1)
    noise = torch.randn(3, 8, 2)
    out = model(ids, mask, labels=labels, latent_noise=noise)
    expected = model(ids, mask, labels=ids, latent_noise=noise, observed_mask=observed)
    assert torch.equal(out.loss, expected.loss)
    torch.testing.assert_close(
        model(ids, mask, labels=ids.clone(), latent_noise=noise).elbo,
        model(ids, mask, latent_noise=noise).elbo,
    )
    with pytest.raises(ValueError, match="nothing of it is left to model"):
        model(ids, labels=torch.full_like(ids, -100))


@pytest.mark.parametrize("conditional", [False, True])
def test_an_end_token_that_is_padding_too_counts_where_it_is_real(conditional):
    model = make(STACKS["mix-d"], conditional=conditional, pad_token_id=4, eos_token_id=4)
    ids = torch.tensor([[1, 2, 4, 3, 4], [1, 4, 4, 4, 4]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    out = model(ids, mask, labels=ids.masked_fill(ids == 4, -100))
    torch.testing.assert_close(out.loss, model(ids, mask, labels=ids).loss)
    torch.testing.assert_close(out.elbo, model(ids, mask).elbo)
    with pytest.raises(ValueError, match="labels must equal"):
        make(STACKS["mix-d"], pad_token_id=4)(ids, mask, labels=ids.masked_fill(ids == 2, -100))


def test_every_weight_takes_part():
    model, ids = make(STACKS["mix-d, mix-1, mix-1"], conditional=True), ids_of(2, 8)
    for labels in (ids, ids.clone()):
        model.zero_grad()
        model(ids, labels=labels).loss.backward()
        assert [name for name, p in model.named_parameters() if p.grad is None] == []


# ------------------------------------------------------------------------------------ accumulation

ROWS = [torch.randint(5, (n,), generator=torch.Generator().manual_seed(n)) for n in (16, 4, 5, 6)]


def collate(rows):
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = (torch.arange(ids.shape[1]) < torch.tensor([[len(row)] for row in rows])).long()
    noise = torch.zeros(*ids.shape, 2, dtype=torch.float64)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.masked_fill(mask == 0, -100),
        "latent_noise": noise,
    }


def gradient(model, num_parts, tmp_path):
    model, seen = copy.deepcopy(model), []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, *args, model=None, **kwargs):
            seen.append(torch.cat([p.grad.flatten() for p in model.parameters()]).clone())

    class InOrder(Trainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(ROWS)

    arguments = TrainingArguments(
        tmp_path,
        max_steps=1,
        per_device_train_batch_size=4 // num_parts,
        gradient_accumulation_steps=num_parts,
        max_grad_norm=0,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = InOrder(
        model, arguments, train_dataset=ROWS, data_collator=collate, callbacks=[Look()]
    )
    loss = trainer.train().training_loss
    return seen[0], loss


@pytest.mark.parametrize("num_parts", [2, 4])
def test_accumulated_gradients_are_those_of_the_whole_batch(num_parts, tmp_path):
    model = make(STACKS["mix-d, mix-1, mix-1"])
    whole, whole_loss = gradient(model, 1, tmp_path)
    parts, parts_loss = gradient(model, num_parts, tmp_path)
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-12)
    batch = collate(ROWS)
    assert whole_loss == pytest.approx(model(**batch).loss.item(), rel=1e-6)
    assert parts_loss == pytest.approx(whole_loss, rel=1e-6)


# -------------------------------------------------------------------------------------- evaluation


def test_fixed_noise_is_normal_and_independent():
    ids = torch.arange(4000).view(40, 100)
    noise = torch.stack([fixed_noise(ids, 5, index=index) for index in range(4)]).double()
    assert abs(noise.mean()) < 0.01 and abs(noise.var() - 1) < 0.01
    assert abs((noise**4).mean() - 3) < 0.1 and noise.abs().max() < 5.4
    flat = noise.flatten(1)
    assert (torch.corrcoef(flat) - torch.eye(4)).abs().max() < 0.03
    assert (
        torch.corrcoef(torch.stack([noise[0, :, :-1].flatten(), noise[0, :, 1:].flatten()]))[
            0, 1
        ].abs()
        < 0.03
    )
    assert len(noise.unique()) > 0.99 * noise.numel()


def test_a_row_is_scored_alike_in_any_batch_and_touches_no_generator():
    model, state = make(STACKS["mix-d, mix-1, mix-1"]), torch.get_rng_state()
    ids = ids_of(3, 8)
    together = model(ids).elbo
    for row in range(3):
        padded = torch.nn.functional.pad(ids[row : row + 1], (0, 4))
        mask = (torch.arange(12) < 8)[None]
        torch.testing.assert_close(model(ids[row : row + 1]).elbo, together[row : row + 1])
        torch.testing.assert_close(model(padded, mask).elbo, together[row : row + 1])

    bound = model.importance_weighted_bound(ids, num_samples=4)
    assert torch.equal(bound, model.importance_weighted_bound(ids, num_samples=4))
    assert not torch.equal(model.importance_weighted_bound(ids, num_samples=1), bound)
    assert torch.equal(state, torch.get_rng_state())

    model.train()
    assert not torch.equal(model(ids).elbo, model(ids).elbo)


def test_the_seed_of_an_evaluations_loader_is_taken_back():
    model, ids = make(STACKS["mix-d"]).train(), ids_of(2, 8)
    state = torch.get_rng_state()
    model.eval()
    for batch in DataLoader(ids, batch_size=1):
        model(batch)
    model.train()
    assert torch.equal(torch.get_rng_state(), state)


def test_what_others_draw_is_left_alone():
    model, ids = make(STACKS["mix-d"]), ids_of(2, 8)
    for draw in (lambda: torch.randn(40), lambda: torch.rand(2), lambda: list(DataLoader(ids))):
        model.eval()
        model(ids)
        draw()
        model(ids)
        state = torch.get_rng_state()
        model.train()
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("dropout", "evaluation"),
    [
        (0.0, {"eval_strategy": "steps", "eval_steps": 1}),
        (0.2, {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True}),
        (0.0, {"eval_strategy": "epoch"}),
        (0.0, {}),
    ],
    ids=["steps", "dropout", "epochs", "before"],
)
def test_training_goes_on_as_if_nobody_had_evaluated(dropout, evaluation, tmp_path):
    rows = [{"input_ids": row, "labels": row.clone()} for row in ids_of(16, 8)]

    def losses(is_first_evaluated=False, **options):
        set_seed(0)
        model = make([flow("mixture_rosenblatt")])
        for layer in model.flow.layers[0].decoder.layers:
            layer.self_attn.attention_dropout = dropout

        arguments = TrainingArguments(
            tmp_path, num_train_epochs=2, per_device_train_batch_size=8, logging_steps=1, report_to=[],
            save_strategy="no", use_cpu=True, disable_tqdm=True, **options,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:4])
        if is_first_evaluated:
            trainer.evaluate()

        trainer.train()
        evaluated = [trainer.evaluate()["eval_loss"] for _ in range(2)]
        return [x["loss"] for x in trainer.state.log_history if "loss" in x], evaluated

    plain, evaluated = losses()
    watched, _ = losses(is_first_evaluated=not evaluation, **evaluation)
    assert plain == watched and len(plain) == 4 and evaluated[0] == evaluated[1]


# ------------------------------------------------------------------------------ the library's tools


def test_generation_inside_a_trainer(tmp_path):
    rows = [{"input_ids": row, "labels": row.clone()} for row in ids_of(4, 8)]
    arguments = Seq2SeqTrainingArguments(
        tmp_path, predict_with_generate=True, generation_max_length=12, report_to=[], use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    model = make(STACKS["mix-d"], pad_token_id=0).float()
    out = Seq2SeqTrainer(model, arguments).predict(rows)
    assert (out.predictions[:, :8] == ids_of(4, 8).numpy()).all()
    assert (out.predictions[:, 12:] == 0).all()  # the trainer's own padding
    assert out.metrics["test_loss"] > 0


@pytest.mark.parametrize("stack", ["mix-d", "mix-d, mix-1, mix-1"])
def test_predictions_of_a_trainer_are_the_bounds(stack, tmp_path):
    rows = [{"input_ids": row, "labels": row.clone()} for row in ids_of(6, 8)]
    model = make(STACKS[stack]).float().eval()
    seen = []

    def compute_metrics(evaluation):
        seen.append(evaluation)
        return {"bits": -evaluation.predictions.sum() / evaluation.label_ids.size / math.log(2)}

    arguments = TrainingArguments(
        tmp_path, per_device_eval_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, eval_dataset=rows, compute_metrics=compute_metrics)
    metrics = trainer.evaluate()
    assert seen[0].predictions.shape == (6,)
    assert metrics["eval_bits"] == pytest.approx(metrics["eval_loss"] / math.log(2), rel=1e-5)
    with torch.no_grad():
        bounds = model(ids_of(6, 8)).elbo

    np.testing.assert_allclose(trainer.predict(rows).predictions, bounds, rtol=1e-5)


def test_collators_that_pad_with_the_end_token(tmp_path):
    tokenizer = character_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    tokenizer.pad_token = tokenizer.eos_token
    model = make(STACKS["mix-d"], vocab_size=28, pad_token_id=27, eos_token_id=27).float()
    rows = [tokenizer(text) for text in ("the list</s>", "a</s>")]
    batch = DataCollatorForLanguageModeling(tokenizer, mlm=False)(rows)
    assert (batch["labels"][batch["attention_mask"] == 1] == -100).sum() == 2
    assert model(**batch).loss.isfinite()


# ------------------------------------------------------------------- options of the library's Trainer


def rows_of(count):
    return [{"input_ids": row, "labels": row} for row in ids_of(count, 8)]


def train_once(model, folder, **options):
    arguments = TrainingArguments(
        folder, max_steps=1, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
        per_device_train_batch_size=4, logging_steps=1, learning_rate=1e-3, **options,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows_of(4), eval_dataset=rows_of(4))
    trainer.train()
    return trainer


@pytest.mark.parametrize("stack", ["affine", "mix-d", "mix-d, mix-1, mix-1"])
@pytest.mark.parametrize("is_padded", [False, True])
def test_smoothed_labels(stack, is_padded):
    """Without smoothing the loss is the model's own; with it, each token's share is pulled from 1."""
    model, ids = make(STACKS[stack]), ids_of(3, 8)
    mask = torch.ones_like(ids)
    if is_padded:
        mask[0, 5:] = 0

    labels = ids.masked_fill(mask == 0, -100)
    noise = torch.zeros(3, 8, 2, dtype=torch.float64)
    options = {"attention_mask": mask, "latent_noise": noise}
    expected = model(ids, labels=labels, **options)
    loss = expected.loss.detach()
    num_items = (labels != -100).sum()
    output = model(ids, num_items_in_batch=num_items, **options)
    plain = LabelSmoother(epsilon=0.0)(output, labels, num_items_in_batch=num_items)
    torch.testing.assert_close(plain, loss, rtol=1e-9, atol=0)

    share = (expected.elbo / mask.sum(-1)).exp()
    other = torch.log((1 - share) / 4)  # of each of the four other tokens
    mean = (share.log() + 4 * other) / 5
    smooth = -(mean * mask.sum(-1)).sum() / num_items
    found = LabelSmoother(epsilon=0.1)(output, labels, num_items_in_batch=num_items)
    # The library smooths in float32.
    torch.testing.assert_close(found, 0.9 * loss + 0.1 * smooth, rtol=1e-6, atol=0)
    found.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_logits_of_the_next_token_stay_what_they_are():
    model, ids = make(STACKS["mix-d"]), ids_of(3, 8)
    expected = model(ids)
    output = model(ids, num_items_in_batch=24)
    assert torch.equal(output.logits, expected.logits)
    assert torch.equal(expected["logits"], expected.logits)


def test_noise_on_embeddings_changes_what_is_read_in_training_only(tmp_path):
    model, ids = make(STACKS["mix-d, mix-1, mix-1"]).float(), ids_of(4, 8)
    noise = torch.zeros(4, 8, 2)
    seen = []
    decoder = model.flow.layers[0].decoder
    decoder.register_forward_hook(
        lambda module, args, kwargs, out: seen.append(kwargs["inputs_embeds"].detach().clone()),
        with_kwargs=True,
    )
    train_once(copy.deepcopy(model), tmp_path / "plain")
    train_once(copy.deepcopy(model), tmp_path / "noisy", neftune_noise_alpha=5.0)
    largest = 5.0 / math.sqrt(8 * model.config.hidden_size)
    difference = (seen[1] - seen[0]).abs()
    assert 0.5 * largest < difference.max() <= largest * 1.001

    trainer = train_once(model, tmp_path / "again", neftune_noise_alpha=5.0)
    assert not hasattr(model.get_input_embeddings(), "neftune_noise_alpha")
    losses = [trainer.evaluate()["eval_loss"] for _ in range(2)]
    assert losses[0] == losses[1]
    assert torch.equal(model(ids, latent_noise=noise).elbo, model(ids, latent_noise=noise).elbo)
    assert model.get_input_embeddings().weight is model.codebook.mean


@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2},
        {"include_num_input_tokens_seen": "all"},
        {"train_sampling_strategy": "group_by_length"},
        {"eval_strategy": "steps", "eval_steps": 1, "include_for_metrics": ["inputs", "loss"]},
        {"gradient_checkpointing": True, "max_grad_norm": 0.5, "optim": "adafactor"},
        {"bf16": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_of_a_trainer(options, tmp_path):
    model = make(STACKS["mix-d, mix-1, mix-1"]).float()
    before = copy.deepcopy(model.state_dict())
    trainer = train_once(model, tmp_path, **options)
    assert any(not torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(x.isfinite().all() for x in model.state_dict().values())
    assert trainer.evaluate()["eval_loss"] > 0
