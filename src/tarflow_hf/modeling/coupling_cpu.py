"""The mixture couplings on a CPU: which form of them computes, and nothing else.

- Inverses are found in numba's compiled loops (`coupling_numba.py`) if numba is installed. Without
  it they are found by Newton steps in all dimensions at once (`coupling_newton.py`) in float32, and
  over a larger codebook by active sets (`coupling_active.py`).
- The Rosenblatt transform of many numbers is made with weights as they are (`coupling_transform.py`).
- The log-density over a larger codebook is one matrix product (`coupling_product.py`), where
  `product_of` finds that exact enough.

The reference (`coupling_torch.py`) does the rest. Arguments are those of the reference: the ops of
`coupling.py` check and cast.
"""

import torch
from torch import Tensor

from .coupling_active import mixture_rosenblatt_inverse as mixture_rosenblatt_inverse_active
from .coupling_newton import mixture_cdf_inverse as mixture_cdf_inverse_newton
from .coupling_newton import mixture_rosenblatt_inverse as mixture_rosenblatt_inverse_newton
from .coupling_numba import IS_INSTALLED
from .coupling_numba import mixture_cdf_inverse as mixture_cdf_inverse_numba
from .coupling_numba import mixture_rosenblatt_inverse as mixture_rosenblatt_inverse_numba
from .coupling_product import mixture_rosenblatt_log_prob as mixture_rosenblatt_log_prob_product
from .coupling_product import product_of
from .coupling_torch import mixture_cdf_inverse as mixture_cdf_inverse_torch
from .coupling_torch import mixture_rosenblatt as mixture_rosenblatt_torch
from .coupling_torch import mixture_rosenblatt_inverse as mixture_rosenblatt_inverse_torch
from .coupling_torch import mixture_rosenblatt_log_prob as mixture_rosenblatt_log_prob_torch
from .coupling_transform import mixture_rosenblatt as mixture_rosenblatt_transform

# "auto" does without numba's compiled loops if this is False.
AUTO_TAKES_NUMBA = IS_INSTALLED

# Numbers d K up to which Newton's steps are taken in all dimensions. With more, arithmetic counts
# for more than calls, and active sets have less of it.
MAX_NEWTON = 2**11
# Numbers n d K from which on the transform leaves the reference: with fewer, the number of calls is
# what takes time.
MIN_TRANSFORM = 2**14


@torch.compiler.disable  # how often the loops run depends on the values
def mixture_cdf_inverse(u: Tensor, logits: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
    if AUTO_TAKES_NUMBA:
        return mixture_cdf_inverse_numba(u, logits, loc, log_scale)
    if u.dtype == torch.float32:
        return mixture_cdf_inverse_newton(u, logits, loc, log_scale)

    return mixture_cdf_inverse_torch(u, logits, loc, log_scale)


def mixture_rosenblatt(
    z: Tensor, logits: Tensor, mean: Tensor, log_scale: Tensor
) -> tuple[Tensor, Tensor]:
    if len(z) * mean.numel() < MIN_TRANSFORM or torch.compiler.is_compiling():
        return mixture_rosenblatt_torch(z, logits, mean, log_scale)

    return mixture_rosenblatt_transform(z, logits, mean, log_scale)


@torch.compiler.disable
def mixture_rosenblatt_inverse(
    u: Tensor, logits: Tensor, mean: Tensor, log_scale: Tensor
) -> Tensor:
    if AUTO_TAKES_NUMBA:
        return mixture_rosenblatt_inverse_numba(u, logits, mean, log_scale)
    if mean.numel() > MAX_NEWTON:
        return mixture_rosenblatt_inverse_active(u, logits, mean, log_scale)
    if u.dtype == torch.float32:
        return mixture_rosenblatt_inverse_newton(u, logits, mean, log_scale)

    return mixture_rosenblatt_inverse_torch(u, logits, mean, log_scale)


def mixture_rosenblatt_log_prob(
    z: Tensor, logits: Tensor, mean: Tensor, log_scale: Tensor
) -> Tensor:
    product = product_of(z, mean, log_scale)
    if product is None:
        return mixture_rosenblatt_log_prob_torch(z, logits, mean, log_scale)

    return mixture_rosenblatt_log_prob_product(product, z, logits, mean, log_scale)
