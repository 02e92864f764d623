"""Compare a checkpoint's samples with held-out text.

Measured are generative perplexity, MAUVE, entropy and repetition.

    python examples/evaluate_samples.py runs/mine/model --data held-out.txt --output samples.json
    python examples/evaluate_samples.py runs/mine/model --data held-out.txt --judge gpt2 --num_samples 500
    python examples/evaluate_samples.py runs/mine/model --data held-out.txt --judge path/of/a/causal/model --top_p 0.95
    python examples/evaluate_samples.py runs/mine/model --data python-docs --no_judge --num_samples 200

The defaults are the paper's: 5,000 samples of the model's length, read by GPT-2 large; MAUVE at
scale 5, with as many sequences of the text. Samples are kept in --samples, and a run that was
stopped goes on with them. Without a network the judge is a local folder. A judge needs
`mauve-text`; without one, MAUVE is left out. The class
`tarflow_hf.evaluation.SampleEvaluation` documents the JSON.
"""

import argparse

import torch

from tarflow_hf.data import PackedTokens, held_out_documents, output_file
from tarflow_hf.evaluation import (
    JUDGE,
    MAUVE_SCALE,
    NUM_SAMPLES,
    Judge,
    Sampling,
    evaluate_samples,
    load_judge,
    longest_sequence,
    provenance_of,
    reference_sequences,
    sample_to_file,
)
from tarflow_hf.loading import load_checkpoint
from tarflow_hf.report import sample_text


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="a folder, or a repository of the Hub")
    parser.add_argument(
        "--data",
        required=True,
        help="to compare with: a file of text or documents, or python-docs or a dataset",
    )
    parser.add_argument("--text_column", default="text", help="of a file of documents or a dataset")
    judge = parser.add_mutually_exclusive_group()
    judge.add_argument(
        "--judge",
        default=JUDGE,
        help="a causal language model: a folder, or a repository of the Hub",
    )
    judge.add_argument("--no_judge", action="store_true", help="measure only what needs none")
    parser.add_argument("--num_samples", type=int, default=NUM_SAMPLES)
    parser.add_argument("--length", type=int, help="of a sample, in tokens; default: the model's")
    parser.add_argument(
        "--samples", type=output_file, default="samples.jsonl", help="where samples are kept"
    )
    parser.add_argument("--output", type=output_file, help="write all figures here, as JSON")
    parser.add_argument(
        "--temperature",
        type=float,
        help="standard deviation of the noise; of a discrete model, usual",
    )
    parser.add_argument("--mixture_temperature", type=float, help="of the weights of Mix-d flows")
    parser.add_argument("--top_k", type=int, help="as in examples/generate.py")
    parser.add_argument("--top_p", type=float, help="as in examples/generate.py")
    parser.add_argument("--mauve_scale", type=float, default=MAUVE_SCALE)
    parser.add_argument("--batch_size", type=int, default=16, help="of sampling")
    parser.add_argument("--judge_batch_size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")

    return parser.parse_args()


def main():
    # 1. Everything that may be missing is looked for before the long part.
    arguments = parse_arguments()
    model, tokenizer = load_checkpoint(arguments.checkpoint, arguments.device)
    judge = None
    if not arguments.no_judge:
        judge = Judge(
            *load_judge(arguments.judge, arguments.device),
            batch_size=arguments.judge_batch_size,
            mauve_scale=arguments.mauve_scale,
            progress=True,
        )

    length = arguments.length or longest_sequence(model)
    documents = held_out_documents(arguments.data, arguments.text_column)
    text = PackedTokens(documents, tokenizer, length)
    reference_sequences(text, arguments.num_samples)
    if note := text.note():
        print(note)

    # 2. Samples.
    names = ("temperature", "mixture_temperature", "top_k", "top_p")
    options = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    sampling = Sampling(
        num_samples=arguments.num_samples,
        length=length,
        seed=arguments.seed,
        generate_options=options,
        batch_size=arguments.batch_size,
        progress=True,
    )
    samples = sample_to_file(model, tokenizer, arguments.samples, sampling)

    # 3. Their evaluation.
    origin = provenance_of(model, arguments.checkpoint, arguments.data, documents)
    evaluation = evaluate_samples(samples, text, tokenizer, judge, origin, sampling)
    print(sample_text(evaluation))
    if arguments.output is not None:
        arguments.output.write_text(evaluation.to_json(), encoding="utf-8")


if __name__ == "__main__":
    main()
