"""The sections of a report: plain results in, a `Section` out."""

import io
import re
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..evaluation import WHAT_IS_SCORED, Evaluation, Likelihood
from ..flops import FlopCount, patch_size_rows
from ..generative_metrics import NOT_MEASURED, Sample, SampleEvaluation, sample_rows
from ..latent_evolution import MEASURES, Evolution
from ..modeling.modeling_tarflowlm import TarFlowLMModel
from ..provenance import Provenance
from .page import Section
from .passes import NOT_PRINTABLE, Pass, passes_section
from .plots import plot_measure, plot_patch_sizes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# --------------------------------------------------------------------------------------------------
# Parts of a section. What they are given is plain text, unless it is called HTML.
# --------------------------------------------------------------------------------------------------


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column names the rows; it scrolls by itself where it is too wide.

    Example:
        >>> print(table("Sizes", ["what", "how many"], [["a < b", "2"]]))
        <div class="wide" role="region" aria-label="Sizes" tabindex="0">
        <table>
        <caption>Sizes</caption>
        <thead><tr><th scope="col">what</th><th scope="col">how many</th></tr></thead>
        <tbody>
        <tr><th scope="row">a &lt; b</th><td>2</td></tr>
        </tbody>
        </table>
        </div>
    """
    columns = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    lines = "\n".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'
        for name, *cells in rows
    )

    return (
        f'<div class="wide" role="region" aria-label="{escape(caption)}" tabindex="0">\n<table>\n'
        f"<caption>{escape(caption)}</caption>\n<thead><tr>{columns}</tr></thead>\n<tbody>\n{lines}\n</tbody>\n"
        "</table>\n</div>"
    )


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def reproduce(command: str, what: str = "Reproduce") -> str:
    """The command line that prints the same. Lines break between its words, not inside of an
    option's name.
    """
    words = re.sub(r"(?<= )--\w+", r"<span>\g<0></span>", escape(command))
    return f'<div class="command"><p>{escape(what)}:</p>\n<pre><code>{words}</code></pre></div>'


def text_block(text: str) -> str:
    """A text of a model as it is: spaces and line breaks too, and without what would reorder or
    hide it.
    """
    return f'<p class="sample" dir="auto">{escape(NOT_PRINTABLE.sub(chr(0xFFFD), text))}</p>'


def inline_svg(figure: "Figure", name: str, title: str, description: str) -> str:
    """A picture of `plots` as an element of the page, in the page's colours.

    Args:
        name: Unique in the page: all ids in the picture begin with it.
        title: What it is, in a few words.
        description: What it shows, for who does not see it.
    """
    import matplotlib

    content = io.StringIO()
    # Text stays text, and the same picture has the same bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(content, format="svg", transparent=True, metadata={"Date": None})

    svg = content.getvalue()
    svg = re.sub(
        r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL
    )
    width, height = re.findall(r'viewBox="0 0 (\S+) (\S+)"', svg)[0]
    inside = svg[svg.index(">", svg.index("<svg")) + 1 :]
    inside = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", inside)
    inside = re.sub(r"font-family: [^;\"]*;?", "", inside).replace("#000000", "currentColor")

    return (
        f'<svg role="img" aria-labelledby="{name}-title {name}-description" viewBox="0 0 {width} {height}">\n'
        f'<title id="{name}-title">{escape(title)}</title>\n'
        f'<desc id="{name}-description">{escape(description)}</desc>\n{inside.strip()}'
    )


# --------------------------------------------------------------------------------------------------
# Sections
# --------------------------------------------------------------------------------------------------


def model_section(model: PreTrainedModel, provenance: Provenance) -> Section:
    """What the checkpoint is."""
    config = model.config
    rows = [
        (
            "kind",
            provenance.model_type
            if isinstance(model, TarFlowLMModel)
            else f"discrete, {provenance.model_type}",
        ),
        ("parameters", f"{provenance.num_parameters:,}"),
        ("longest sequence, tokens", f"{config.max_position_embeddings:,}"),
        ("vocabulary", f"{config.vocab_size:,}"),
        ("width", f"{config.hidden_size:,}"),
    ]

    if not isinstance(model, TarFlowLMModel):
        rows.append(("layers", str(config.num_hidden_layers)))
        return Section("model", "The model", table("Configuration", ["what", "value"], rows))

    rows += [
        ("latent size of a token", str(config.latent_size)),
        ("patch size, tokens", str(config.patch_size)),
        ("may be told tokens (conditional)", "yes" if config.conditional else "no"),
    ]
    flows = [
        (
            str(number),
            flow["coupling"].replace("_", " "),
            flow["direction"].replace("_", " "),
            str(flow["num_hidden_layers"]),
            f"{flow['num_components']:,}" if "num_components" in flow else "none",
        )
        for number, flow in enumerate(config.flows, 1)
    ]
    head = ["flow", "coupling", "direction", "layers", "components"]
    stack = table("The flows, from the data side to the noise side", head, flows)

    return Section(
        "model", "The model", table("Configuration", ["what", "value"], rows) + "\n" + stack
    )


def likelihood_section(
    evaluation: Evaluation, rows: dict[str, Likelihood], command: str
) -> Section:
    """Of `evaluate_text`: the bounds, or the exact figure."""
    e, columns = evaluation, list(rows.values())
    kind = (
        "All of these are upper bounds on the true figures: the more samples of the latents, the tighter."
        if e.is_upper_bound
        else "All of these are exact."
    )
    measures = [
        ("nats per token", [f"{row.nats_per_token:.4f}" for row in columns]),
        ("its standard error", [f"{row.standard_error:.4f}" for row in columns]),
        (
            "bits per character",
            [f"{row.bits_per_character(e.characters_per_token):.4f}" for row in columns],
        ),
        ("perplexity of a token", [f"{row.perplexity:.3f}" for row in columns]),
    ]

    if e.tokens_per_word is not None:
        measures.append(
            (
                "perplexity of a word",
                [f"{row.perplexity_per_word(e.tokens_per_word):.1f}" for row in columns],
            )
        )

    caption = f"Likelihood of {e.num_tokens:,} tokens in {e.num_sequences:,} sequences of {e.data}"
    body = [
        paragraph(
            f"{kind} {WHAT_IS_SCORED} The standard error is over the sequences: it holds for text like this one."
        ),
        table(caption, ["measure", *rows], [(name, *cells) for name, cells in measures]),
        reproduce(command),
    ]

    return Section("likelihood", "Likelihood of held-out text", "\n".join(body))


def codebook_section(evaluation: Evaluation, command: str) -> Section:
    """Of `evaluate_text`: what comes back from the latents, and where the entries of the codebook
    are.
    """
    e = evaluation
    given_back = [
        ("tokens that come back", f"{e.reconstruction_accuracy:.4%}"),
        (
            "its standard error",
            "unknown" if e.num_sequences == 1 else f"{e.reconstruction_standard_error:.4%}",
        ),
        ("different tokens in the text", f"{e.num_text_tokens:,}"),
        ("different tokens that come back", f"{e.num_used_tokens:,}"),
    ]
    entries = [
        ("entries", f"{e.codebook_entries:,}"),
        ("latent size", str(e.codebook_latent_size)),
        ("smallest scale", f"{e.codebook_scale_min:.4g}"),
        ("mean scale", f"{e.codebook_scale_mean:.4g}"),
        ("largest scale", f"{e.codebook_scale_max:.4g}"),
        ("nearest two entries, in scales", f"{e.codebook_nearest_distance_min:.3g}"),
        ("nearest entry in the median, in scales", f"{e.codebook_nearest_distance_median:.3g}"),
    ]
    body = [
        paragraph(
            "A token becomes a latent vector, drawn around its entry in the codebook, and the vector the most likely "
            "token. An entry's scale is its standard deviation; entries at a distance of 2 r scales are taken for each "
            "other with probability Φ(-r)."
        ),
        table("Reconstruction of the same text", ["what", "value"], given_back),
        table("The codebook", ["what", "value"], entries),
        reproduce(command),
    ]

    return Section("codebook", "Reconstruction and codebook", "\n".join(body))


def samples_section(
    evaluation: SampleEvaluation, samples: Sequence[Sample], command: str
) -> Section:
    """Of `evaluate_samples`: the metrics, their warnings, and some of the samples."""
    e = evaluation
    rows = [(name, own, text or "of both") for name, own, text in sample_rows(e)]

    if e.judge is None:
        rows += [
            (name, "not measured", "not measured") for name in ("generative perplexity", "MAUVE")
        ]

    caption = f"{e.num_samples:,} samples of {e.length:,} tokens, and as many sequences of {e.data}"
    body = [
        paragraph(
            "Entropy is that of the tokens within a sequence, in the mean; repeated 4-grams are those that have "
            "occurred in their sequence before; distinct n-grams are counted over all sequences. None of these means "
            "anything alone: compare with the text."
        ),
        table(caption, ["measure", "samples", "text"], rows),
        "" if e.judge is not None else paragraph(NOT_MEASURED + " Give one by --judge."),
        *(
            f'<p class="warning"><strong>Warning:</strong> {escape(warning)}</p>'
            for warning in e.warnings
        ),
        reproduce(command),
    ]
    for number, sample in enumerate(samples, 1):
        body.append(f"<h3>Sample {number}</h3>\n{text_block(sample.text)}")

    return Section("samples", "Samples", "\n".join(filter(None, body)))


def passes_of_texts_section(
    views: Sequence[tuple[str, Sequence[Pass], str]], tokenizer: PreTrainedTokenizerBase
) -> Section:
    """The text of every flow's state: of each view its title, its passes and the command that
    prints them.
    """
    body = [
        "<p>What every flow's state decodes to, from noise to the final text. "
        "Tokens that differ from the pass before are <mark>marked</mark>.</p>"
    ]

    for title, passes, command in views:
        body.append(
            f"<h3>{escape(title)}</h3>\n{passes_section(passes, tokenizer, 'h4')}\n{reproduce(command)}"
        )

    return Section("passes", "From noise to text", "\n".join(body))


def evolution_section(
    evolutions: dict[str, Evolution], directions: Sequence[str], command: str
) -> Section:
    """How the states change from flow to flow: a picture and a table for each measure."""
    panels = []
    for name, title in MEASURES.items():
        measured = {label: getattr(evolution, name) for label, evolution in evolutions.items()}
        states = next(iter(evolutions.values())).num_states
        levels = range(states - len(next(iter(measured.values()))), states)
        names = ["latents" if level == 0 else f"flow {level}" for level in levels]
        rows = [
            (
                state,
                *(
                    f"{statistics[index].mean:.3f} ± {statistics[index].std:.3f}"
                    for statistics in measured.values()
                ),
            )
            for index, state in enumerate(names)
        ]
        description = "; ".join(
            f"{label}: " + ", ".join(f"{state} {cells[column]}" for state, *cells in rows)
            for column, label in enumerate(measured)
        )
        title = title[0].upper() + title[1:]
        figure = plot_measure(name, evolutions, directions)
        svg = inline_svg(figure, f"evolution-{name.replace('_', '-')}", title, description)
        panels.append(f"<figure>\n{svg}\n{table(title, ['state', *measured], rows)}\n</figure>")

    counts = " and ".join(
        f"{e.num_sequences:,} sequences of {label}" for label, e in evolutions.items()
    )
    body = [
        paragraph(
            f"The states of {counts}, each of {next(iter(evolutions.values())).num_tokens:,} tokens: mean ± standard "
            "deviation over the sequences. The latents are next to the data, the last flow's output is the noise; an "
            "arrow is the direction of a flow. The participation ratio says in how many directions a sequence's states "
            "vary, the movement how far a flow has moved their centre."
        ),
        f'<div class="panels">\n{"".join(panels)}\n</div>',
        reproduce(command),
    ]

    return Section("evolution", "From flow to flow", "\n".join(body))


def flops_section(counts: dict[int, FlopCount], patch_size: int, command: str) -> Section:
    """Of `count_by_patch_size`, with the model's own patch size."""
    rows = [
        (f"{size} (this model)" if int(size) == patch_size else size, *cells)
        for size, *cells in patch_size_rows(counts)
    ]
    head = ["patch size", "FLOPs per token", "ratio, true count", "ratio, the paper's"]
    description = "; ".join(
        f"patch size {size}: {ratio}, by the paper's count {paper}"
        for size, _, ratio, paper in rows
    )
    svg = inline_svg(
        plot_patch_sizes(counts), "flops-by-patch-size", "FLOPs against the patch size", description
    )
    count = counts[patch_size]
    body = [
        paragraph(
            f"A forward pass over {count.num_tokens:,} tokens costs {count.flow:.4g} FLOPs, {count.ratio:.3f} times "
            f"those of the discrete transformer of the same blocks and depth, {count.discrete:.4g}. At other patch "
            "sizes, all else is equal. The paper leaves out the products of attention with the values, and counts "
            "masked matrices as dense."
        ),
        f'<figure class="single">\n{svg}\n</figure>',
        table("FLOPs against those of the discrete transformer", head, rows),
        reproduce(command),
    ]

    return Section("flops", "FLOPs and patch size", "\n".join(body))


def origin_section(provenance: Provenance) -> Section:
    """Where the page comes from."""
    p = provenance
    rows = [
        ("checkpoint", p.checkpoint + (f" at {p.revision}" if p.revision else "")),
        ("SHA-256 of the weights", p.weights_sha256),
        ("text", str(p.data)),
        ("SHA-256 of the text", str(p.data_sha256)),
        ("made", p.date),
        ("on", p.device),
        ("versions", ", ".join(f"{name} {version}" for name, version in p.versions.items())),
    ]

    return Section(
        "origin",
        "Origin",
        table("Checkpoint, text and versions", ["what", "value"], rows)
        + "\n"
        + reproduce(p.command, "Made by"),
    )
