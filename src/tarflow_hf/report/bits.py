"""What each token of a text costs, as a picture: `token_bits` with colours, and what it means."""

import math
from html import escape

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..modeling.modeling_tarflowlm import TarFlowLMModel
from ..token_likelihood import bits_of_pieces, token_bits, what_bits_mean
from .passes import NOT_PRINTABLE


def bits_section(token_ids: Tensor, bits: Tensor, tokenizer: PreTrainedTokenizerBase) -> str:
    """Ids (T,) with their bits (T,) as a part of an HTML page that has `BITS_STYLE`.

    Under each token stands its number. The colour behind it is full where it costs what a blind
    guess among all tokens of the vocabulary does, or more.
    """
    guess = math.log2(len(tokenizer))
    words, starts_word = [], True  # lines break between words

    for text, cost in bits_of_pieces(token_ids, bits, tokenizer):
        is_space = text.isspace()
        heat = min(max(cost / guess, 0.0), 1.0)
        shown = NOT_PRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)
        shown = shown.replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}").replace(
            "\t", "\N{RIGHTWARDS ARROW}"
        )
        shown = shown.replace(" ", "\N{OPEN BOX}") if is_space else shown
        if starts_word or (text[:1].isspace() and not is_space):
            words.append("")

        starts_word = is_space
        number = f"{cost:z.1f}".replace("-", "\N{MINUS SIGN}")
        words[-1] += (
            f'<span class="token" style="--heat:{heat:.2f}"><bdi>{escape(shown)}</bdi><small>{number}</small></span>'
        )

    legend = (
        '<p class="legend">0 bits <span aria-hidden="true"></span> '
        f"{guess:.1f} bits, as many as a guess among all {len(tokenizer):,} tokens</p>"
    )
    text = "\n".join(f'<span class="word">{word}</span>' for word in words)

    return f'{legend}\n<p class="bits">{text}</p>'


@torch.no_grad()
def likelihood_section(
    model: TarFlowLMModel,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: Tensor,
    num_samples: int = 8,
    generator: torch.Generator | None = None,
) -> str:
    """The bits of a text's ids (1, T): per character, in all, of each token, and what they mean.

    A part of an HTML page that has `BITS_STYLE`. Options and errors as of `token_bits`.
    """
    bits = token_bits(model, input_ids, num_samples, generator)[0].cpu()
    total, num_characters = (
        bits.sum().item(),
        len(tokenizer.decode(input_ids[0], clean_up_tokenization_spaces=False)),
    )

    return (
        f"<h2>Likelihood: {total / num_characters:.2f} bits per character</h2>\n"
        f'<p class="note">{total:.0f} bits for {num_characters} characters, an upper bound: the mean of {num_samples} '
        f"samples. {what_bits_mean(model)}</p>\n{bits_section(input_ids[0].cpu(), bits, tokenizer)}"
    )


# The colour is laid over the page, light or dark, and leaves enough contrast on either.
BITS_STYLE = """\
.bits { display: flex; flex-wrap: wrap; row-gap: .5rem; margin: .5rem 0 0; line-height: 1.3; }
.bits .word { display: inline-flex; flex-wrap: wrap; max-width: 100%; row-gap: .5rem; }
.bits .token {
  display: inline-flex; flex-direction: column; align-items: center; min-width: 1.7rem; padding: .1rem .15rem;
  background: rgb(214 110 20 / calc(var(--heat) * .55)); border-right: 1px solid var(--line);
}
.bits bdi { font: .9375rem/1.4 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.bits small { font-size: .75rem; font-variant-numeric: tabular-nums; }
.legend { display: flex; align-items: center; flex-wrap: wrap; gap: .25rem .5rem; font-size: .875rem; margin: 0; }
.legend span {
  width: 5rem; height: .9rem; border: 1px solid var(--line);
  background: linear-gradient(to right, transparent, rgb(214 110 20 / .55));
}
"""
