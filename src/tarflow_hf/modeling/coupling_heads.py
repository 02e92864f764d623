"""The table of couplings.

A new coupling is a subclass of `CouplingHead` in a file of its own, and a line here. A program
outside this package adds the line itself: `COUPLING_HEADS["mine"] = MyHead`, before it makes a
configuration that names it.
"""

from .affine_head import AffineHead
from .coupling_head import CouplingHead
from .mixture_cdf_head import MixtureCDFHead
from .mixture_rosenblatt_head import MixtureRosenblattHead

COUPLING_HEADS: dict[str, type[CouplingHead]] = {
    "affine": AffineHead,
    "mixture_cdf": MixtureCDFHead,
    "mixture_rosenblatt": MixtureRosenblattHead,
}
