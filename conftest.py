"""What needs a library that is not installed is not looked at for doctests."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("lm_eval") else ["src/tarflow_hf/lm_eval_model.py"]
