"""A page to try a checkpoint in: write with it, score a text of your own, edit one in the space of the flows.

    pip install -e ".[app]"
    python examples/app.py runs/demo/model         # a folder, or a repository of the Hub; no GPU needed

Each tab is a function from a model and what the visitor gave to HTML. `spaces/README.md` makes a Space of it.
"""

import argparse
import os
import re
from functools import partial, wraps
from html import escape

import gradio as gr
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tarflow_hf  # noqa: F401  registers the model, so that no remote code is needed
from tarflow_hf.passes import PASSES_STYLE, Pass, find_passes, passes_section
from tarflow_hf.token_likelihood import BITS_STYLE, likelihood_section

GAP = re.compile(r"\[([.…]+)\]")
STYLE = """\
.result { --line: var(--border-color-primary); --quiet: #5a5a66; --mark: #ffe9a3; }
.dark .result { --quiet: #a3a3b0; --mark: #5e4a00; }
.result .passes p { display: block; }
.result .note { color: var(--quiet); font-size: .875rem; max-width: 44rem; }
.result .written { white-space: pre-wrap; overflow-wrap: anywhere; }
.result .message { border-left: 4px solid #c2410c; padding: .5rem .75rem; }
"""


def friendly(function):
    """What is wrong with the input becomes a message on the page."""

    @wraps(function)
    def answer(*arguments):
        try:
            return function(*arguments)
        except ValueError as error:
            return f'<p class="message" role="alert">{escape(str(error))}</p>'

    return answer


def read(tokenizer, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """The ids of a text, and which characters of it each of them is."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    tokens = list(zip(encoded.input_ids, encoded.offset_mapping, strict=True))
    if unknown := dict.fromkeys(text[first:last] for token, (first, last) in tokens if token == tokenizer.unk_token_id):
        raise ValueError(f"The model's vocabulary does not have: {' '.join(unknown)}")
    if text.strip() and not tokenizer.decode(encoded.input_ids).strip():
        raise ValueError("Nothing of this text is in the model's vocabulary.")
    return encoded.input_ids, encoded.offset_mapping


def check_length(model, length: int, longest: int) -> None:
    patch_size = model.config.patch_size
    if length > longest:
        raise ValueError(f"The text has {length} tokens, and there is room for {longest}: make it shorter.")
    if length % patch_size:
        raise ValueError(f"This model takes {patch_size} tokens at a time: {length} is {length % patch_size} too many.")


def read_whole(model, tokenizer, text: str) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """A text to score or edit, as ids (1, T), and their offsets."""
    if not text.strip():
        raise ValueError("There is no text yet.")
    ids, offsets = read(tokenizer, text)
    check_length(model, len(ids), model.config.max_position_embeddings)
    return torch.tensor([ids], device=model.device), offsets


def seeded(seed: float | None, device: str | torch.device = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(int(seed or 0))


def has_mixture_weights(model) -> bool:
    return any(flow["coupling"] == "mixture_rosenblatt" for flow in model.config.flows)


@torch.no_grad()
def write(model, tokenizer, prompt, length, temperature, seed, top_p=1, mixture_temperature=1, num_candidates=1) -> str:
    """A text that begins with the prompt, or with its gaps filled; its passes; its likelihood."""
    ids, missing = [], []
    for n, piece in enumerate(GAP.split(prompt)):  # every other one is the inside of a gap
        piece_ids = [0] * len(piece.replace("…", "...")) if n % 2 else read(tokenizer, piece)[0]
        ids, missing = ids + piece_ids, missing + [n % 2] * len(piece_ids)
    longest = model.config.max_position_embeddings
    check_length(model, len(ids), longest if any(missing) else longest - model.config.patch_size)
    given, is_missing = torch.tensor(ids, dtype=torch.long), torch.tensor(missing, dtype=torch.bool)
    length = min(int(length), longest - len(ids))
    options = {"infill_mask": is_missing.unsqueeze(0)} if any(missing) else {"max_new_tokens": length}
    if has_mixture_weights(model):
        options |= {"top_p": float(top_p), "mixture_temperature": float(mixture_temperature)}
    out = model.generate(
        given.unsqueeze(0) if ids else None,
        temperature=float(temperature),
        num_candidates=int(num_candidates),
        generator=seeded(seed),
        output_states=True,
        eos_token_id=-1,  # what follows the end of a document is shown, too
        **options,
    )
    notes = ["The text that each flow's state decodes to. Tokens that differ from the pass before are marked."]
    runs_back = any(flow["direction"] == "right_to_left" for flow in model.config.flows)
    if not all(missing):
        notes.append("What you gave is in italics.")
        if not model.config.conditional and (runs_back or missing != sorted(missing)):
            notes.append("It is held fixed in the first flow only, which approximates the model's own distribution.")
    passes = find_passes(model, out.states, given_ids=given, given_mask=~is_missing)
    return (
        f'<h2>Text</h2>\n<p class="written" dir="auto">{escape(tokenizer.decode(out.sequences[0]))}</p>\n'
        f'<h2>From noise to text</h2>\n<p class="note">{" ".join(notes)}</p>\n{passes_section(passes, tokenizer)}\n'
        + likelihood_section(model, tokenizer, out.sequences.to(model.device), generator=seeded(0, model.device))
    )


@torch.no_grad()
def score(model, tokenizer, text) -> str:
    """The likelihood of a text."""
    ids, _ = read_whole(model, tokenizer, text)
    return likelihood_section(model, tokenizer, ids, generator=seeded(0, model.device))


@torch.no_grad()
def edit(model, tokenizer, text, part, start, num_flows, seed) -> str:
    """A text, and what it becomes with new noise for a part of it: the one at `start`, if it stands there."""
    ids, offsets = read_whole(model, tokenizer, text)
    start = start if text.startswith(part, start) else text.find(part)
    if not part or start < 0:
        raise ValueError("Say which part to redraw: select it in the text, or type it as it stands there.")
    is_redrawn = torch.tensor([first < start + len(part) and last > start for first, last in offsets])
    state = model.flow(model.encode(ids), num_flows=num_flows).noise
    noise = torch.randn(state.shape, generator=seeded(seed))
    state[:, is_redrawn] = noise[:, is_redrawn].to(state)
    edited = model.generate(noise=state, num_flows=num_flows, eos_token_id=-1)
    before, after, nowhere = ids[0].cpu(), edited[0].cpu(), torch.zeros(len(offsets), dtype=torch.bool)
    passes = [Pass("Before", before, nowhere, nowhere), Pass("After", after, before != after, nowhere)]
    return (
        f'<p class="note">{int(is_redrawn.sum())} of {len(offsets)} tokens were redrawn. Changes are marked.</p>\n'
        + passes_section(passes, tokenizer)
        + likelihood_section(model, tokenizer, edited, generator=seeded(0, model.device))
    )


def selected(event: gr.SelectData):
    return (event.value, event.index[0]) if event.value else (gr.skip(), gr.skip())


def page(model, tokenizer, name: str) -> gr.Blocks:
    config, num_flows = model.config, len(model.config.flows)
    bind = lambda function: friendly(partial(function, model, tokenizer))  # noqa: E731
    with gr.Blocks(title=f"TarFlowLM: {name}", analytics_enabled=False) as blocks:
        gr.Markdown(
            f"# TarFlowLM: {name}\nA language model that flows: noise becomes text in {num_flows} passes, one for each "
            f"flow ([paper](https://arxiv.org/abs/2507.00425)). {model.num_parameters():,} parameters, "
            f"{config.vocab_size:,} tokens in the vocabulary, texts of up to {config.max_position_embeddings} tokens."
        )
        with gr.Tab("Write"):
            prompt = gr.Textbox(
                label="Beginning", lines=2, max_length=20_000,
                info="May be empty. Or a text with gaps to fill, a dot for each token: the function [........] a list",
            )  # fmt: skip
            with gr.Row():
                most = config.max_position_embeddings
                length = gr.Slider(
                    config.patch_size, most, min(128, most), step=config.patch_size, label="New tokens", precision=0
                )
                temperature = gr.Slider(0.1, 1.5, 1, step=0.05, label="Temperature of the noise")
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**32 - 1)
            with gr.Accordion("Advanced", open=False), gr.Row():
                steers = has_mixture_weights(model)
                top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p of the mixture weights", visible=steers)
                mixture = gr.Slider(0.1, 1.5, 1, step=0.05, label="Temperature of the mixture weights", visible=steers)
                candidates = gr.Slider(1, 8, 1, step=1, label="Candidates: the likeliest is kept")
            inputs = [prompt, length, temperature, seed, top_p, mixture, candidates]
            button, result = gr.Button("Write", variant="primary"), gr.HTML(elem_classes="result")
            gr.on([button.click, prompt.submit], bind(write), inputs, result, api_name="write")
        with gr.Tab("Score"):
            text = gr.Textbox(label="Your text", lines=4, max_length=20_000)
            button, result = gr.Button("Score", variant="primary"), gr.HTML(elem_classes="result")
            gr.on([button.click, text.submit], bind(score), text, result, api_name="score")
        with gr.Tab("Edit"):
            text = gr.Textbox(label="Your text", lines=4, max_length=20_000, info="Select the part to redraw.")
            part, start = gr.Textbox(label="Part to redraw"), gr.State(0)
            text.select(
                selected, None, [part, start], show_progress="hidden", trigger_mode="multiple", api_visibility="private"
            )
            with gr.Row():
                names = [f"state after flow {n}" for n in range(1, num_flows)] + ["noise"]
                level = gr.Radio(list(zip(names, range(1, num_flows + 1))), value=num_flows, label="Redraw its")  # noqa: B905
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**32 - 1)
            button, result = gr.Button("Edit", variant="primary"), gr.HTML(elem_classes="result")
            gr.on([button.click, part.submit], bind(edit), [text, part, start, level, seed], result, api_name="edit")
    return blocks


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("CHECKPOINT", "runs/demo/model")
    parser.add_argument("checkpoint", nargs="?", default=default, help=f"default: $CHECKPOINT, now {default}")
    checkpoint = parser.parse_args().checkpoint
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    if torch.cuda.is_available():
        model.cuda()
    theme = gr.themes.Default(primary_hue="slate", font=["system-ui", "sans-serif"], font_mono=["ui-monospace"]).set(
        body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_300",
        block_label_text_color="*neutral_700", block_title_text_color="*neutral_700", slider_color="*primary_500",
    )  # fmt: skip
    css = STYLE + PASSES_STYLE + BITS_STYLE
    page(model, tokenizer, checkpoint).launch(theme=theme, css=css, footer_links=["api", "gradio", "settings"])


if __name__ == "__main__":
    main()
