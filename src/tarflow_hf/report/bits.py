"""The bits of each token as a picture: numbers under a text, with colours behind it.

ids  ->  `token_bits`  ->  `bits_section`, which `likelihood_of_text` puts below what it means
"""

import math
from dataclasses import dataclass

import torch
from markupsafe import Markup
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..evaluation import bits_of_pieces, token_bits, what_bits_mean
from ..modeling.modeling_tarflowlm import TarFlowLMModel
from .page import printable, render

# White space that a reader could not see otherwise.
VISIBLE = str.maketrans(
    {"\n": "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}", "\t": "\N{RIGHTWARDS ARROW}"}
)


@dataclass(frozen=True)
class ShownToken:
    """A token as it stands in the picture."""

    text: str
    bits: str
    heat: float  # of the colour, from 0 to 1


def bits_section(token_ids: Tensor, bits: Tensor, tokenizer: PreTrainedTokenizerBase) -> Markup:
    """Ids (T,) with their bits (T,) as a part of an HTML page.

    Under each token stands its number. The colour behind it is full at the cost of a blind guess
    among all tokens of the vocabulary, log2 K, and above.
    """
    guess = math.log2(len(tokenizer))
    words: list[list[ShownToken]] = []  # lines break between words
    starts_word = True

    for text, cost in bits_of_pieces(token_ids, bits, tokenizer):
        is_space = text.isspace()
        if starts_word or (text[:1].isspace() and not is_space):
            words.append([])

        shown = printable(text).translate(VISIBLE)
        shown = shown.replace(" ", "\N{OPEN BOX}") if is_space else shown
        number = f"{cost:z.1f}".replace("-", "\N{MINUS SIGN}")
        words[-1].append(ShownToken(shown, number, heat=min(max(cost / guess, 0.0), 1.0)))
        starts_word = is_space

    return render("bits.html.j2", words=words, guess=guess, num_tokens=len(tokenizer))


@torch.no_grad()
def likelihood_of_text(
    model: TarFlowLMModel,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: Tensor,
    num_samples: int = 8,
    generator: torch.Generator | None = None,
) -> Markup:
    """The bits of a text as a part of an HTML page: per character, in all, and of each token.

    Args:
        input_ids: The text's ids (1, T).
        num_samples, generator: As for `token_bits`.

    Raises:
        ValueError: As `token_bits`.
    """
    bits = token_bits(model, input_ids, num_samples, generator)[0].cpu()
    text = tokenizer.decode(input_ids[0], clean_up_tokenization_spaces=False)

    return render(
        "bits_of_text.html.j2",
        total=bits.sum().item(),
        num_characters=len(text),
        num_samples=num_samples,
        meaning=what_bits_mean(model),
        bits=bits_section(input_ids[0].cpu(), bits, tokenizer),
    )
