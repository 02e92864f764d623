"""Fine-tune a checkpoint on a text file of your own, by the library's Trainer.

    python examples/finetune.py runs/demo/model my.txt --output_dir runs/mine --max_steps 200 --learning_rate 1e-4
    accelerate launch examples/finetune.py USER/NAME my.txt --output_dir runs/mine --num_train_epochs 1 --bf16
    python examples/finetune.py USER/NAME my.txt --output_dir runs/mine --push_to_hub --hub_model_id USER/MINE

Takes all options of `TrainingArguments`. Its losses are nats per token: minus the ELBO.
"""

import sys

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)

import tarflow_hf  # noqa: F401  registers the model, so that no remote code is needed
from tarflow_hf.data import PackedTokens, load_splits


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch: the labels are the ids."""
    input_ids = torch.stack([row["input_ids"] for row in rows])
    return {"input_ids": input_ids, "labels": input_ids}


def main():
    checkpoint, path, *options = sys.argv[1:]
    (training,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(options)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)

    splits = load_splits(path)
    length = model.config.max_position_embeddings
    train, validation = (
        PackedTokens(splits[name], tokenizer, length) for name in ("train", "validation")
    )
    trainer = Trainer(
        model,
        training,
        data_collator=collate,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    print(
        f"Validation, nats per token: {before:.4f} before, {trainer.evaluate()['eval_loss']:.4f} after"
    )
    trainer.save_model()  # with the tokenizer and the code; with --push_to_hub it is pushed, too


if __name__ == "__main__":
    main()
