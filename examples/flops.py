"""FLOPs of a forward pass against a discrete transformer, and the paper's Figure 7 drawn again.

    python examples/flops.py                                  # GPT-2 small to XL, patch sizes 1 to 16: a table
    python examples/flops.py --figure figure_7.svg            # and a picture
    python examples/flops.py --coupling mixture_rosenblatt    # of Mix-d next to the data
    python examples/flops.py --checkpoint runs/demo/model     # of one model, at its own and other patch sizes
    python examples/flops.py --recipe examples/recipes/demo.json --figure flops.svg

Each ratio is given by the true count and, in brackets, by the paper's: see `tarflow_hf.evaluation.flops`.
"""

import argparse
from pathlib import Path

from transformers import AutoConfig

from tarflow_hf import TarFlowLMConfig
from tarflow_hf.data import read_json
from tarflow_hf.evaluation import (
    GPT2_SIZES,
    PATCH_SIZES,
    count_by_patch_size,
    count_flops,
    figure_7,
)
from tarflow_hf.loading import check_checkpoint
from tarflow_hf.report import flops_table, patch_size_table, plot_flops, plot_patch_sizes


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    one = parser.add_mutually_exclusive_group()
    one.add_argument(
        "--checkpoint", help="count this model alone: a folder, or a repository of the Hub"
    )
    one.add_argument("--recipe", type=Path, help="count this recipe's model alone: a file")
    parser.add_argument("--sizes", nargs="+", choices=list(GPT2_SIZES), default=list(GPT2_SIZES))
    parser.add_argument("--patch_sizes", type=int, nargs="+", default=list(PATCH_SIZES))
    parser.add_argument(
        "--coupling", default="mixture_cdf", choices=["mixture_cdf", "mixture_rosenblatt", "affine"]
    )
    parser.add_argument("--num_tokens", type=int, default=1024, help="of a sequence")
    parser.add_argument("--figure", type=Path, help="draw the ratios here: .svg, .png or .pdf")

    return parser.parse_args()


def one_model(arguments: argparse.Namespace) -> None:
    """The counts of a checkpoint or a recipe, at its own and at other patch sizes."""
    if arguments.recipe:
        recipe = read_json(arguments.recipe)
        if "config" not in recipe:
            raise ValueError(f"{arguments.recipe} has no `config`: its model comes from --from.")

        config = TarFlowLMConfig(**recipe["config"])
    else:
        check_checkpoint(arguments.checkpoint, needs_tokenizer=False)
        config = AutoConfig.from_pretrained(arguments.checkpoint)

    count = count_flops(config)
    print(
        f"FLOPs of a forward pass over {count.num_tokens:,} tokens, patch size {config.patch_size}"
    )
    print(f"TarFlowLM:            {count.flow:.4g}, {count.flow_per_token:.4g} a token")
    print(f"discrete transformer: {count.discrete:.4g}, {count.discrete_per_token:.4g} a token")
    print(f"ratio:                {count.ratio:.3f}; by the paper's count {count.paper_ratio:.3f}")
    counts = count_by_patch_size(config, arguments.patch_sizes)
    print(f"\n{patch_size_table(counts)}")
    if arguments.figure is not None:
        plot_patch_sizes(counts).savefig(arguments.figure)


def main():
    arguments = parse_arguments()
    if arguments.checkpoint or arguments.recipe:
        one_model(arguments)
        return

    counts = figure_7(
        arguments.sizes,
        arguments.patch_sizes,
        coupling=arguments.coupling,
        max_position_embeddings=arguments.num_tokens,
    )
    print(flops_table(counts))
    if arguments.figure is not None:
        plot_flops(counts).savefig(arguments.figure)


if __name__ == "__main__":
    main()
