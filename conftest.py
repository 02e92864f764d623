"""Modules that need a library that is not installed have no doctests to run."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("lm_eval") else ["src/tarflow_hf/lm_eval_model.py"]
