"""The sections of a report: plain results in, a `Section` out."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..evaluation import (
    MEASURES,
    NOT_MEASURED,
    WHAT_IS_SCORED,
    Evaluation,
    Evolution,
    FlopCount,
    Likelihood,
    Provenance,
    Sample,
    SampleEvaluation,
)
from ..modeling.modeling_tarflowlm import TarFlowLMModel
from .page import Section, render
from .passes import Pass, passes_section
from .plots import inline_svg, plot_measure, plot_patch_sizes
from .tables import (
    Table,
    measure_table,
    measures_table,
    patch_size_table,
    sample_table,
    stack_table,
)


def facts(caption: str, rows: Sequence[Sequence[str]]) -> Table:
    """A table of names and values."""
    return Table(["what", "value"], rows, caption, right=())


def model_section(model: PreTrainedModel, provenance: Provenance) -> Section:
    """The checkpoint's configuration, and its flows."""
    config = model.config
    is_flow = isinstance(model, TarFlowLMModel)
    kind = provenance.model_type
    rows = [
        ("kind", kind if is_flow else f"discrete, {kind}"),
        ("parameters", f"{provenance.num_parameters:,}"),
        ("longest sequence, tokens", f"{config.max_position_embeddings:,}"),
        ("vocabulary", f"{config.vocab_size:,}"),
        ("width", f"{config.hidden_size:,}"),
    ]
    flows = None

    if is_flow:
        rows += [
            ("latent size of a token", str(config.latent_size)),
            ("patch size, tokens", str(config.patch_size)),
            ("may be told tokens (conditional)", "yes" if config.conditional else "no"),
        ]
        flows = stack_table(config.flows)
    else:
        rows.append(("layers", str(config.num_hidden_layers)))

    configuration = facts("Configuration", rows)
    body = render("sections/model.html.j2", configuration=configuration, flows=flows)
    return Section("model", "The model", body)


def likelihood_section(
    evaluation: Evaluation, rows: dict[str, Likelihood], command: str
) -> Section:
    """The result of `evaluate_text`: the bounds, or the exact figure."""
    body = render(
        "sections/likelihood.html.j2",
        is_upper_bound=evaluation.is_upper_bound,
        what_is_scored=WHAT_IS_SCORED,
        table=measures_table(evaluation, rows),
        command=command,
    )
    return Section("likelihood", "Likelihood of held-out text", body)


def codebook_section(evaluation: Evaluation, command: str) -> Section:
    """The tokens that come back from the latents, and the entries of the codebook.

    Args:
        evaluation: By `evaluate_text`, for a TarFlowLM.
        command: The command that prints the same.
    """
    e = evaluation
    error = "unknown" if e.num_sequences == 1 else f"{e.reconstruction_standard_error:.4%}"
    reconstruction = [
        ("tokens that come back", f"{e.reconstruction_accuracy:.4%}"),
        ("its standard error", error),
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
    body = render(
        "sections/codebook.html.j2",
        reconstruction=facts("Reconstruction of the same text", reconstruction),
        entries=facts("The codebook", entries),
        command=command,
    )
    return Section("codebook", "Reconstruction and codebook", body)


def samples_section(
    evaluation: SampleEvaluation, samples: Sequence[Sample], command: str
) -> Section:
    """The result of `evaluate_samples`: the metrics, their warnings, and some of the samples."""
    body = render(
        "sections/samples.html.j2",
        table=sample_table(evaluation),
        not_measured=NOT_MEASURED if evaluation.judge is None else "",
        warnings=evaluation.warnings,
        command=command,
        samples=samples,
    )
    return Section("samples", "Samples", body)


def passes_of_texts_section(
    views: Sequence[tuple[str, Sequence[Pass], str]], tokenizer: PreTrainedTokenizerBase
) -> Section:
    """The text of every flow's state.

    Args:
        views: Each with its title, its passes and the command that prints them.
    """
    shown = [
        {"title": title, "passes": passes_section(passes, tokenizer, "h4"), "command": command}
        for title, passes, command in views
    ]
    return Section("passes", "From noise to text", render("sections/passes.html.j2", views=shown))


def evolution_section(
    evolutions: dict[str, Evolution], directions: Sequence[str], command: str
) -> Section:
    """The states from flow to flow: a picture and a table for each measure."""
    counts = " and ".join(
        f"{e.num_sequences:,} sequences of {label}" for label, e in evolutions.items()
    )
    body = render(
        "sections/evolution.html.j2",
        counts=counts,
        num_tokens=next(iter(evolutions.values())).num_tokens,
        panels=[evolution_panel(name, evolutions, directions) for name in MEASURES],
        command=command,
    )
    return Section("evolution", "From flow to flow", body)


def evolution_panel(
    name: str, evolutions: dict[str, Evolution], directions: Sequence[str]
) -> dict[str, Any]:
    """One of the `MEASURES`: its `picture` and its `table`."""
    table = measure_table(name, evolutions)
    description = "; ".join(
        f"{label}: " + ", ".join(f"{row[0]} {row[column]}" for row in table.rows)
        for column, label in enumerate(evolutions, 1)
    )
    figure = plot_measure(name, evolutions, directions)
    svg = inline_svg(figure, f"evolution-{name.replace('_', '-')}", table.caption, description)

    return {"picture": svg, "table": table}


def flops_section(counts: dict[int, FlopCount], patch_size: int, command: str) -> Section:
    """The result of `count_by_patch_size`, with the model's own patch size."""
    table = patch_size_table(counts, own=patch_size)
    description = "; ".join(
        f"patch size {size}: {ratio}, by the paper's count {paper}"
        for size, _, ratio, paper in table.rows
    )
    title = "FLOPs against the patch size"
    body = render(
        "sections/flops.html.j2",
        count=counts[patch_size],
        picture=inline_svg(plot_patch_sizes(counts), "flops-by-patch-size", title, description),
        table=table,
        command=command,
    )
    return Section("flops", "FLOPs and patch size", body)


def origin_section(provenance: Provenance) -> Section:
    """The checkpoint, the text, the versions and the command that the page is made of."""
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
    table = facts("Checkpoint, text and versions", rows)
    body = render("sections/origin.html.j2", table=table, command=p.command)
    return Section("origin", "Origin", body)
