"""Write one HTML page about a checkpoint, with the command that reproduces each part of it.

    python examples/report.py runs/demo/model --data my.txt --output report.html
    python examples/report.py runs/demo/model --data python-docs --judge path/of/a/causal/model
    python examples/report.py runs/ar/model --data my.txt          # a discrete baseline: without what flows have

The page has tables, pictures and samples, and needs no network and no script. The defaults are
modest, for a demo in a minute on a laptop. For figures to publish, give more sequences and
thousands of samples with a judge. Needs `matplotlib`, and with a judge `mauve-text`.
"""

import argparse
import shlex
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from tarflow_hf.baseline import flows_of
from tarflow_hf.data import PackedTokens, held_out_documents, output_file, token_ids
from tarflow_hf.evaluation import (
    Judge,
    Sampling,
    count_by_patch_size,
    cut_text,
    evaluate_samples,
    evaluate_text,
    evolution_of_samples,
    evolution_of_text,
    load_judge,
    longest_sequence,
    provenance_of,
    reference_sequences,
    sample_to_file,
)
from tarflow_hf.loading import load_checkpoint
from tarflow_hf.report import (
    SEED,
    codebook_section,
    draw_passes,
    evolution_section,
    flops_section,
    likelihood_section,
    model_section,
    new_figure,
    origin_section,
    passes_of_texts_section,
    report_page,
    samples_section,
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="a folder, or a repository of the Hub")
    parser.add_argument(
        "--data",
        required=True,
        help="a file of text or documents, or python-docs or a dataset: its test split",
    )
    parser.add_argument("--text_column", default="text", help="of a file of documents or a dataset")
    parser.add_argument("--output", type=output_file, default="report.html")
    parser.add_argument(
        "--judge", help="a causal language model, for generative perplexity and MAUVE"
    )
    parser.add_argument("--max_sequences", type=int, default=32, help="of the text, to score")
    parser.add_argument(
        "--bound_samples", type=int, default=16, help="of the importance-weighted bound"
    )
    parser.add_argument(
        "--num_samples",
        type=int,
        default=16,
        help="to draw and measure; as many sequences of the text",
    )
    parser.add_argument("--length", type=int, help="of a sample, in tokens; default: the model's")
    parser.add_argument(
        "--show_samples", type=int, default=3, help="how many of them the page shows"
    )
    parser.add_argument(
        "--show_passes", type=int, default=2, help="samples whose way from noise to text it shows"
    )
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")

    return parser.parse_args()


def main():
    # 1. Everything that may be missing is looked for before the long part.
    arguments = parse_arguments()
    new_figure(1, 1)

    model, tokenizer = load_checkpoint(arguments.checkpoint, arguments.device)
    judge = None
    if arguments.judge:
        judge = Judge(*load_judge(arguments.judge, arguments.device), progress=True)

    length = arguments.length or longest_sequence(model)
    documents = held_out_documents(arguments.data, arguments.text_column)
    text = PackedTokens(documents, tokenizer, length)
    reference_sequences(text, arguments.num_samples)
    origin = provenance_of(model, arguments.checkpoint, arguments.data, documents)

    # 2. The sections, each with what it needs.
    evaluation, rows, command = score(arguments, model, text, origin)
    sections = [model_section(model, evaluation), likelihood_section(evaluation, rows, command)]
    if flows_of(model):
        sections.append(codebook_section(evaluation, command))

    sections.append(describe_samples(arguments, model, tokenizer, text, judge, origin))
    if flows_of(model):
        sections.append(show_passes(arguments, model, tokenizer, text))
        sections.append(show_evolution(arguments, model, text))
        counts = count_by_patch_size(model.config)
        sections.append(
            flops_section(
                counts,
                model.config.patch_size,
                command_line("flops.py", checkpoint=arguments.checkpoint),
            )
        )

    sections.append(origin_section(evaluation))

    # 3. The page.
    bound = "at most " if evaluation.is_upper_bound else ""
    summary = (
        f"{bound}{evaluation.bits_per_character:.4f} bits per character on "
        f"{evaluation.num_tokens:,} tokens of {evaluation.data}, by a model of "
        f"{evaluation.num_parameters:,} parameters."
    )
    page = report_page(
        f"Report on {arguments.checkpoint}", summary[0].upper() + summary[1:], sections
    )
    arguments.output.write_text(page, encoding="utf-8")
    print(f"Written to {arguments.output}: {len(page.encode()):,} bytes.")


def text_options(arguments) -> dict[str, str | None]:
    """The options of a command that say which text it reads."""
    column = None if arguments.text_column == "text" else arguments.text_column
    return {"data": arguments.data, "text_column": column}


def command_line(script: str, *words: str, **options) -> str:
    """The command line of an example, without the options that are None."""
    for name, value in options.items():
        if value is True:
            words += (f"--{name}",)
        elif str(value).startswith("-"):  # by itself it would be read as an option
            words += (f"--{name}={value}",)
        elif value is not None:
            words += (f"--{name}", str(value))

    return shlex.join(["python", f"examples/{script}", *words])


def score(arguments, model, text, origin):
    """The evaluation of the text, its likelihoods, and the command that prints them."""
    sizes = {
        "max_sequences": arguments.max_sequences,
        "batch_size": arguments.batch_size,
        "seed": arguments.seed,
    }
    evaluation, rows = evaluate_text(
        model, text, origin, num_samples=arguments.bound_samples, progress=True, **sizes
    )
    samples = {"num_samples": arguments.bound_samples} if evaluation.is_upper_bound else {}
    options = {**text_options(arguments), **samples, **sizes, "device": arguments.device}
    command = command_line("evaluate.py", arguments.checkpoint, **options)

    return evaluation, rows, command


def describe_samples(arguments, model, tokenizer, text, judge, origin):
    sizes = {"num_samples": arguments.num_samples, "length": text.sequence_length}
    sizes |= {"batch_size": arguments.batch_size, "seed": arguments.seed}
    sampling = Sampling(**sizes, progress=True)

    with TemporaryDirectory() as folder:
        samples = sample_to_file(model, tokenizer, Path(folder, "samples.jsonl"), sampling)

    evaluation = evaluate_samples(samples, text, tokenizer, judge, origin, sampling)
    judged = {"judge": arguments.judge} if arguments.judge else {"no_judge": True}
    options = {
        **text_options(arguments),
        **judged,
        **sizes,
        "samples": "report-samples.jsonl",
        "device": arguments.device,
    }
    command = command_line("evaluate_samples.py", arguments.checkpoint, **options)

    return samples_section(evaluation, samples[: arguments.show_samples], command)


def show_passes(arguments, model, tokenizer, text):
    """The section on the passes of samples, and of the beginning of the text."""
    size = min(128, text.sequence_length)
    size -= size % model.config.patch_size
    views = []

    def add(title: str, **options) -> None:
        passes = draw_passes(model, tokenizer, **options)
        options["device"] = arguments.device
        views.append(
            (title, passes, command_line("show_passes.py", arguments.checkpoint, **options))
        )

    for seed in range(arguments.seed, arguments.seed + arguments.show_passes):
        add(f"Sample with seed {seed}", max_new_tokens=size, seed=seed)

    given = tokenizer.decode(text[0]["input_ids"][:size], clean_up_tokenization_spaces=False)
    if len(token_ids(tokenizer, given)) % model.config.patch_size == 0:
        title = "The beginning of the text, from its own noise"
        add(title, text=given, seed=arguments.seed)

    return passes_of_texts_section(views, tokenizer)


def show_evolution(arguments, model, text):
    """The section on the states from flow to flow."""
    length = text.sequence_length
    options = {"batch_size": arguments.batch_size, "seed": arguments.seed}
    sequences = cut_text(text.tokens[: len(text) * length], length)
    evolutions = {
        "text": evolution_of_text(
            model, sequences, max_sequences=arguments.num_samples, progress=True, **options
        ),
        "samples": evolution_of_samples(
            model, arguments.num_samples, length, progress=True, **options
        ),
    }
    options |= {
        "num_sequences": arguments.num_samples,
        "length": length,
        "device": arguments.device,
    }
    command = command_line(
        "latent_evolution.py", arguments.checkpoint, **text_options(arguments), **options
    )

    return evolution_section(
        evolutions, [flow["direction"] for flow in model.config.flows], command
    )


if __name__ == "__main__":
    main()
