"""Pages, tables and pictures of results.

The report on a checkpoint, the passes from noise to text, the bits of tokens, the demo page.
"""

from .page import Section, report_page
from .passes import (
    SEED,
    Pass,
    draw_passes,
    few_changes,
    find_passes,
    passes_page,
    passes_section,
    passes_text,
)
from .plots import new_figure, plot_evolution, plot_flops, plot_measure, plot_patch_sizes
from .sections import (
    codebook_section,
    evolution_section,
    flops_section,
    likelihood_section,
    model_section,
    origin_section,
    passes_of_texts_section,
    samples_section,
)
from .tables import (
    Table,
    evaluation_text,
    evolution_table,
    flops_table,
    likelihood_table,
    patch_size_table,
    sample_table,
    sample_text,
)

__all__ = [
    "SEED",
    "Pass",
    "Section",
    "Table",
    "codebook_section",
    "draw_passes",
    "evaluation_text",
    "evolution_section",
    "evolution_table",
    "few_changes",
    "find_passes",
    "flops_section",
    "flops_table",
    "likelihood_section",
    "likelihood_table",
    "model_section",
    "new_figure",
    "origin_section",
    "passes_of_texts_section",
    "passes_page",
    "passes_section",
    "passes_text",
    "patch_size_table",
    "plot_evolution",
    "plot_flops",
    "plot_measure",
    "plot_patch_sizes",
    "report_page",
    "sample_table",
    "sample_text",
    "samples_section",
]
