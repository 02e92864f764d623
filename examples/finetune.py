"""Fine-tune a checkpoint on a text file of your own, by the library's Trainer.

    python examples/finetune.py runs/demo/model my.txt --output_dir runs/mine --max_steps 200 --learning_rate 1e-4
    accelerate launch examples/finetune.py USER/NAME my.txt --output_dir runs/mine --num_train_epochs 1 --bf16
    python examples/finetune.py USER/NAME my.txt --output_dir runs/mine --push_to_hub --hub_model_id USER/MINE

Takes all options of `TrainingArguments`; `--resume_from_checkpoint true` goes on from the newest
checkpoint. SIGTERM ends a run, which is saved. Its losses are nats per token: minus the ELBO.
"""

import torch
from transformers import HfArgumentParser, Trainer, TrainingArguments

from tarflow_hf.data import load_splits, pack_split
from tarflow_hf.loading import check_trainable, load_checkpoint
from tarflow_hf.training import trainer_checkpoint


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch: the labels are the ids."""
    input_ids = torch.stack([row["input_ids"] for row in rows])
    return {"input_ids": input_ids, "labels": input_ids}


def main():
    parser = HfArgumentParser(TrainingArguments)
    parser.set_defaults(enable_jit_checkpoint=True)  # a checkpoint on SIGTERM
    parser.add_argument("checkpoint", help="a folder, or a repository of the Hub")
    parser.add_argument("data", help="a file of text or documents, a folder, or a dataset")
    parser.add_argument("--text_column", default="text", help="of documents")
    training, given = parser.parse_args_into_dataclasses()
    training.dataloader_pin_memory &= training.device.type == "cuda"  # else torch warns
    resume = trainer_checkpoint(training)
    model, tokenizer = load_checkpoint(given.checkpoint, dtype=torch.float32)
    check_trainable(model, given.checkpoint)

    splits = load_splits(given.data, text_column=given.text_column)
    length = model.config.max_position_embeddings
    train, validation = (
        pack_split(name, splits[name], given.data, tokenizer, length)
        for name in ("train", "validation")
    )
    if note := train.note("the training text"):
        print(note)

    options = {"data_collator": collate, "processing_class": tokenizer}
    trainer = Trainer(model, training, train_dataset=train, eval_dataset=validation, **options)
    before = trainer.evaluate()["eval_loss"]
    trainer.train(resume_from_checkpoint=resume)
    if trainer.state.global_step < trainer.state.max_steps:
        raise SystemExit("Stopped, and saved. Go on by --resume_from_checkpoint true.")

    after = trainer.evaluate()["eval_loss"]
    print(f"Validation, nats per token: {before:.4f} before, {after:.4f} after")
    trainer.save_model()  # with the tokenizer and the code; with --push_to_hub it is pushed, too


if __name__ == "__main__":
    main()
