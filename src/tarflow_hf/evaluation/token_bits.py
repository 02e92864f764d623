"""The bits of each token: its share of the bound on a text's likelihood."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..modeling.modeling_tarflowlm import TarFlowLMModel


@torch.no_grad()
def token_bits(
    model: TarFlowLMModel,
    input_ids: Tensor,
    num_samples: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Bits of each token, (B, T), which sum to those of -ELBO.

    The ELBO of one sample of the latents z = h_0 is a sum over positions n,

        sum_n [ sum_(l < L) log|det dh_l,n / dh_(l-1),n|
                + log p_L(h_(L-1),n | h_(L-1), passed before n)
                - sum_(tokens t of n) log sum_k N(z_t; mean_k, scale_k^2) ],

    and a token's share of it is the last term of its own, and an equal part of the others of its
    patch. Its meaning depends on the directions of the flows: see `what_bits_mean`.

    Args:
        model: In evaluation mode.
        input_ids: Token ids (B, T), all real, T a multiple of the patch size.
        num_samples: Samples of the latents to take the mean over, which makes it less noisy.
        generator: Source of their noise.

    Returns:
        Bits (B, T), minus the shares. They are small for expected tokens, and may be negative,
            because they come from densities.

    Raises:
        ValueError: num_samples is below 1, or the ids are none that the model takes.

    Example:
        >>> from tarflow_hf import TarFlowLMConfig
        >>> flow = {"coupling": "mixture_rosenblatt", "direction": "left_to_right", "num_hidden_layers": 1}
        >>> model = TarFlowLMModel(TarFlowLMConfig(27, 2, hidden_size=16, num_attention_heads=2, flows=[flow])).eval()
        >>> ids = torch.randint(27, (1, 10))
        >>> latents_of = lambda: torch.Generator().manual_seed(0)
        >>> elbo = model(ids, generator=latents_of()).elbo
        >>> torch.allclose(token_bits(model, ids, generator=latents_of()).sum(-1), -elbo / math.log(2))
        True
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, not {num_samples}.")

    ids = input_ids.repeat_interleave(num_samples, 0)
    latents = model.encode(ids, generator)
    with _terms_of_flows(model) as terms:
        model(ids, latents=latents)

    patch_size = model.config.patch_size
    prior = sum(terms).repeat_interleave(patch_size, 1) / patch_size  # (B S, N) to (B S, T)
    shares = prior - model.codebook().log_total(latents)
    return -shares.unflatten(0, (-1, num_samples)).mean(1) / math.log(2)


@contextmanager
def _terms_of_flows(model: TarFlowLMModel) -> Iterator[list[Tensor]]:
    """Collects each flow's term of log p(z) at each position, (B, N), before they are summed."""
    terms: list[Tensor] = []

    def listener(layer):
        def listen(head, arguments, output):
            term = (
                output[1] if isinstance(output, tuple) else output
            )  # the last flow gives its log-density alone
            terms.append(term.flip(1) if layer.direction == "right_to_left" else term)

        return listen

    hooks = [layer.head.register_forward_hook(listener(layer)) for layer in model.flow.layers]
    try:
        yield terms
    finally:
        for hook in hooks:
            hook.remove()


def what_bits_mean(model: TarFlowLMModel) -> str:
    """Returns the sentence that explains the numbers of `token_bits`."""
    patch_size = model.config.patch_size
    unit = "token" if patch_size == 1 else "patch"

    directions = {flow["direction"] == "right_to_left" for flow in model.config.flows}
    if len(directions) == 2:
        meaning = (
            f"Flows run in both directions here, so a {unit}'s bits are its share of the whole text's bound, not its "
            "cost given its neighbours: a share can be negative, and only their sum bounds a likelihood."
        )
    else:
        side = "after" if directions == {True} else "before"
        units = "tokens" if patch_size == 1 else "patches"
        meaning = f"A {unit}'s bits bound its cost given the latents of the {units} {side} it."

    if patch_size > 1:
        meaning += f" What the {patch_size} tokens of a patch cost together is divided among them."

    return meaning


def bits_of_pieces(
    token_ids: Tensor, bits: Tensor, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[str, float]]:
    """Cuts the text of ids (T,) into the smallest pieces that are whole characters.

    Each comes with the bits of its tokens.

    A piece is one token, but for tokens that are parts of a character (of a byte-level tokenizer),
    which make one.
    """
    pieces: list[tuple[str, float]] = []
    num_characters, piece_bits = 0, 0.0

    for end, token in enumerate(bits.tolist(), 1):
        piece_bits += token
        text = tokenizer.decode(token_ids[:end], clean_up_tokenization_spaces=False)
        if end == len(token_ids) or not text.endswith("\N{REPLACEMENT CHARACTER}"):
            pieces.append((text[num_characters:], piece_bits))
            num_characters = len(text)
            piece_bits = 0.0

    return pieces
