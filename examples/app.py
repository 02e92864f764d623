"""Serve a page to try a checkpoint: write, score a text, edit one in the space of the flows.

    pip install -e ".[app]"
    python examples/app.py runs/demo/model         # a folder, or a repository of the Hub; no GPU needed

`spaces/README.md` says how to make a Space of it. `GRADIO_SERVER_NAME` and `GRADIO_SERVER_PORT` say
where it listens.
"""

import argparse
import os
from functools import wraps
from inspect import isgeneratorfunction

import gradio as gr
import torch

from tarflow_hf.loading import load_checkpoint
from tarflow_hf.report import demo

THEME = gr.themes.Default(
    primary_hue="slate", font=["system-ui", "sans-serif"], font_mono=["ui-monospace"]
).set(
    body_text_color_subdued="*neutral_600",  # the theme's own is too pale to read
    body_text_color_subdued_dark="*neutral_300",
    block_label_text_color="*neutral_700",
    block_title_text_color="*neutral_700",
)

TEXTS = ["the function returns a list of strings", "a list returns the function"]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = os.environ.get("CHECKPOINT", "runs/demo/model")
    parser.add_argument(
        "checkpoint",
        nargs="?",
        default=default,
        help="default: $CHECKPOINT, or else runs/demo/model",
    )
    checkpoint = parser.parse_args().checkpoint
    model, tokenizer = load_checkpoint(checkpoint, "cuda" if torch.cuda.is_available() else "cpu")
    footer = ["api", "gradio", "settings"]
    page(model, tokenizer, checkpoint).launch(
        theme=THEME, css_paths=demo.STYLE_SHEET, footer_links=footer
    )


def page(model, tokenizer, name: str) -> gr.Blocks:
    config = model.config

    with gr.Blocks(title=f"TarFlowLM: {name}", analytics_enabled=False) as blocks:
        gr.Markdown(
            f"# TarFlowLM: {name}\nA language model that turns noise into text by an invertible map "
            f"([paper](https://arxiv.org/abs/2507.00425)). Flows: {len(config.flows)}, "
            f"{model.num_parameters():,} parameters, "
            f"{config.vocab_size:,} tokens in the vocabulary, texts of up to "
            f"{config.max_position_embeddings} tokens."
        )
        with gr.Tab("Write"):
            write_tab(model, tokenizer)
        with gr.Tab("Score"):
            score_tab(model, tokenizer)
        with gr.Tab("Edit"):
            edit_tab(model, tokenizer)

    return blocks


def write_tab(model, tokenizer) -> None:
    has_weights = any(flow["coupling"] == "mixture_rosenblatt" for flow in model.config.flows)

    def write(prompt, length, temperature, seed, top_p, mixture_temperature, num_candidates):
        options = {"num_candidates": num_candidates, "temperature": temperature}
        if has_weights:
            options |= {"top_p": top_p, "mixture_temperature": mixture_temperature}
        yield from demo.settle(model, tokenizer, prompt, length, seed=seed or 0, **options)

    hint = (
        "May be empty. Or a text with gaps to fill, a dot for each token: "
        "the function [........] a list"
    )
    prompt = text_box("Beginning", info=hint)

    with gr.Row():
        step, most = model.config.patch_size, model.config.max_position_embeddings
        default = min(128, most) // step * step
        length = slider("New tokens", step, most, default, step)
        temperature = slider("Temperature of the noise", 0.1, 1.5)
        seed = seed_box()

    with gr.Accordion("Advanced", open=False), gr.Row():
        top_p = slider("Top-p of the mixture weights", 0.05, 1, visible=has_weights)
        mixture = slider("Temperature of the mixture weights", 0.1, 1.5, visible=has_weights)
        candidates = slider("Candidates: the likeliest is kept", 1, 8, step=1)

    gr.Examples(["the function returns ", "the function [........] a list"], prompt)
    act(write, [prompt, length, temperature, seed, top_p, mixture, candidates], prompt)


def score_tab(model, tokenizer) -> None:
    def score(text):
        return demo.score(model, tokenizer, text)

    text = text_box("Your text")
    gr.Examples(TEXTS, text)
    act(score, text, text)


def edit_tab(model, tokenizer) -> None:
    def edit(text, part, start, num_flows, seed):
        return demo.edit(model, tokenizer, text, part, start, num_flows, seed or 0)

    text = text_box("Your text", info="Select the part to redraw.")
    part, start = gr.Textbox(label="Part to redraw"), gr.State(0)

    # "multiple": selections come faster than they are handled, and the last one counts.
    hidden = {"show_progress": "hidden", "api_visibility": "private"}
    gr.Examples(TEXTS, text)
    text.select(selected, None, [part, start], trigger_mode="multiple", **hidden)

    with gr.Row():
        num_flows = len(model.config.flows)
        levels = [(f"state after flow {n}", n) for n in range(1, num_flows)]
        levels.append(("noise", num_flows))
        level = gr.Radio(levels, value=num_flows, label="Redraw its")
        seed = seed_box()

    act(edit, [text, part, start, level, seed], part)


def selected(event: gr.SelectData):
    """The selected part of a text, and its start."""
    return (event.value, event.index[0]) if event.value else (gr.skip(), gr.skip())


def act(answer, inputs, text_box) -> None:
    """A button, and the place for the answer to the inputs."""
    button = gr.Button(answer.__name__.title(), variant="primary")
    result = gr.HTML(elem_classes="result")
    gr.on([button.click, text_box.submit], friendly(answer), inputs, result)


def friendly(answer):
    """Wraps a function, or one that yields, so that its errors become messages on the page."""

    @wraps(answer)
    def answer_or_message(*arguments):
        try:
            return answer(*arguments)
        except ValueError as error:
            return demo.message(error)

    @wraps(answer)
    def answers_or_message(*arguments):
        try:
            yield from answer(*arguments)
        except ValueError as error:
            yield demo.message(error)

    return answers_or_message if isgeneratorfunction(answer) else answer_or_message


def text_box(label, **options) -> gr.Textbox:
    return gr.Textbox(label=label, lines=3, max_length=20_000, **options)


def seed_box() -> gr.Number:
    return gr.Number(demo.SEED, label="Seed", precision=0, minimum=0, maximum=2**32 - 1)


def slider(label, minimum, maximum, value=1, step=0.05, **options) -> gr.Slider:
    precision = 0 if step == int(step) else None
    options |= {"step": step, "precision": precision, "label": label, "min_width": 250}
    return gr.Slider(minimum, maximum, value, **options)


if __name__ == "__main__":
    main()
