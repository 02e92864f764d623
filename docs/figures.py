"""The figures of the README and of the site, drawn by the code that they explain.

    python docs/figures.py              # docs/images/*.svg

Needs matplotlib. The model is the one in checkpoints/python-docs, and the curves are those of
benchmarks/results/infilling.jsonl and watermark.jsonl.
"""

import argparse
import json
import runpy
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tarflow_hf import TarFlowLMModel
from tarflow_hf.evaluation import token_bits
from tarflow_hf.modeling.coupling import affine, mixture_cdf, mixture_rosenblatt
from tarflow_hf.modeling.normal import normal_log_prob

ROOT = Path(__file__).parents[1]
TEXT = "the function returns a list"
BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#5a5a66"

plt.rcParams.update({
    "svg.hashsalt": "docs",  # the same file at every run
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
})  # fmt: skip


# --------------------------------------------------------------------------------------------------
# tokens -> latents -> noise
# --------------------------------------------------------------------------------------------------


def draw_pipeline(model: TarFlowLMModel, tokenizer: PreTrainedTokenizerBase):
    """A text, its latents and its noise; a column is a token, a row a latent dimension."""
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    generator = torch.Generator().manual_seed(0)

    with torch.no_grad():
        flow = model.flow(model.encode(ids, generator))

    figure = plt.figure(figsize=(9, 3.5))
    left, width, height = 0.1, 0.52, 0.3
    grids = (("latents z", flow.latents, 0.5), ("noise u", flow.noise, 0.04))

    for column, letter in enumerate(TEXT):
        x = left + width * (column + 0.5) / len(TEXT)
        figure.text(x, 0.9, letter, ha="center", va="center", family="monospace", size=13)

    figure.text(left - 0.015, 0.9, "tokens x", ha="right", va="center", weight="bold")

    for label, state, bottom in grids:
        axes = figure.add_axes((left, bottom, width, height))
        axes.imshow(state[0].T.numpy(), cmap="RdBu", vmin=-2.5, vmax=2.5, aspect="auto")
        axes.set_axis_off()
        middle = bottom + height / 2
        figure.text(left - 0.015, middle, label, ha="right", va="center", weight="bold")

    right = left + width
    steps = (
        (0.83, "encode: a Gaussian for each token", "decode: the most likely token"),
        (0.42, "flows: invertible transformers", "their inverse"),
    )
    for y, down, up in steps:
        figure.text(right + 0.05, y + 0.035, f"↓  {down}", va="center", color=BLUE)
        figure.text(right + 0.05, y - 0.035, f"↑  {up}", va="center", color=ORANGE)

    figure.text(right + 0.05, 0.19, "↓ gives a bound on the likelihood", va="center", color=BLUE)
    figure.text(right + 0.05, 0.12, "↑ starts from N(0, I): generates", va="center", color=ORANGE)
    return figure


# --------------------------------------------------------------------------------------------------
# The codebook
# --------------------------------------------------------------------------------------------------


def draw_codebook(model: TarFlowLMModel, tokenizer: PreTrainedTokenizerBase):
    """The Gaussian of each token in the two directions in which the means differ most."""
    with torch.no_grad():
        codebook = model.codebook()

    centred = codebook.mean - codebook.mean.mean(0)
    directions = torch.linalg.svd(centred, full_matrices=False).Vh[:2]  # (2, d)
    place = centred @ directions.T  # (V, 2)
    figure, axes = plt.subplots(figsize=(5, 4.2), layout="constrained")

    for token, (x, y) in enumerate(place.tolist()):
        scale = codebook.log_scale[token].exp().item()
        axes.add_patch(plt.Circle((x, y), 2 * scale, color=BLUE, alpha=0.2, linewidth=0))
        letter = tokenizer.decode([token]).replace(" ", "␣")
        axes.text(x, y, letter, ha="center", va="center", family="monospace")

    limit = place.abs().max().item() + 0.5
    axes.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    axes.set(xlabel="first principal direction", ylabel="second")
    return figure


# --------------------------------------------------------------------------------------------------
# The couplings
# --------------------------------------------------------------------------------------------------

WEIGHT = torch.tensor([0.5, 0.3, 0.2])
MEAN = torch.tensor([-1.5, 0.5, 2.5])
SCALE = torch.tensor([0.4, 0.3, 0.5])


def density(z: Tensor) -> Tensor:
    """p(z) (n,) of a mixture of three Gaussians."""
    t = (z[:, None] - MEAN) / SCALE
    return (WEIGHT * normal_log_prob(t).exp() / SCALE).sum(-1)


def draw_couplings():
    """An affine coupling and Mix-1 applied to one dimension, and Mix-d to two."""
    z = torch.linspace(-3, 4.2, 250)
    figure, (first, second, third) = plt.subplots(1, 3, figsize=(9.5, 3.2), layout="constrained")

    loc = (WEIGHT * MEAN).sum()
    variance = (WEIGHT * (SCALE**2 + MEAN**2)).sum() - loc**2
    u, log_det = affine(z, loc, variance.log() / 2)
    draw_change(first, "affine", z, u, log_det)

    parameters = (parameter.expand(len(z), 3) for parameter in (WEIGHT.log(), MEAN, SCALE.log()))
    u, log_det = mixture_cdf(z, *parameters)
    draw_change(second, "Mix-1", z, u, log_det)

    draw_rosenblatt(third)
    return figure


def draw_change(axes, name: str, z: Tensor, u: Tensor, log_det: Tensor) -> None:
    """p(z) and the density of u = f(z), which is p(z) / (du/dz), beside that of N(0, 1)."""
    p = density(z)
    density_of_u = p * torch.exp(-log_det)
    axes.plot(z.numpy(), p.numpy(), color=GREY, linestyle=":", label="p(z)")
    axes.plot(u.numpy(), density_of_u.numpy(), color=BLUE, label="density of u")

    noise = torch.linspace(-3, 3, 100)
    normal = normal_log_prob(noise).exp()
    axes.plot(noise.numpy(), normal.numpy(), color=ORANGE, linestyle="--", label="N(0, 1)")
    axes.set(title=name, xlim=(-3.2, 4.2), yticks=[])
    axes.legend(frameon=False, fontsize=8)


def draw_rosenblatt(axes) -> None:
    """Samples of three Gaussians in the plane, and the noise that Mix-d takes each of them to."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.tensor([[-1.5, 1.0], [0.3, -1.2], [2.0, 1.2]])
    token = torch.multinomial(WEIGHT, 100, replacement=True, generator=generator)
    z = mean[token] + 0.3 * torch.randn(100, 2, generator=generator)
    u, _ = mixture_rosenblatt(z, WEIGHT.log().expand(100, 3), mean, torch.full((3,), 0.3).log())

    for index, color in enumerate((BLUE, ORANGE, GREEN)):
        of_token = token == index
        axes.plot(*z[of_token].T.numpy(), ".", color=color, markersize=3)
        moved = u[of_token] + torch.tensor([7.0, 0.0])
        axes.plot(*moved.T.numpy(), ".", color=color, markersize=3)

    axes.annotate("", (4.3, 0), (3.1, 0), arrowprops={"arrowstyle": "->", "color": GREY})
    axes.set(title="Mix-d", aspect="equal", ylim=(-3.5, 3.2))
    axes.set_axis_off()
    axes.text(0.2, -3.3, "z: a Gaussian a token", ha="center", size=8)
    axes.text(7.0, -3.3, "u: N(0, I)", ha="center", size=8)


# --------------------------------------------------------------------------------------------------
# Directions
# --------------------------------------------------------------------------------------------------


def draw_directions():
    """The positions that the parameters of each position read, in flows of each direction."""
    figure, panels = plt.subplots(1, 3, figsize=(8, 2.9), layout="constrained")
    reads = torch.ones(8, 8).tril(-1)  # row n reads the columns before it
    own = 0.45 * torch.eye(8)

    for axes, name, mask in (
        (panels[0], "left to right", reads),
        (panels[1], "right to left", reads.T),
        (panels[2], "both, one after the other", reads + reads.T),
    ):
        axes.imshow((mask + own).numpy(), cmap="Blues", vmin=0, vmax=1.4)
        axes.set(title=name, xticks=[], yticks=[], xlabel="positions read")

    panels[0].set_ylabel("position transformed")
    return figure


def read_rows(name: str) -> list[dict]:
    """The rows of a benchmark's results."""
    path = ROOT / "benchmarks" / "results" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --------------------------------------------------------------------------------------------------
# Gaps
# --------------------------------------------------------------------------------------------------

RUNS = {
    "converted": ("pretrained body", BLUE, "o-"),
    "converted_lora": ("pretrained body, LoRA", GREEN, "s-"),
    "scratch_longer": ("from random weights", ORANGE, "^-"),
}


def draw_infilling():
    """The bits of a token in a gap, by steps of training for gaps, and those of left to right."""
    rows = read_rows("infilling")
    curves = [row for row in rows if row["kind"] == "curve"]
    gap = curves[0]["gap"]
    figure, axes = plt.subplots(figsize=(6.4, 3.4), layout="constrained")

    for run, (label, color, style) in RUNS.items():
        points = [(row["step"], row["bits"]) for row in curves if row["run"] == run]
        steps, bits = zip(*points, strict=True)
        axes.plot(steps, bits, style, color=color, label=label, markersize=4)

    (reference,) = (
        row["bits"]
        for row in rows
        if (row["kind"], row["gap"], row["run"]) == ("gap", gap, "left_to_right_longer")
    )
    axes.axhline(reference, color=GREY, linestyle="--", label="left to right, reads one side")
    axes.set(xlabel="steps of training for gaps", ylabel=f"bits a token, gaps of {gap}")
    axes.legend(frameon=False)
    return figure


# --------------------------------------------------------------------------------------------------
# Noise
# --------------------------------------------------------------------------------------------------


MARKS = {
    "NoiseWatermark": ("NoiseWatermark", BLUE, "o-"),
    "WatermarkingConfig": ("green lists", ORANGE, "s-"),
    "SynthID-Text": ("SynthID-Text", GREEN, "^-"),
}


def draw_watermark():
    """Evidence for each mark against the number of tokens, at two temperatures, and after edits."""
    rows = read_rows("watermark")
    rows = [row for row in rows if row["kind"] == "power" and row["model"] == "SmolLM2-135M"]
    figure, (whole, cooler, edits) = plt.subplots(
        1, 3, figsize=(9.6, 3.2), layout="constrained", sharey=True
    )

    for mark, (label, color, style) in MARKS.items():
        for axes, temperature in ((whole, 1.0), (cooler, 0.7)):
            own = [
                row
                for row in rows
                if (row["mark"], row["edit"], row["temperature"]) == (mark, "none", temperature)
            ]
            points = [(row["tokens"], -row["median"]) for row in own]
            axes.plot(*zip(*points, strict=True), style, color=color, label=label, markersize=4)
            axes.set(title=f"temperature {temperature:g}", xlabel="tokens")

        for edit, line in (("replaced", "-"), ("deleted", "--"), ("inserted", ":")):
            own = [
                row
                for row in rows
                if (row["mark"], row["temperature"]) == (mark, 1.0) and row["edit"] == edit
            ]
            points = [(100 * row["rate"], -row["median"]) for row in own]
            edits.plot(*zip(*points, strict=True), line, color=color, marker="o", markersize=3)

    edits.set(title=f"{own[0]['tokens']} tokens, edited, temperature 1", xlabel="% of the tokens")
    for edit, line in (("replaced", "-"), ("deleted", "--"), ("inserted", ":")):
        edits.plot([], [], line, color=GREY, label=edit)

    for axes in (whole, cooler, edits):
        for level in (3, 6):
            axes.axhline(level, color=GREY, linewidth=0.6)

    whole.set(ylabel="median of p", yscale="log", ylim=(0.5, 60))
    whole.set_yticks([1, 3, 6, 10, 30], [f"1e-{n}" for n in (1, 3, 6, 10, 30)])
    whole.set_yticks([], minor=True)
    whole.legend(frameon=False)
    edits.legend(frameon=False)
    return figure


@torch.no_grad()
def draw_counterfactual(model: TarFlowLMModel, tokenizer: PreTrainedTokenizerBase):
    """A text and the nearest that has a word: their letters, and the bits of each."""
    nearest_noise = runpy.run_path(str(ROOT / "examples" / "counterfactual.py"))["nearest_noise"]
    text, word = "the function returns a list of strings", "class"
    ids, word = (torch.tensor(tokenizer(x).input_ids) for x in (text, word))
    generator = torch.Generator().manual_seed(0)
    noise = model.noise_of(ids[None], generator=generator)
    near = nearest_noise(model, noise, word, generator=generator)
    texts = [ids[None], model.generate(noise=near)]
    is_moved = (near != noise).any(-1)[0].tolist()

    figure, both = plt.subplots(2, 1, figsize=(9, 3.2), layout="constrained")
    for axes, tokens, color in zip(both, texts, (BLUE, ORANGE), strict=True):
        bits = token_bits(model, tokens, num_samples=4, generator=generator)[0].tolist()
        is_same = (tokens == texts[0])[0] & (tokens == texts[1])[0]
        colors = ["#c8c8cf" if same else color for same in is_same.tolist()]
        axes.bar(range(len(bits)), [max(x, 0.0) for x in bits], color=colors)
        letters = [tokenizer.decode([token]).replace(" ", "␣") for token in tokens[0].tolist()]
        axes.set_xticks(range(len(letters)), letters, family="monospace")
        axes.tick_params(axis="x", length=0)
        axes.set(ylabel="bits", ylim=(0, 6))
        axes.set_title(f"{sum(bits):.1f} bits in all", loc="right", fontsize=9, color=color)

    for place, moved in enumerate(is_moved):
        if moved:
            both[1].get_xticklabels()[place].set(color=ORANGE, weight="bold")

    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images", help="a folder")
    folder = parser.parse_args().output

    checkpoint = ROOT / "checkpoints" / "python-docs"
    model = TarFlowLMModel.from_pretrained(checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    figures = {
        "pipeline": draw_pipeline(model, tokenizer),
        "codebook": draw_codebook(model, tokenizer),
        "couplings": draw_couplings(),
        "directions": draw_directions(),
        "infilling": draw_infilling(),
        "watermark": draw_watermark(),
        "counterfactual": draw_counterfactual(model, tokenizer),
    }

    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
