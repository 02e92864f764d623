"""Converts causal language models to TarFlowLMs of one Mix-d flow and back, without training or loss."""

from .above import append_flow
from .causal_lm import from_causal_lm, to_causal_lm
from .generation import adopt, generation_config_of
from .proof import PROBE_TEXT, Probe, next_token_log_probs, probe
from .source import load_source

__all__ = [
    "PROBE_TEXT",
    "Probe",
    "adopt",
    "append_flow",
    "from_causal_lm",
    "generation_config_of",
    "load_source",
    "next_token_log_probs",
    "probe",
    "to_causal_lm",
]
