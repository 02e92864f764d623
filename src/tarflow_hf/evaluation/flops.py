"""FLOPs of a forward pass, compared with a discrete transformer's.

There are two counts: the true one, and the paper's (its Figure 7).

The true count is `cost.forward_flops`, of the model that a configuration makes, built without
memory. The paper's is a formula for GPT-2's blocks. Both count a multiply-add as two, and neither
counts norms, biases, activations, look-ups or the arithmetic of the couplings. The differences:

- attention: the paper counts the products of queries and keys, and leaves out those with the
  values;
- the head of an autoregressive Mix-1 coupling: the paper counts masked matrices as dense; here only
  the blocks that are not masked exist.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..baseline import discrete_baseline
from ..cost import forward_flops
from ..modeling.configuration_tarflowlm import TarFlowLMConfig
from ..modeling.coupling_heads import COUPLING_HEADS
from ..modeling.modeling_tarflowlm import TarFlowLMModel

GPT2_SIZES = {  # layers, width, heads
    "small": (12, 768, 12),
    "medium": (24, 1024, 16),
    "large": (36, 1280, 20),
    "xl": (48, 1600, 25),
}
PATCH_SIZES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class FlopCount:
    """FLOPs of a forward pass over one sequence: a TarFlowLM's and a discrete transformer's.

    Example:
        >>> count = FlopCount(num_tokens=4, flow=20, discrete=80, paper_flow=10, paper_discrete=50)
        >>> count.flow_per_token, count.ratio, count.paper_ratio
        (5.0, 0.25, 0.2)
    """

    num_tokens: int
    flow: int  # the true counts
    discrete: int
    paper_flow: int  # the paper's
    paper_discrete: int

    @property
    def flow_per_token(self) -> float:
        return self.flow / self.num_tokens

    @property
    def discrete_per_token(self) -> float:
        return self.discrete / self.num_tokens

    @property
    def ratio(self) -> float:
        return self.flow / self.discrete

    @property
    def paper_ratio(self) -> float:
        return self.paper_flow / self.paper_discrete


def count_flops(config: TarFlowLMConfig, num_tokens: int | None = None) -> FlopCount:
    """Counts a sequence's FLOPs under a configuration and under its discrete transformer.

    The discrete transformer has the same blocks and the same depth.

    Args:
        num_tokens: Length of the sequence; `max_position_embeddings` by default.

    Raises:
        ValueError: The length is no positive multiple of the patch size.

    Example:
        >>> count = count_flops(gpt2_sized_config("small", patch_size=2))
        >>> round(count.ratio, 3), round(count.paper_ratio, 3)
        (0.353, 0.498)
    """
    num_tokens = config.max_position_embeddings if num_tokens is None else num_tokens
    if num_tokens < 1 or num_tokens % config.patch_size:
        raise ValueError(
            f"num_tokens must be a positive multiple of patch_size: {num_tokens}, {config.patch_size}."
        )

    with torch.device("meta"):  # weights with shapes, and nothing in them
        flow = TarFlowLMModel(config)
        discrete = discrete_baseline(config)

    width, num_layers = config.hidden_size, config.num_hidden_layers
    return FlopCount(
        num_tokens=num_tokens,
        flow=sum(forward_flops(flow, num_tokens)),
        discrete=sum(forward_flops(discrete, num_tokens)),
        paper_flow=sum(paper_flow_flops(config, num_tokens)),
        paper_discrete=paper_body_flops(num_tokens, width, num_layers)
        + 2 * num_tokens * width * config.vocab_size,
    )


def count_by_patch_size(
    config: TarFlowLMConfig, patch_sizes: Sequence[int] = PATCH_SIZES
) -> dict[int, FlopCount]:
    """Counts a configuration at its own and at other patch sizes, all else equal, in rising order.

    Patch sizes that do not divide its `max_position_embeddings` are left out. With one token to a
    patch there is no second decoder (`patch_head_layers`).

    Example:
        >>> config = gpt2_sized_config("small", patch_size=2, max_position_embeddings=128)
        >>> counts = count_by_patch_size(config, [1, 3, 4])
        >>> list(counts), counts[2] == count_flops(config)
        ([1, 2, 4], True)
    """
    counts = {}
    length = config.max_position_embeddings
    for patch_size in sorted({*patch_sizes, config.patch_size}):
        if patch_size < 1 or length % patch_size:
            continue

        changed = copy.deepcopy(config)
        if patch_size == 1:
            changed.flows = [
                flow | {"patch_head_layers": 0} if "patch_head_layers" in flow else flow
                for flow in changed.flows
            ]

        changed.patch_size = patch_size
        counts[patch_size] = count_flops(changed)

    return counts


def paper_body_flops(num_positions: int, width: int, num_layers: int) -> int:
    """S (4w + n (24 w^2 + 2 w S)): n of GPT-2's layers of width w over S positions, no head."""
    return num_positions * (4 * width + num_layers * (24 * width**2 + 2 * width * num_positions))


def paper_flow_flops(config: TarFlowLMConfig, num_tokens: int) -> list[int]:
    """The paper's count of each flow: its body over S / P positions, and its coupling's head."""
    width = config.hidden_size
    positions = num_tokens // config.patch_size
    flops = []

    for flow in config.flows:
        body = paper_body_flops(positions, width, flow["num_hidden_layers"])
        flops.append(
            body + positions * paper_head_flops(flow, width, config.latent_size, config.patch_size)
        )

    return flops


def paper_head_flops(flow: dict, width: int, latent_size: int, patch_size: int = 1) -> int:
    """The paper's FLOPs of a coupling's head at one position, from the decoder's output of width w.

    Example:
        >>> flow = {"coupling": "mixture_cdf", "autoregressive": True, "num_components": 64, "head_hidden_size": 128}
        >>> paper_head_flops(flow, width=768, latent_size=16)
        7992600
    """
    head = COUPLING_HEADS[flow["coupling"]]
    return head.paper_flops(flow, width, latent_size, patch_size)


def papers_depths(num_layers: int) -> list[int]:
    """The layers of the paper's three flows, from the data side: 1/6, 1/6 and 2/3 of them.

    Example:
        >>> papers_depths(12)
        [2, 2, 8]
    """
    sixth = num_layers // 6
    return [sixth, sixth, num_layers - 2 * sixth]


def gpt2_sized_config(
    size: str,
    patch_size: int = 1,
    coupling: str = "mixture_cdf",
    vocab_size: int = 50257,
    max_position_embeddings: int = 1024,
    latent_size: int = 16,
) -> TarFlowLMConfig:
    """The paper's stack at GPT-2's sizes: three flows with 1/6, 1/6 and 2/3 of the layers.

    They are Mix-1 with K = 64. With the `coupling` "mixture_rosenblatt" the first is Mix-d; with
    "affine" all are affine.

    Raises:
        ValueError: There is no such size.

    Example:
        >>> [flow["num_hidden_layers"] for flow in gpt2_sized_config("xl").flows]
        [8, 8, 32]
    """
    if size not in GPT2_SIZES:
        raise ValueError(f"size must be one of {', '.join(GPT2_SIZES)}, not {size!r}.")

    num_layers, width, num_heads = GPT2_SIZES[size]
    flows = []

    for index, layers in enumerate(papers_depths(num_layers)):
        kind = "mixture_cdf" if coupling == "mixture_rosenblatt" and index > 0 else coupling
        flow: dict[str, Any] = {
            "coupling": kind,
            "direction": ("left_to_right", "right_to_left")[index % 2],
        }
        flow |= {"num_hidden_layers": layers}
        flows.append(flow | ({"num_components": 64} if kind == "mixture_cdf" else {}))

    return TarFlowLMConfig(
        vocab_size=vocab_size,
        latent_size=latent_size,
        patch_size=patch_size,
        max_position_embeddings=max_position_embeddings,
        hidden_size=width,
        num_attention_heads=num_heads,
        flows=flows,
    )


def figure_7(
    sizes: Sequence[str] = tuple(GPT2_SIZES), patch_sizes: Sequence[int] = PATCH_SIZES, **options
) -> dict[str, dict[int, FlopCount]]:
    """Counts at every size and patch size: the data of the paper's Figure 7.

    Takes the options of `gpt2_sized_config`.
    """
    return {
        size: {
            patch_size: count_flops(gpt2_sized_config(size, patch_size, **options))
            for patch_size in patch_sizes
        }
        for size in sizes
    }
