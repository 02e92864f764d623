"""Score a text file with a checkpoint, TarFlowLM or discrete baseline.

    python examples/evaluate.py runs/demo/model --data my.txt
    python examples/evaluate.py runs/ar/model --data my.txt

The text is cut into sequences of the model's length, each scored on its own from its first token on; no window slides.
For a TarFlowLM the figures are upper bounds: from the ELBO (1 sample), and from the tighter importance-weighted bound
with more samples. `+-` is the standard error of nats per token over the sequences, which holds for text like this one.
Words are what stands between spaces. With --num_flows the stack is cut after its first flows, a model of its own.
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

from tarflow_hf import TarFlowLMModel
from tarflow_hf.data import PackedTokens, read_text
from tarflow_hf.evaluation import WHAT_IS_SCORED, likelihoods, report_table


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a folder, or a repository of the Hub")
    parser.add_argument("--data", required=True, help="a UTF-8 text file")
    parser.add_argument("--num_samples", type=int, default=16, help="of the importance-weighted bound")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_sequences", type=int, help="score only the first ones")
    parser.add_argument("--num_flows", type=int, help="score the stack cut after its first flows")
    parser.add_argument("--seed", type=int, default=0, help="of the latents")
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint)
    model = AutoModelForCausalLM.from_pretrained(arguments.checkpoint)

    text = PackedTokens([read_text(arguments.data)], tokenizer, sequence_length=1)
    patch_size = getattr(model.config, "patch_size", 1)
    num_tokens = len(text.tokens) // patch_size * patch_size
    # All of the text: the last sequence is shorter than the others.
    sequences = [{"input_ids": ids.long()} for ids in text.tokens[:num_tokens].split(sequence_length(model))]

    options = {"batch_size": arguments.batch_size, "max_sequences": arguments.max_sequences, "seed": arguments.seed}
    if isinstance(model, TarFlowLMModel):
        options["num_flows"] = arguments.num_flows
    elif arguments.num_flows is not None:
        raise ValueError("num_flows can't be given: this is a discrete model.")
    rows = likelihoods(model, sequences, arguments.num_samples, progress=True, **options)
    print(report_table(rows, text.characters_per_token, text.tokens_per_word))
    print(WHAT_IS_SCORED)


def sequence_length(model) -> int:
    """The longest sequence, in tokens; a discrete model spends one position on its beginning-of-sequence token."""
    return model.config.max_position_embeddings - (not isinstance(model, TarFlowLMModel))


if __name__ == "__main__":
    main()
