"""TRL's trainers on a small model: SFT as it is documented, and why not DPO."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, Trainer

from helpers import ROOT
from helpers.models import STACKS, separated

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = ["the list", "a dict of strings", "returns a list", "the class"]
PARTS = {
    "prompt": ["the ", "a dict ", "returns ", "the "],
    "completion": ["list", "of strings", "a list", "class"],
}


class FlowTrainer(trl.SFTTrainer):
    """The model's own loss, not one that TRL makes of the last hidden states."""

    compute_loss = Trainer.compute_loss


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "checkpoints" / "python-docs")


def fresh(**options):
    ends = {"vocab_size": 28, "pad_token_id": 27, "eos_token_id": 27}
    return separated(STACKS["mix-d, mix-1, mix-1"], **ends, **options)


def train(trainer, config, folder, model, tokenizer, data, **options):
    arguments = config(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2,
        logging_steps=1, report_to=[], use_cpu=True, bf16=False, save_strategy="no", max_length=24,
        disable_tqdm=True, **options,
    )  # fmt: skip
    data = Dataset.from_dict({name: column * 4 for name, column in data.items()})
    trainer = trainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("data", "options"),
    [
        ({"text": TEXTS}, {}),
        ({"text": TEXTS}, {"packing": True, "packing_strategy": "wrapped"}),
        (PARTS, {"completion_only_loss": False}),
    ],
    ids=["text", "packing", "prompt and completion as one text"],
)
def test_supervised_fine_tuning(data, options, tokenizer, tmp_path):
    model = fresh()
    trainer = train(FlowTrainer, trl.SFTConfig, tmp_path, model, tokenizer, data, **options)
    logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(logged) == 4 and all(torch.tensor(logged).isfinite())

    # The first step's loss is the bound of the untrained model on what was batched, and is descended.
    batch = next(iter(trainer.get_train_dataloader()))
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    before, after = fresh().eval()(ids, mask).elbo, model.eval()(ids, mask).elbo
    assert after.sum() > before.sum()


def test_prompts_are_observed_by_a_conditional_model(tokenizer, tmp_path):
    model = fresh(conditional=True)
    trainer = train(FlowTrainer, trl.SFTConfig, tmp_path, model, tokenizer, PARTS)
    batch = next(iter(trainer.get_train_dataloader()))
    assert (batch["labels"] == -100).any()
    with torch.no_grad():
        loss = trainer.model.eval()(**batch).loss
        is_observed = (batch["labels"] == -100) & (batch["attention_mask"] == 1)
        elbo = trainer.model(
            batch["input_ids"], batch["attention_mask"], observed_mask=is_observed
        ).elbo

    torch.testing.assert_close(loss, -elbo.sum() / (batch["labels"] != -100).sum())


@pytest.mark.parametrize(
    ("trainer", "data", "options", "error", "message"),
    [
        (trl.SFTTrainer, {"text": TEXTS}, {}, AttributeError, "compute_loss"),
        (FlowTrainer, {"text": TEXTS}, {"packing": True}, TypeError, 'packing_strategy="wrapped"'),
        (FlowTrainer, PARTS, {}, ValueError, "conditional=True can leave out a prompt"),
    ],
    ids=["the trainer itself", "sequences that share a row", "a prompt that is not scored"],
)
def test_errors_say_what_to_do(trainer, data, options, error, message, tokenizer, tmp_path):
    with pytest.raises(error, match=message):
        train(trainer, trl.SFTConfig, tmp_path, fresh(), tokenizer, data, **options)


def test_preferences_need_the_next_token(tokenizer, tmp_path):
    pairs = {"prompt": ["the "], "chosen": ["list"], "rejected": ["zzz"]}
    with pytest.raises(AttributeError, match="no last hidden states"):
        train(
            lambda **options: trl.DPOTrainer(ref_model=fresh(), **options),
            trl.DPOConfig, tmp_path, fresh(), tokenizer, pairs,
        )  # fmt: skip
