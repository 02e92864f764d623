"""Compare two checkpoints by the same noise: where their texts part, and how their scores differ.

Common random numbers: both models write from the same noise and are scored with the same latent
noise. The difference that is left is the models', so that far fewer texts tell whether a
quantisation, another dtype or an adapter has changed a model.

    python examples/compare.py runs/a/model runs/b/model
    python examples/compare.py runs/demo/model runs/demo/model --dtype_b bfloat16      # of the decoders' weights
    python examples/compare.py runs/demo/model runs/demo/model --int8_b                # rounds B's linear layers
    python examples/compare.py runs/demo/model runs/demo/model --adapter_b runs/adapter   # LoRA, by PEFT
    python examples/compare.py runs/a/model runs/b/model --data notes.txt              # scores on a text of your own

Scores are bits a token by the evidence bound, of B minus A: on one's own text, or on what A wrote.
The standard error is over texts. The unpaired one is that of two runs with noise and texts of their
own; (unpaired / paired)^2 is how many times as many texts that would need.
"""

import argparse

import torch

from tarflow_hf.data import PackedTokens, held_out_documents, say_what_is_lost
from tarflow_hf.evaluation import Comparison, compare, round_to_int8
from tarflow_hf.loading import load_checkpoint
from tarflow_hf.noise import check_same_space


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model_a", help="a folder, or a repository of the Hub")
    parser.add_argument("model_b")
    parser.add_argument("--dtype_b", choices=["float32", "bfloat16", "float16"], help="of B")
    parser.add_argument("--int8_b", action="store_true", help="round B's linear layers to 8 bits")
    parser.add_argument("--adapter_b", help="a folder with an adapter of PEFT for B")
    parser.add_argument("--data", help="a text to score, in pieces; default: what A writes")
    parser.add_argument("--text_column", default="text", help="of a file of documents or a dataset")
    parser.add_argument("--num_texts", type=int, default=32)
    parser.add_argument("--num_tokens", type=int, default=64, help="of a text")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)

    return parser.parse_args()


def main():
    arguments = parse_arguments()
    a, tokenizer = load_checkpoint(arguments.model_a)
    dtype = getattr(torch, arguments.dtype_b) if arguments.dtype_b else "auto"
    b, tokenizer_b = load_checkpoint(arguments.model_b, dtype=dtype)
    check_same_space(a, b, tokenizer, tokenizer_b)
    if arguments.int8_b:
        round_to_int8(b)
    if arguments.adapter_b is not None:
        from peft import PeftModel

        b = PeftModel.from_pretrained(b, arguments.adapter_b).merge_and_unload()

    texts = None
    if arguments.data is not None:
        length = arguments.num_tokens // a.config.patch_size * a.config.patch_size
        documents = held_out_documents(arguments.data, arguments.text_column)
        say_what_is_lost(tokenizer, documents, arguments.data)
        pieces = PackedTokens(documents, tokenizer, length)
        texts = torch.stack([piece["input_ids"] for piece in pieces.first(arguments.num_texts)])

    names = ("num_texts", "num_tokens", "batch_size", "seed")
    found = compare(a, b, texts=texts, **{name: getattr(arguments, name) for name in names})
    print_texts(found, tokenizer)
    print_scores(found)


def print_texts(found: Comparison, tokenizer) -> None:
    """Says where the texts part that both write from the same noise, and shows the first."""
    number, length = found.written[0].shape
    print(f"{int(found.is_same.sum())} of {number} texts of {length} tokens are the same.")

    apart = found.common[~found.is_same].float()
    if not len(apart):
        return

    print(f"The others part after {apart.mean():.1f} tokens (median {apart.median():.0f}).")
    print(f"A token of a common beginning parts in {100 * found.rate:.3f}% of all cases.")
    row = int(found.common.argmin())
    place = int(found.common[row])
    for name, tokens in zip("AB", found.written, strict=True):
        print(f"  {name}: {tokenizer.decode(tokens[row, max(place - 20, 0) : place + 20])!r}")


def print_scores(found: Comparison) -> None:
    """Says how the scores of the same texts differ."""
    mean_a, mean_b = (scores.mean().item() for scores in found.scores)
    together, apart = found.standard_error, found.unpaired_standard_error
    print(f"Bits a token: A {mean_a:.4f}, B {mean_b:.4f}; B - A {found.difference:+.5f}")
    print(f"  standard error {together:.5f} paired, {apart:.5f} unpaired")
    if together > 0:
        print(f"  the pairing is worth {(apart / together) ** 2:,.0f} times as many texts")


if __name__ == "__main__":
    main()
