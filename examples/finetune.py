"""Fine-tune a checkpoint on a text file of your own, by the library's Trainer.

    python examples/finetune.py runs/demo/model my.txt --output_dir runs/mine --max_steps 200 --learning_rate 1e-4
    accelerate launch examples/finetune.py USER/NAME my.txt --output_dir runs/mine --num_train_epochs 1 --bf16
    python examples/finetune.py USER/NAME my.txt --output_dir runs/mine --push_to_hub --hub_model_id USER/MINE

Takes all options of `TrainingArguments`; `--resume_from_checkpoint true` goes on from the newest
checkpoint. Its losses are nats per token: minus the ELBO.
"""

from pathlib import Path

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


def find_checkpoint(training: TrainingArguments) -> str | None:
    """The checkpoint to go on from; with none, the folder must be free of another run's."""
    given, folder = training.resume_from_checkpoint, Path(training.output_dir)
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]  # written last
    newest = max(whole, key=lambda path: int(path.name.split("-")[1]), default=None)
    if given is None and newest is not None:
        raise FileExistsError(
            f"{folder} holds another run ({newest}). Go on with it by --resume_from_checkpoint true, or choose another "
            "--output_dir."
        )

    return str(newest) if given in ("true", "True") and newest else given


def main():
    parser = HfArgumentParser(TrainingArguments)
    parser.add_argument("checkpoint", help="a folder, or a repository of the Hub")
    parser.add_argument("data", help="a text file, a folder of them, or a dataset of the Hub")
    training, given = parser.parse_args_into_dataclasses()
    resume = find_checkpoint(training)
    tokenizer = AutoTokenizer.from_pretrained(given.checkpoint)
    model = AutoModelForCausalLM.from_pretrained(given.checkpoint, dtype=torch.float32)

    splits = load_splits(given.data)
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
    trainer.train(resume_from_checkpoint=resume)
    print(
        f"Validation, nats per token: {before:.4f} before, {trainer.evaluate()['eval_loss']:.4f} after"
    )
    trainer.save_model()  # with the tokenizer and the code; with --push_to_hub it is pushed, too


if __name__ == "__main__":
    main()
