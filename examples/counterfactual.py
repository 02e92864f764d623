"""Ask what the noise of a text says under another condition.

The noise that made the text is drawn, whatever wrote it. The same noise then writes after another
prompt, with other weights of the tokens, or by another checkpoint: what the text would have been.

    python examples/counterfactual.py runs/demo/model "the function returns a list" --prompt "the method"
    python examples/counterfactual.py runs/demo/model "the function returns a list" --mixture_temperature 0.7
    python examples/counterfactual.py runs/demo/model "the function returns a list" --checkpoint OTHER
    python examples/counterfactual.py runs/demo/model "the function returns a list" --contains class

Two columns have the tokens of either text with their bits: grey where they are the same, and an
arrow at the first that differs. `--contains` changes no condition but the noise, as little as it
finds to be enough for the word. Noise is continuous, so that there is a nearest text with the word;
a sampler that draws tokens by Gumbel noise and argmax has counterfactuals (Oberst & Sontag, ICML
2019, arXiv:1905.05824; Ravfogel et al., ICLR 2025, arXiv:2411.07180), but no likely smallest change.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from tarflow_hf import TarFlowLMModel
from tarflow_hf.data import checked_ids, say_what_is_lost
from tarflow_hf.evaluation import token_bits, what_bits_mean
from tarflow_hf.loading import load_checkpoint
from tarflow_hf.noise import check_same_space

GREY, PLAIN = "\033[90m", "\033[0m"

# Halvings of the way from noise that says the word back to the noise of the text.
NUM_HALVINGS = 6


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint_of_text", metavar="checkpoint", help="a folder, or of the Hub")
    parser.add_argument("text", help="whose noise is drawn")
    parser.add_argument("--prompt", help="begins the other text, in place of as many tokens")
    parser.add_argument("--checkpoint", help="writes the other text; of the same vocabulary")
    parser.add_argument("--mixture_temperature", type=float, help="of the weights of Mix-d flows")
    parser.add_argument("--top_k", type=int)
    parser.add_argument("--top_p", type=float)
    parser.add_argument("--contains", help="the word of the nearest text that has it")
    parser.add_argument("--num_draws", type=int, default=4, help="of the noise that says the word")
    parser.add_argument("--no_color", action="store_true")
    parser.add_argument("--seed", type=int, default=0)

    arguments = parser.parse_args()
    conditions = ("prompt", "checkpoint", "mixture_temperature", "top_k", "top_p")
    given = [name for name in conditions if getattr(arguments, name) is not None]
    if bool(given) == (arguments.contains is not None):
        parser.error(f"Give another condition (--{', --'.join(conditions)}), or --contains.")

    return arguments


@torch.no_grad()
def nearest_noise(
    model: TarFlowLMModel,
    noise: Tensor,
    word: Tensor,
    num_draws: int = 4,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The nearest noise to some noise (1, T, d) that is found to say a word (w,), (1, T, d).

    At each place the word is written over the text, and the noise of its tokens is drawn, a few
    times. From each of these a straight line leads back to the given noise, and halving finds the
    last point that still says the word. The nearest of all has then every number set back that the
    word does not need.

    Raises:
        ValueError: If the text is shorter than the word, or no draw says it.
    """
    length = noise.shape[1]
    width = len(word)
    patch_size = model.config.patch_size
    if length < width:
        raise ValueError(f"A text of {length} tokens has no room for a word of {width}.")

    starts = torch.arange(length - width + 1).repeat_interleave(num_draws)
    places = torch.arange(length)
    is_word = (places >= starts.unsqueeze(-1)) & (places < starts.unsqueeze(-1) + width)  # (n, T)
    tokens = model.generate(noise=noise)
    if bool((tokens.unfold(1, width, 1) == word).all(-1).any()):
        return noise

    written = tokens.expand(len(starts), -1).masked_scatter(is_word, word.repeat(len(starts)))

    def says(noise: Tensor, is_word: Tensor) -> Tensor:
        ids = model.generate(noise=noise)
        return (ids[is_word].unflatten(0, (len(noise), width)) == word).all(-1)

    # The noise of a patch changes as a whole.
    is_changed = is_word.unflatten(1, (-1, patch_size)).any(-1, keepdim=True)
    is_changed = is_changed.expand(-1, -1, patch_size).flatten(1).unsqueeze(-1)
    drawn = torch.where(is_changed, model.noise_of(written, generator=generator), noise)
    fits = says(drawn, is_word)
    if not bool(fits.any()):
        raise ValueError("No draw of noise says the word: give more of them (--num_draws).")

    drawn, is_word = drawn[fits], is_word[fits]
    low, high = torch.zeros(len(drawn), 1, 1), torch.ones(len(drawn), 1, 1)  # share of the draw
    for _ in range(NUM_HALVINGS):
        middle = (low + high) / 2
        is_enough = says(torch.lerp(noise, drawn, middle), is_word).reshape(-1, 1, 1)
        low, high = torch.where(is_enough, low, middle), torch.where(is_enough, middle, high)

    near = torch.lerp(noise, drawn, high)
    best = (near - noise).square().sum((1, 2)).argmin()
    near, is_word = near[best : best + 1], is_word[best : best + 1]

    while True:
        last, near = near, set_back(near, noise, lambda u: says(u, is_word.expand(len(u), -1)))
        if torch.equal(near, last):
            return near


def set_back(near: Tensor, noise: Tensor, says: Callable[[Tensor], Tensor]) -> Tensor:
    """The noise nearest to some other noise by whole numbers: each that leaves the word is set back.

    The largest changes come first. All beginnings of the changes that are left are tried at once, and the
    first that loses the word ends in a number that is needed.
    """
    shape, near, noise = near.shape, near.flatten(), noise.flatten()
    order = (near - noise).abs().argsort(descending=True)[: int((near != noise).sum())]
    is_set_back = torch.ones(len(order), len(order)).tril().bool()
    while len(order):
        tried = near.repeat(len(order), 1)
        tried[:, order] = torch.where(is_set_back, noise[order], near[order])
        number = int(says(tried.reshape(-1, *shape[1:])).long().cumprod(0).sum())
        near = tried[number - 1] if number else near
        order = order[number + 1 :]
        is_set_back = is_set_back[: len(order), : len(order)]

    return near.reshape(shape)


def print_columns(pieces: list[list[str]], bits: list[list[float]], color: bool) -> None:
    """Prints the tokens of two texts with their bits, side by side."""
    has_differed = False
    for n, (one, other) in enumerate(zip(*pieces, strict=True)):
        is_first = one != other and not has_differed
        has_differed = has_differed or is_first
        mark = ">" if is_first else " "
        cells = [f"{text!r:>16} {bits[row][n]:8.2f}" for row, text in enumerate((one, other))]
        line = f"{mark} {n:4} {cells[0]}   {cells[1]}"
        print(f"{GREY}{line}{PLAIN}" if color and one == other else line)


@torch.no_grad()
def main():
    arguments = parse_arguments()
    model, tokenizer = load_checkpoint(arguments.checkpoint_of_text)
    other = model
    if arguments.checkpoint is not None:
        other, tokenizer_of_other = load_checkpoint(arguments.checkpoint)
        check_same_space(model, other, tokenizer, tokenizer_of_other)

    ids = checked_ids(tokenizer, arguments.text)
    say_what_is_lost(tokenizer, [arguments.text])
    tokens = torch.tensor([ids[: len(ids) // model.config.patch_size * model.config.patch_size]])
    generator = torch.Generator().manual_seed(arguments.seed)
    noise = model.noise_of(tokens, generator=generator)

    if arguments.contains is None:
        names = ("mixture_temperature", "top_k", "top_p")
        options = {name: getattr(arguments, name) for name in names}
        prompt = torch.tensor([checked_ids(tokenizer, arguments.prompt or "")], dtype=torch.long)
        say_what_is_lost(tokenizer, [arguments.prompt or ""], "the prompt")
        counterfactual = other.generate(prompt, noise=noise, **options)
    else:
        word = torch.tensor(checked_ids(tokenizer, arguments.contains, "the word"))
        near = nearest_noise(model, noise, word, arguments.num_draws, generator)
        counterfactual = model.generate(noise=near)
        change = (near - noise).square().sum().sqrt()
        number = int((near != noise).sum())
        print(f"The noise moves by {change:.2f}, in {number} of {noise.numel()} numbers.")

    texts = [tokens, counterfactual]
    bits = [
        token_bits(each, text, num_samples=4, generator=generator)[0].tolist()
        for each, text in zip((model, other), texts, strict=True)
    ]
    pieces = [[tokenizer.decode([token]) for token in text[0].tolist()] for text in texts]
    print_columns(pieces, bits, not arguments.no_color)
    for text, each in zip(texts, bits, strict=True):
        print(f"{sum(each):8.1f} bits: {tokenizer.decode(text[0])}")

    print(what_bits_mean(model))


if __name__ == "__main__":
    main()
