"""The cases of the study: stacks of flows, their training, and the size that they share.

Every case is made as large as the discrete model.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from tarflow_hf import TarFlowLMConfig, TarFlowLMModel
from tarflow_hf.cost import forward_flops
from tarflow_hf.evaluation.flops import papers_depths
from tarflow_hf.training import discrete_baseline

DIRECTIONS = ("left_to_right", "right_to_left")
TOLERANCE = 0.03  # of what is made equal


@dataclass(frozen=True)
class Case:
    """A model of the study. The discrete one has no `flows`.

    `equal` is what the width of the feed-forward layers makes equal to the discrete model:
    "parameters", or "FLOPs" of a sequence; with "blocks" they are as wide as the discrete model's,
    and a large vocabulary's codebook comes besides.
    """

    flows: Callable[[int], list[dict[str, Any]]] | None  # of the layers in all
    mode: str = "joint"
    equal: str = "parameters"
    config: dict[str, Any] = field(default_factory=dict)  # other fields of TarFlowLMConfig


def alternating(flows: list[tuple[dict[str, Any], int]]) -> list[dict[str, Any]]:
    """Flows with their depths, in alternating directions."""
    return [
        {**flow, "direction": DIRECTIONS[index % 2], "num_hidden_layers": depth}
        for index, (flow, depth) in enumerate(flows)
    ]


def mix_1(num_components: int) -> dict[str, Any]:
    return {"coupling": "mixture_cdf", "num_components": num_components, "head_hidden_size": 32}


def mix_d(**options: Any) -> dict[str, Any]:
    return {"coupling": "mixture_rosenblatt", **options}


def papers_affine(layers: int) -> list[dict[str, Any]]:
    return alternating([({"coupling": "affine"}, layers // 6)] * 6)


def papers_mix_1(num_components: int = 27) -> Callable[[int], list[dict[str, Any]]]:
    return lambda layers: alternating(
        [(mix_1(num_components), depth) for depth in papers_depths(layers)]
    )


def papers_mix_d(layers: int) -> list[dict[str, Any]]:
    first, *others = papers_depths(layers)
    return alternating([(mix_d(context="latent"), first), *((mix_1(2), depth) for depth in others)])


def deep(above: int = 1, number: int = 2, **options: Any) -> Callable[[int], list[dict[str, Any]]]:
    """Most layers in the Mix-d flow next to the data, a `number` of Mix-1 flows of `above` layers over it."""
    return lambda layers: alternating(
        [(mix_d(**options), layers - number * above), *[(mix_1(2), above)] * number]
    )


def alone(more: float = 1, **options: Any) -> Callable[[int], list[dict[str, Any]]]:
    """One Mix-d flow, with `more` times the layers."""
    return lambda layers: alternating([(mix_d(**options), round(more * layers))])


def backwards(layers: int) -> list[dict[str, Any]]:
    """One Mix-d flow that runs right to left."""
    return [{**mix_d(), "direction": "right_to_left", "num_hidden_layers": layers}]


def halves(layers: int) -> list[dict[str, Any]]:
    """Half of the layers in the Mix-d flow next to the data, half in a flow the other way over it."""
    return alternating([(mix_d(), layers - layers // 2), (mix_1(2), layers // 2)])


def over_shallow(direction: str) -> Callable[[int], list[dict[str, Any]]]:
    """A Mix-d flow of a single layer next to the data, all other layers in a flow over it."""
    return lambda layers: [
        {**mix_d(), "direction": "left_to_right", "num_hidden_layers": 1},
        {**mix_1(2), "direction": direction, "num_hidden_layers": layers - 1},
    ]


def with_half_in_head(layers: int) -> list[dict[str, Any]]:
    """One Mix-d flow of all layers, and half as many over the tokens of a patch."""
    return alternating([(mix_d(patch_head_layers=layers // 2), layers)])


# The tokens of a patch are independent in a Mix-d flow: what could tie them.
PATCHED = {
    "one flow": alone(),
    "two flows": deep(number=1),
    "three flows": deep(),
    "half in the head": with_half_in_head,
}

GROUPS: dict[str, dict[str, Case]] = {
    "models": {
        "discrete": Case(None),
        "affine": Case(papers_affine),
        "Mix-1": Case(papers_mix_1()),
        "Mix-d": Case(papers_mix_d),
        "Mix-d, deep": Case(deep()),
        "Mix-d, one flow": Case(alone()),
    },
    "context": {
        "Mix-d, deep, latent context": Case(deep(context="latent")),
        "Mix-d, one flow, latent context": Case(alone(context="latent")),
    },
    "initial scale of the codebook": {
        "Mix-d, one flow, log scale -2": Case(alone(), config={"initial_log_scale": -2.0}),
    },
    "stages": {
        "Mix-1, progressive": Case(papers_mix_1(), "progressive"),
        "Mix-d, progressive": Case(papers_mix_d, "progressive"),
        "Mix-d, deep, progressive": Case(deep(), "progressive"),
    },
    "components": {f"Mix-1, {k} component{'s' * (k > 1)}": Case(papers_mix_1(k)) for k in (1, 2, 8)},
    "latents": {f"Mix-d, deep, latent size {d}": Case(deep(), config={"latent_size": d}) for d in (2, 16)},
    "depth": {"Mix-d, deep, two layers in the flows above": Case(deep(above=2))},
    "patches": {
        "patch 2": Case(alone(), config={"patch_size": 2}),
        "patch 4": Case(alone(), config={"patch_size": 4}),
        "patch 2, inner head": Case(alone(patch_head_layers=1), config={"patch_size": 2}),
        "patch 4, inner head": Case(alone(patch_head_layers=1), config={"patch_size": 4}),
    },
    "patches at equal FLOPs": {
        "patch 2, equal FLOPs": Case(with_half_in_head, "joint", "FLOPs", {"patch_size": 2}),
        "patch 2, deeper body, equal FLOPs": Case(alone(1.5, patch_head_layers=2), "joint", "FLOPs", {"patch_size": 2}),
        "patch 4, equal FLOPs": Case(with_half_in_head, "joint", "FLOPs", {"patch_size": 4}),
    },
    "directions": {
        "Mix-d, right to left": Case(backwards),
        "Mix-d, half right to left": Case(halves),
        "Mix-d, half right to left, progressive": Case(halves, "progressive"),
    },
    "weak first flow": {
        "shallow first flow, right to left above": Case(over_shallow("right_to_left")),
        "shallow first flow, left to right above": Case(over_shallow("left_to_right")),
        "shallow first flow, right to left above, progressive": Case(
            over_shallow("right_to_left"), "progressive"
        ),
    },
    "words": {
        "Mix-d, one flow, equal blocks": Case(
            alone(), "joint", "blocks", {"initial_log_scale": -3.0}
        ),
    },
    "patches under flows": {
        f"patch {size}, {name}, equal FLOPs": Case(flows, "joint", "FLOPs", {"patch_size": size})
        for size in (2, 4, 8)
        for name, flows in PATCHED.items()
    },
}  # fmt: skip
CASES = {name: case for group in GROUPS.values() for name, case in group.items()}


def build(name: str, layers: int, config: dict[str, Any]) -> PreTrainedModel:
    """The model of a case, as large (or as costly) as the discrete one.

    Args:
        layers: In all, a multiple of 6.
        config: Fields of `TarFlowLMConfig`, but for the flows.

    Raises:
        ValueError: It can't be brought within 3%.
    """
    case = CASES[name]

    def make(intermediate_size: int | None = None, discrete: bool = False) -> PreTrainedModel:
        flows = alone()(layers) if discrete else case.flows(layers)
        fields = config if discrete else {**config, **case.config}
        made = TarFlowLMConfig(**fields, flows=flows, intermediate_size=intermediate_size)
        return discrete_baseline(made) if discrete else TarFlowLMModel(made)

    def size(model: PreTrainedModel) -> int:
        if case.equal == "parameters":
            return model.num_parameters()
        return sum(forward_flops(model, config["max_position_embeddings"]))

    discrete = make(discrete=True)
    if case.flows is None:
        return discrete

    if case.equal == "blocks":
        return make(discrete.config.intermediate_size)

    # It is linear in the width of the feed-forward layers.
    width, target = discrete.config.intermediate_size, size(discrete)
    low, high = size(make(width)), size(make(2 * width))
    model = make(max(1, round(width + width * (target - low) / (high - low))))
    if abs(size(model) / target - 1) > TOLERANCE:
        raise ValueError(f"{name} has {size(model):,} {case.equal}, the discrete model {target:,}.")

    return model
