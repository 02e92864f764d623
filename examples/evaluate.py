"""Score held-out text with a checkpoint, TarFlowLM or discrete baseline.

    python examples/evaluate.py runs/demo/model --data my.txt
    python examples/evaluate.py runs/demo/model --data my.txt --output evaluation.json   # all of it, with its origin
    python examples/evaluate.py runs/ar/model --data python-docs        # the test split of train.py's --dataset
    python examples/evaluate.py runs/ptb/model --data ptb:FOLDER        # each sentence on its own, with its end

The text is cut into sequences of the model's length, each scored on its own from its first token
on; no window slides. For a TarFlowLM the figures are upper bounds: from the ELBO (1 sample), and
from the tighter importance-weighted bound with more samples. `+-` is the standard error of nats per
token over the sequences, which holds for text like this one. Words are what stands between spaces.
With --num_flows the stack is cut after its first flows, a model of its own. The class
`tarflow_hf.evaluation.Evaluation` documents the JSON. examples/evaluate_samples.py evaluates text
that a model generates.
"""

import argparse

import torch

from tarflow_hf.baseline import patch_size_of
from tarflow_hf.data import (
    PackedTokens,
    held_out_documents,
    is_of_sentences,
    load_splits,
    output_file,
    sentence_splits,
)
from tarflow_hf.evaluation import WHAT_IS_SCORED, evaluate_text, provenance_of
from tarflow_hf.loading import load_checkpoint
from tarflow_hf.report import evaluation_text


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="a folder, or a repository of the Hub")
    parser.add_argument(
        "--data",
        required=True,
        help="a file of text or documents; or python-docs, ptb:FOLDER, wikitext2:FOLDER or a dataset: its test split",
    )
    parser.add_argument("--text_column", default="text", help="of a file of documents or a dataset")
    parser.add_argument("--output", type=output_file, help="write all figures here, as JSON")
    parser.add_argument(
        "--num_samples", type=int, default=16, help="of the importance-weighted bound"
    )
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_sequences", type=int, help="score only the first ones")
    parser.add_argument("--num_flows", type=int, help="score the stack cut after its first flows")
    parser.add_argument("--seed", type=int, default=0, help="of the latents")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")

    return parser.parse_args()


def main():
    arguments = parse_arguments()
    model, tokenizer = load_checkpoint(arguments.checkpoint, arguments.device)
    documents = held_out_documents(arguments.data, arguments.text_column)
    if is_of_sentences(arguments.data):
        text = sentence_splits(load_splits(arguments.data), tokenizer, patch_size_of(model))["test"]
    else:
        text = PackedTokens(documents, tokenizer, sequence_length=1)

    evaluation, rows = evaluate_text(
        model,
        text,
        provenance_of(model, arguments.checkpoint, arguments.data, documents),
        num_samples=arguments.num_samples,
        batch_size=arguments.batch_size,
        max_sequences=arguments.max_sequences,
        num_flows=arguments.num_flows,
        seed=arguments.seed,
        progress=True,
    )
    print(evaluation_text(evaluation, rows))
    print(WHAT_IS_SCORED)
    if note := text.note():
        print(note)

    if arguments.output is not None:
        arguments.output.write_text(evaluation.to_json(), encoding="utf-8")


if __name__ == "__main__":
    main()
