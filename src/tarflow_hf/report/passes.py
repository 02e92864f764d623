"""The multi-pass view: the text that every flow's state decodes to, from noise to final text.

    states = model.generate(output_states=True).states  # or those of `model.flow`
    print(passes_text(find_passes(model, states), tokenizer))  # or `passes_page`, in HTML

`draw_passes` makes the states itself, those of a sample or of a text. `few_changes` is a sentence
for passes that hardly differ.

References:
    Zhang et al., *Flexible Language Modeling in Continuous Space with Transformer-based
    Autoregressive Flows*, NeurIPS 2025, arXiv:2507.00425, Figure 6.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from markupsafe import Markup
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..data import checked_ids
from ..modeling.modeling_tarflowlm import TarFlowLMModel
from .page import printable, render

# The seed of pages and scripts that show noise. Decoded noise is letters at random, and with some
# seeds of the shipped model it spells words that no page should open with.
SEED = 2

# Up to this share of the tokens is called few.
FEW = 0.05


@dataclass
class Pass:
    """One state of a sequence as text: its most likely tokens.

    Attributes:
        name: The heading, such as "Before flow 2".
        token_ids: Ids (T,).
        is_changed: True (T,) at tokens that differ from those of the pass before.
        is_given: True (T,) at tokens of the prompt, which are no state's.
        is_first: True if there is no pass before.
    """

    name: str
    token_ids: Tensor
    is_changed: Tensor
    is_given: Tensor
    is_first: bool = False

    def segments(self, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool, bool]]:
        """The text in runs of tokens that are equally changed and given.

        Returns:
            The runs: (text without control characters, is_changed, is_given).
        """
        tokens = zip(
            self.is_changed.tolist(), self.is_given.tolist(), self.token_ids.tolist(), strict=True
        )
        segments = []

        for (is_changed, is_given), run in groupby(tokens, key=lambda token: token[:2]):
            text = tokenizer.decode(
                [token_id for *_, token_id in run], clean_up_tokenization_spaces=False
            )
            segments.append((printable(text), is_changed, is_given))

        return segments

    def marked(self, tokenizer: PreTrainedTokenizerBase, color: bool = False) -> str:
        """The text with its changes in reverse video if `color`, otherwise in brackets."""
        before, after = ("\x1b[7m", "\x1b[27m") if color else ("[", "]")
        return "".join(
            before + text + after if is_changed else text
            for text, is_changed, _ in self.segments(tokenizer)
        )

    def summary(self) -> str:
        """The numbers of changed tokens, except in the first pass, and of given ones, if any."""
        parts = []
        if not self.is_first:
            parts.append(f"{int(self.is_changed.sum())} of {len(self.token_ids)} tokens changed")
        if bool(self.is_given.any()):
            parts.append(f"{int(self.is_given.sum())} given")

        return ", ".join(parts)


@torch.no_grad()
def find_passes(
    model: TarFlowLMModel,
    states: Sequence[Tensor],
    row: int = 0,
    given_ids: Tensor | None = None,
    given_mask: Tensor | None = None,
) -> list[Pass]:
    """The passes of one sequence, from the noise to the text.

    Args:
        model: Its codebook decodes the states.
        states: h0 (the latents), ..., hL (the noise), each (B, T, d).
        row: The index of the sequence.
        given_ids: The prompt (n,), n <= T. Its tokens are shown in place of the states' own.
        given_mask: True (n,) at the tokens of `given_ids` that are given, for a text with gaps; by
            default all are.

    Returns:
        One `Pass` for each state, the noise first.

    Raises:
        ValueError: If there is no such row, the prompt is longer than the states, or the mask is
            not of its shape.

    Example:
        >>> from tarflow_hf import TarFlowLMConfig
        >>> from tarflow_hf.data import character_tokenizer
        >>> flow = {"coupling": "affine", "direction": "left_to_right", "num_hidden_layers": 1}
        >>> flows = [flow, flow]
        >>> config = TarFlowLMConfig(27, 2, hidden_size=16, num_attention_heads=2, flows=flows)
        >>> model = TarFlowLMModel(config)
        >>> states = [model.codebook().mean[torch.tensor([[1, 2, number]])] for number in (7, 6, 6)]
        >>> passes = find_passes(model, states)
        >>> print(passes_text(passes, character_tokenizer()))
        Noise (before flow 2)
        abf
        <BLANKLINE>
        Before flow 1: 0 of 3 tokens changed
        abf
        <BLANKLINE>
        Text: 1 of 3 tokens changed
        ab[g]
    """
    num_rows, length = states[0].shape[:2]
    if not 0 <= row < num_rows:
        raise ValueError(f"row must be in 0, ..., {num_rows - 1}, not {row}.")

    num_given = 0 if given_ids is None else len(given_ids)
    if num_given > length:
        raise ValueError(f"given_ids are {num_given} tokens, but the states have only {length}.")

    is_given = torch.arange(length) < num_given
    if given_mask is not None:
        if given_ids is None or given_mask.shape != given_ids.shape:
            raise ValueError(
                f"given_mask must have the shape ({num_given},) of given_ids, "
                f"not {tuple(given_mask.shape)}."
            )
        is_given[:num_given] = given_mask.cpu() != 0

    passes = []
    for level in reversed(range(len(states))):
        name = "Text" if level == 0 else f"Before flow {level}"
        if level > 0 and level == len(states) - 1:
            name = f"Noise (before flow {level})"

        token_ids = model.decode(states[level][row]).argmax(-1).cpu()
        if given_ids is not None:
            token_ids[:num_given] = torch.where(
                is_given[:num_given], given_ids.cpu(), token_ids[:num_given]
            )

        is_changed = token_ids != (passes[-1].token_ids if passes else token_ids)
        passes.append(Pass(name, token_ids, is_changed, is_given, is_first=not passes))

    return passes


@torch.no_grad()
def draw_passes(
    model: TarFlowLMModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str = "",
    prompt: str = "",
    seed: int = SEED,
    **options: Any,
) -> list[Pass]:
    """The passes of a text, beginning with its own noise; without a text those of a sample.

    Args:
        text: The text; the seed draws its latents.
        prompt: The beginning of the sample.
        options: Options of `generate`, for a sample.

    Raises:
        ValueError: If both a text and a prompt are given.
    """
    if text and prompt:
        raise ValueError(f"text and prompt can't both be given: {text!r}, {prompt!r}.")

    generator = torch.Generator(model.device).manual_seed(seed)
    given = text or prompt
    ids = torch.tensor([checked_ids(tokenizer, given)], device=model.device) if given else None

    if text:
        states = model.flow(model.encode(ids, generator=generator)).states
    else:
        states = model.generate(ids, generator=generator, output_states=True, **options).states

    return find_passes(model, states, given_ids=ids[0] if ids is not None and prompt else None)


def few_changes(passes: Sequence[Pass]) -> str:
    """Says in a sentence that only the last pass makes the text; empty if others do, too.

    A trained stack may leave nearly all of the work to its first flow. Its passes before the last
    look alike, as if something were broken.

    Args:
        passes: From the noise to the text.

    Example:
        >>> nowhere, everywhere = torch.zeros(40).bool(), torch.ones(40).bool()
        >>> ids = torch.arange(40)
        >>> noise = Pass("Noise", ids, nowhere, nowhere, is_first=True)
        >>> same = Pass("Before flow 1", ids, nowhere, nowhere)
        >>> text = Pass("Text", ids, everywhere, nowhere)
        >>> few_changes([noise, same, text]).split(":")[0]
        'The flows above the first changed no token of this text'
        >>> few_changes([noise, text])
        ''
    """
    above = passes[1:-1]
    if not above:
        return ""

    length = len(passes[-1].token_ids)
    is_changed = torch.stack([state.is_changed for state in above]).any(0)
    num_above, num_last = int(is_changed.sum()), int(passes[-1].is_changed.sum())
    if num_above > FEW * length or num_last <= num_above:
        return ""

    number, where = "no token", ""
    if num_above:
        number, where = f"only {num_above} of {length} tokens", "elsewhere "

    return (
        f"The flows above the first changed {number} of this text: {where}they move the states too "
        "little to change the most likely token. The first flow makes the text."
    )


def passes_text(
    passes: Sequence[Pass], tokenizer: PreTrainedTokenizerBase, color: bool = False
) -> str:
    """The passes for a terminal: changes in reverse video if `color`, otherwise in brackets."""
    blocks = []
    for state in passes:
        heading = ": ".join(filter(None, (state.name, state.summary())))
        blocks.append(f"{heading}\n{state.marked(tokenizer, color)}")

    return "\n\n".join(blocks)


def passes_section(
    passes: Sequence[Pass], tokenizer: PreTrainedTokenizerBase, heading: str = "h2"
) -> Markup:
    """The passes as a part of an HTML page: a list with one item for each, under a heading."""
    return render(
        "passes.html.j2",
        passes=passes,
        tokenizer=tokenizer,
        heading=heading,
        note=few_changes(passes),
    )


def passes_page(
    passes: Sequence[Pass], tokenizer: PreTrainedTokenizerBase, title: str = "From noise to text"
) -> str:
    """A self-contained HTML page: no script, nothing loaded, light or dark as the reader has it."""
    page = render(
        "passes_page.html.j2",
        title=title,
        has_given=any(bool(state.is_given.any()) for state in passes),
        passes=passes_section(passes, tokenizer),
    )
    return str(page)
