"""A watermark in the noise, which leaves the distribution of the text as it is."""

from .alignment import Alignment, rank_p_value
from .evidence import Evidence, draw_noise, predict, read_evidence, steered, stratified_noise
from .mark import NoiseWatermark, WatermarkResult

__all__ = [
    "Alignment",
    "Evidence",
    "NoiseWatermark",
    "WatermarkResult",
    "draw_noise",
    "predict",
    "rank_p_value",
    "read_evidence",
    "steered",
    "stratified_noise",
]
