"""Compare two checkpoints by the same noise: where their texts part, and how their scores differ.

Common random numbers: both models write from the same noise and are scored with the same latent
noise. What is left of the difference is the models', so that far fewer texts tell whether a
quantisation, another dtype or an adapter has changed a model.

    python examples/compare.py runs/a/model runs/b/model
    python examples/compare.py runs/demo/model runs/demo/model --dtype_b bfloat16      # of the decoders' weights
    python examples/compare.py runs/demo/model runs/demo/model --int8_b                # rounds B's linear layers
    python examples/compare.py runs/demo/model runs/demo/model --adapter_b runs/adapter   # LoRA, by PEFT
    python examples/compare.py runs/a/model runs/b/model --data notes.txt              # scores on a text of your own

Scores are bits a token by the evidence bound, of B minus A: on one's own text, or on what A wrote.
The standard error is over texts. The unpaired one is that of two runs with noise and texts of their
own; its square over the paired one's is the number of times as many texts that would take.
"""

import argparse
import math

import torch
from torch import Tensor

from tarflow_hf import TarFlowLMModel
from tarflow_hf.data import checked_ids, read_text, say_what_is_lost
from tarflow_hf.hub import load_checkpoint
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
    parser.add_argument("--num_texts", type=int, default=32)
    parser.add_argument("--num_tokens", type=int, default=64, help="of a text")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)

    return parser.parse_args()


@torch.no_grad()
def round_to_int8(model: TarFlowLMModel) -> None:
    """Rounds the weights of all linear layers to 255 steps, a scale for each row."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            scale = module.weight.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
            module.weight.copy_((module.weight / scale).round() * scale)


def parting(tokens_a: Tensor, tokens_b: Tensor) -> Tensor:
    """The number of tokens (B,) in front of the first that differs."""
    return (tokens_a == tokens_b).long().cumprod(-1).sum(-1)


def paired(scores_a: Tensor, scores_b: Tensor) -> tuple[float, float, float]:
    """The mean difference of scores (n,), B minus A, and its standard errors, paired and unpaired.

    Example:
        >>> scores = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
        >>> difference, together, apart = paired(scores, scores + 0.5)
        >>> (difference, together, round(apart, 3))
        (0.5, 0.0, 0.913)
    """
    difference = scores_b - scores_a
    together = difference.var() / len(difference)
    apart = (scores_a.var() + scores_b.var()) / len(difference)
    return difference.mean().item(), together.sqrt().item(), apart.sqrt().item()


def texts_of(arguments: argparse.Namespace, tokenizer, patch_size: int) -> Tensor | None:
    """Pieces (n, T) of the text in a file; None without one."""
    if arguments.data is None:
        return None

    text = read_text(arguments.data)
    ids = torch.tensor(checked_ids(tokenizer, text, arguments.data))
    say_what_is_lost(tokenizer, [text], arguments.data)
    length = arguments.num_tokens // patch_size * patch_size
    pieces = ids[: len(ids) // length * length].reshape(-1, length)[: arguments.num_texts]
    if len(pieces) < 2:
        raise ValueError(f"{arguments.data} has fewer than two pieces of {length} tokens.")

    return pieces


@torch.no_grad()
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

    # 1. What both write from the same noise.
    generator = torch.Generator().manual_seed(arguments.seed)
    length = arguments.num_tokens // a.config.patch_size * a.config.patch_size
    noise = torch.randn(arguments.num_texts, length, a.config.latent_size, generator=generator)
    written = [
        torch.cat(
            [model.generate(noise=u, eos_token_id=-1) for u in noise.split(arguments.batch_size)]
        )
        for model in (a, b)
    ]
    common = parting(*written)
    is_same = common == length
    apart = common[~is_same].float()
    print(f"{int(is_same.sum())} of {len(common)} texts of {length} tokens are the same.")
    if len(apart):
        print(f"The others part after {apart.mean():.1f} tokens (median {apart.median():.0f}).")
        rate = len(apart) / (common.sum() + len(apart)).item()
        print(f"A token of a common beginning parts in {100 * rate:.3f}% of all cases.")
        row = int(common.masked_fill(is_same, length).argmin())
        start = max(int(common[row]) - 20, 0)
        for name, tokens in zip("AB", written, strict=True):
            print(f"  {name}: {tokenizer.decode(tokens[row, start : int(common[row]) + 20])!r}")

    # 2. What both say of the same texts, with the same latent noise.
    texts = texts_of(arguments, tokenizer, a.config.patch_size)
    texts = written[0] if texts is None else texts
    scores = []
    for model in (a, b):
        generator = torch.Generator().manual_seed(arguments.seed)
        elbo = torch.cat(
            [model(ids, generator=generator).elbo for ids in texts.split(arguments.batch_size)]
        )
        scores.append(-elbo.double() / texts.shape[1] / math.log(2))

    difference, together, unpaired = paired(*scores)
    means = [each.mean().item() for each in scores]
    print(f"Bits a token: A {means[0]:.4f}, B {means[1]:.4f}; B - A {difference:+.5f}")
    print(f"  standard error {together:.5f} paired, {unpaired:.5f} unpaired")
    if together > 0:
        print(f"  the pairing is worth {(unpaired / together) ** 2:,.0f} times as many texts")


if __name__ == "__main__":
    main()
