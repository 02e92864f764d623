"""Train a TarFlowLM, or the discrete transformer beside it.

    accelerate launch examples/train.py                                    # five minutes on two CPU cores
    accelerate launch examples/train.py --model ar --output_dir runs/ar    # the discrete baseline, same data
    accelerate launch examples/train.py --dataset my.txt --config my.json --num_steps 10000
    accelerate launch examples/train.py --dataset afmck/text8 --mixed_precision bf16 --batch_size 64
    accelerate launch examples/train.py --dataset Skylion007/openwebtext --streaming --tokenizer gpt2 \\
        --config examples/configs/openwebtext.json
    accelerate launch examples/train.py --resume                           # go on where a run stopped
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoTokenizer, HfArgumentParser, set_seed

from tarflow_hf import TarFlowLMConfig, TarFlowLMModel
from tarflow_hf.data import PYTHON_DOCS, PackedTokens, StreamingPackedTokens, character_tokenizer, load_splits
from tarflow_hf.evaluation import likelihoods, report_table
from tarflow_hf.training import TrainingConfig, discrete_baseline, make_accelerator, share_cores, train


@dataclass
class RunConfig:
    """What to train, on what."""

    model: str = field(
        default="tarflowlm",
        metadata={"help": "tarflowlm, or ar: the discrete baseline", "choices": ["tarflowlm", "ar"]},
    )
    config: str = field(
        default=str(Path(__file__).parent / "configs" / "mixd.json"), metadata={"help": "TarFlowLMConfig as JSON"}
    )
    dataset: str = field(default=PYTHON_DOCS, metadata={"help": f"{PYTHON_DOCS}, a text file, or a Hub dataset"})
    dataset_config: str | None = field(default=None, metadata={"help": "configuration of a Hub dataset"})
    text_column: str = field(default="text", metadata={"help": "column of a Hub dataset"})
    streaming: bool = field(default=False, metadata={"help": "read a Hub dataset while it downloads"})
    tokenizer: str = field(default="text8", metadata={"help": "text8 (27 characters), or any AutoTokenizer"})
    test_sequences: int = field(default=64, metadata={"help": "sequences of the closing table"})
    test_samples: int = field(default=16, metadata={"help": "samples of the importance-weighted bound in it"})


def data(run: RunConfig, sequence_length: int, tokenizer, seed: int):
    """The three splits, tokenized and packed into blocks."""
    splits = load_splits(
        run.dataset, text_column=run.text_column, dataset_config=run.dataset_config, streaming=run.streaming
    )
    packed = []
    for name, documents in splits.items():
        if run.streaming and name == "train":
            packed.append(StreamingPackedTokens(documents, tokenizer, sequence_length, shuffle_buffer=1024, seed=seed))
            continue
        try:
            packed.append(PackedTokens(documents, tokenizer, sequence_length))
        except ValueError as error:
            raise ValueError(f"The {name} split of {run.dataset} is too short: {error}") from None
    return packed


def build(run: RunConfig, tokenizer):
    """The model, from its configuration file and the tokenizer's vocabulary."""
    config = TarFlowLMConfig(**{"vocab_size": len(tokenizer), **json.loads(Path(run.config).read_text())})
    if config.vocab_size < len(tokenizer):
        raise ValueError(f"The tokenizer has {len(tokenizer)} tokens, {run.config} only {config.vocab_size}.")
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    return config, discrete_baseline(config) if run.model == "ar" else TarFlowLMModel(config)


def main():
    run, training = HfArgumentParser((RunConfig, TrainingConfig)).parse_args_into_dataclasses()
    accelerator = make_accelerator(training)
    if accelerator.device.type == "cpu":
        share_cores()
    set_seed(training.seed)

    tokenizer = character_tokenizer() if run.tokenizer == "text8" else AutoTokenizer.from_pretrained(run.tokenizer)
    config, model = build(run, tokenizer)
    with accelerator.main_process_first():
        train_data, validation_data, test_data = data(run, config.max_position_embeddings, tokenizer, training.seed)
    accelerator.print(f"{run.model}: {model.num_parameters():,} parameters; {run.dataset}: {describe(train_data)}")

    model = train(model, train_data, validation_data, tokenizer, training, accelerator)
    if accelerator.is_main_process:
        report(model, tokenizer, test_data, run)
        print(f"\nSaved to {training.output_dir}/model")


def describe(train_data) -> str:
    return (
        "a stream" if isinstance(train_data, StreamingPackedTokens) else f"{len(train_data.tokens):,} training tokens"
    )


def report(model, tokenizer, test_data, run: RunConfig) -> None:
    """A sample, and a table with the likelihood of held-out text."""
    torch.manual_seed(0)
    if run.model == "ar":
        start = torch.full((1, 1), model.config.bos_token_id, device=model.device)
        tokens = model.generate(start, do_sample=True, top_k=0, max_new_tokens=256, pad_token_id=0)[:, 1:]
    else:
        tokens = model.generate()
    rows = likelihoods(model, test_data, run.test_samples, max_sequences=run.test_sequences, progress=True)
    print(f"\nA sample:\n{tokenizer.decode(tokens[0], skip_special_tokens=True)}\n")
    print(f"Test text:\n{report_table(rows, test_data.characters_per_token)}")


if __name__ == "__main__":
    main()
