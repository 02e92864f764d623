"""The log of a run."""

import pytest

from helpers.training import entries, run
from tarflow_hf.cost import training_flops


def test_the_log_says_how_fast(tmp_path, data, tokenizer, monkeypatch):
    from tarflow_hf.training import log as module

    monkeypatch.setattr(module, "peak_flops", lambda *_: 1e12)
    model, _ = run(tmp_path, data, tokenizer, num_steps=4, log_every=2, eval_sequences=4)

    for entry in (entry for entry in entries(tmp_path) if "loss" in entry):
        expected = entry["tokens_per_second"] * training_flops(model, 16) / 16
        assert entry["flops_per_second"] == pytest.approx(expected, rel=0.05)
        assert entry["model_flops_utilization"] == entry["flops_per_second"] / 1e12
        assert 0.05 < entry["peak_memory_gib"] < 50
