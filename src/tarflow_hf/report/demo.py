"""The answers of the demo page (`examples/app.py`).

`write`, `score` and `edit` take a model in evaluation mode and a visitor's input, and return a part
of an HTML page with `STYLE_SHEET`. The same seed gives the same answer. If the model does not take
the text, they raise a `ValueError` that a visitor understands; `message` shows it. `settle` gives
the text of `write` while it comes about.
"""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import torch
from markupsafe import Markup
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..data import CharacterCount
from ..modeling.modeling_tarflowlm import TarFlowLMModel
from .bits import likelihood_of_text
from .page import STYLE_SHEET, render
from .passes import SEED, Pass, find_passes, passes_section

__all__ = ["SEED", "STYLE_SHEET", "edit", "message", "score", "settle", "write"]

GAP = re.compile(r"\[([.…]+)\]")


@torch.no_grad()
def write(
    model: TarFlowLMModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = SEED,
    **options: Any,
) -> str:
    """A text that begins with the prompt, its way from noise, and the bits of its tokens.

    Args:
        prompt: The beginning. In it `[...]` is a gap of as many tokens as dots. If there are gaps
            they are filled, and nothing follows.
        max_new_tokens: The largest number of tokens after a prompt without gaps.
        options: Other options of `generate`.

    Raises:
        ValueError: If the model does not take the prompt.
    """
    given, is_missing = _read_gaps(tokenizer, prompt)
    num_tokens = len(given)
    room = model.config.max_position_embeddings

    if is_missing.any():
        _check_length(model, num_tokens, room)
        options["infill_mask"] = is_missing.unsqueeze(0)
    else:
        _check_length(model, num_tokens, room - model.config.patch_size)
        options["max_new_tokens"] = min(max_new_tokens, room - num_tokens)

    out = model.generate(
        given.unsqueeze(0) if num_tokens else None,
        temperature=temperature,
        generator=torch.Generator().manual_seed(seed),
        output_states=True,
        eos_token_id=-1,  # the text goes on after the end of a document
        **options,
    )
    is_given = not bool(is_missing.all())
    runs_back = any(flow["direction"] == "right_to_left" for flow in model.config.flows)
    has_text_after = bool((is_missing[:-1] & ~is_missing[1:]).any())
    is_approximate = is_given and not model.config.conditional and (runs_back or has_text_after)
    passes = find_passes(model, out.states, given_ids=given, given_mask=~is_missing)

    answer = render(
        "demo/write.html.j2",
        text=tokenizer.decode(out.sequences[0]),
        is_given=is_given,
        is_approximate=is_approximate,
        passes=passes_section(passes, tokenizer),
        likelihood=_likelihood(model, tokenizer, out.sequences),
    )
    return str(_lost(tokenizer, GAP.sub("", prompt)) + answer)


def settle(
    model: TarFlowLMModel, tokenizer: PreTrainedTokenizerBase, *arguments: Any, **options: Any
) -> Iterator[str]:
    """The text of `write` as it settles, and then its answer.

    Certain text has the page's colour, the model's guess of the rest is grey. With several
    candidates (`num_candidates`) only the answer is given. Parts behind the first that nobody has
    waited for are left out.

    Args:
        arguments, options: Those of `write`.

    Raises:
        ValueError: As `write`.
    """
    parts: SimpleQueue[str | None] = SimpleQueue()
    if options.get("num_candidates", 1) == 1:
        options["streamer"] = _Settling(tokenizer, parts)

    with ThreadPoolExecutor(1) as executor:
        answer = executor.submit(write, model, tokenizer, *arguments, **options)
        answer.add_done_callback(lambda _: parts.put(None))
        part = parts.get()
        while part is not None:
            yield part
            part = parts.get()
            while part is not None and not parts.empty():
                part = parts.get()

        yield answer.result()


class _Settling:
    """A streamer that puts each state of a text into a queue, as a part of an HTML page."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, parts: SimpleQueue):
        self.tokenizer, self.parts = tokenizer, parts
        self.certain: list[int] = []
        self.guess: list[int] = []  # behind it

    def put(self, value: Tensor) -> None:
        new = value.flatten().tolist()
        self.certain += new
        self.guess = self.guess[len(new) :]
        self._show()

    def put_draft(self, value: Tensor) -> None:
        new = value.flatten().tolist()
        self.guess = new + self.guess[len(new) :]
        self._show()

    def end(self) -> None:
        self.guess = []

    def _show(self) -> None:
        certain = self.tokenizer.decode(self.certain)
        text = self.tokenizer.decode(self.certain + self.guess)
        # Half a character at the end of what is certain is a part of the guess.
        while certain and not text.startswith(certain):
            certain = certain[:-1]

        part = render("demo/settle.html.j2", certain=certain, guess=text[len(certain) :])
        self.parts.put(str(part))


@torch.no_grad()
def score(model: TarFlowLMModel, tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The bits of a text, and of each of its tokens.

    Raises:
        ValueError: If the model does not take the text.
    """
    ids, _ = _read_whole(model, tokenizer, text)
    return str(_lost(tokenizer, text) + _likelihood(model, tokenizer, ids))


@torch.no_grad()
def edit(
    model: TarFlowLMModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    part: str,
    start: int = 0,
    num_flows: int | None = None,
    seed: int = SEED,
) -> str:
    """A text before and after the noise of a part of it is drawn again.

    Args:
        part: The part to redraw: the one that begins at character `start`, if it stands there, or
            the first in the text.
        num_flows: Redraws the state after these flows in place of the noise.

    Raises:
        ValueError: If the model does not take the text, or the text has no such part.
    """
    ids, offsets = _read_whole(model, tokenizer, text)
    first = start if text.startswith(part, start) else text.find(part)
    if not part or first < 0:
        raise ValueError(
            "Say which part to redraw: select it in the text, or type it as it stands there."
        )

    is_redrawn = torch.tensor([a < first + len(part) and b > first for a, b in offsets])
    generator = torch.Generator().manual_seed(seed)
    state = model.flow(model.encode(ids, generator), num_flows=num_flows).noise
    state[:, is_redrawn] = torch.randn(state.shape, generator=generator)[:, is_redrawn].to(state)
    edited = model.generate(noise=state, num_flows=num_flows)

    before, after = ids[0].cpu(), edited[0].cpu()
    nowhere = torch.zeros_like(is_redrawn)
    passes = [
        Pass("Before", before, nowhere, nowhere, is_first=True),
        Pass("After", after, before != after, nowhere),
    ]

    answer = render(
        "demo/edit.html.j2",
        num_redrawn=int(is_redrawn.sum()),
        num_tokens=len(offsets),
        passes=passes_section(passes, tokenizer),
        likelihood=_likelihood(model, tokenizer, edited),
    )
    return str(_lost(tokenizer, text) + answer)


def message(error: Exception) -> str:
    """An error in a visitor's input as a part of the page."""
    return str(render("demo/message.html.j2", message=str(error)))


def _lost(tokenizer: PreTrainedTokenizerBase, text: str) -> Markup:
    """A paragraph on the characters that the tokenizer drops; empty if it drops none."""
    characters = CharacterCount(tokenizer)
    characters.add(text)
    note = characters.note("your text")
    return Markup('<p class="note">{}</p>\n').format(note) if note else Markup()


def _likelihood(model: TarFlowLMModel, tokenizer: PreTrainedTokenizerBase, ids: Tensor) -> Markup:
    return likelihood_of_text(
        model, tokenizer, ids.to(model.device), generator=torch.Generator().manual_seed(0)
    )


def _read_gaps(tokenizer: PreTrainedTokenizerBase, prompt: str) -> tuple[Tensor, Tensor]:
    """The ids (n,) of a prompt, 0 in its gaps, and a mask (n,) that is True there."""
    ids: list[int] = []
    is_missing: list[bool] = []

    for n, piece in enumerate(GAP.split(prompt)):
        is_gap = n % 2 == 1  # every other piece is the inside of a gap
        piece_ids = [0] * len(piece.replace("…", "...")) if is_gap else _read(tokenizer, piece)[0]
        ids += piece_ids
        is_missing += [is_gap] * len(piece_ids)

    return torch.tensor(ids, dtype=torch.long), torch.tensor(is_missing, dtype=torch.bool)


def _read(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """The ids of a text, and for each id the span [start, end) of its characters."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded.input_ids, encoded.offset_mapping

    unknown = [
        text[a:b]
        for token, (a, b) in zip(ids, offsets, strict=True)
        if token == tokenizer.unk_token_id
    ]
    if unknown:
        raise ValueError(
            f"The model's vocabulary does not have: {' '.join(dict.fromkeys(unknown))}"
        )
    if text.strip() and not tokenizer.decode(ids).strip():
        raise ValueError("Nothing of this text is in the model's vocabulary.")

    return ids, offsets


def _read_whole(
    model: TarFlowLMModel, tokenizer: PreTrainedTokenizerBase, text: str
) -> tuple[Tensor, list[tuple[int, int]]]:
    """The ids (1, T) of a text to score or edit, and the spans of their characters."""
    if not text.strip():
        raise ValueError("There is no text yet.")

    ids, offsets = _read(tokenizer, text)
    _check_length(model, len(ids), model.config.max_position_embeddings)
    return torch.tensor([ids], device=model.device), offsets


def _check_length(model: TarFlowLMModel, length: int, room: int) -> None:
    patch_size = model.config.patch_size
    if length > room:
        raise ValueError(
            f"The text has {length} tokens, and there is room for {room}: make it shorter."
        )
    if length % patch_size:
        raise ValueError(
            f"This model takes {patch_size} tokens at a time: {length} is {length % patch_size} "
            "too many."
        )
