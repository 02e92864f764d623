"""The evaluation of a text as a command."""

import math
import runpy
import sys

import pytest
import torch

from helpers import ROOT
from helpers.evaluation import TEXT
from tarflow_hf.data import PackedTokens, character_tokenizer
from tarflow_hf.evaluation import Evaluation, cut_text, evaluate_text, score, weights_checksum
from tarflow_hf.training import discrete_baseline, save_model


@pytest.mark.parametrize("kind", ["flow", "discrete"])
def test_the_script_and_its_json(flow, tmp_path, monkeypatch, capsys, kind):
    model, tokenizer = (
        flow if kind == "flow" else discrete_baseline(flow.config),
        character_tokenizer(),
    )
    save_model(model, tokenizer, tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    command = [str(tmp_path / "model"), "--data", str(tmp_path / "text.txt")]
    command += [
        "--num_samples",
        "2",
        "--device",
        "cpu",
        "--output",
        str(tmp_path / "evaluation.json"),
    ]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *command])
    runpy.run_path(str(ROOT / "examples" / "evaluate.py"), run_name="__main__")
    printed = capsys.readouterr().out
    found = Evaluation.from_json((tmp_path / "evaluation.json").read_text())

    text = PackedTokens([TEXT], tokenizer, 1)
    rows = score(model, cut_text(text.tokens, 18), num_samples=2).rows()
    best = list(rows.values())[-1]
    assert found.nats_per_token == pytest.approx(best.nats_per_token) and found.num_tokens == len(
        text.tokens
    )
    assert found.bits_per_character == pytest.approx(best.nats_per_token / math.log(2))
    assert found.perplexity_per_word == pytest.approx(best.perplexity**text.tokens_per_word)
    assert found.command.endswith(" ".join(command)) and found.data == "text.txt"
    assert (
        found.weights_sha256 == weights_checksum(model)
        and found.num_parameters == model.num_parameters()
    )
    assert found.versions["torch"] == torch.__version__ and len(found.data_sha256) == 64
    assert found.is_upper_bound == (kind == "flow")

    if kind == "flow":
        assert found.elbo_nats_per_token == pytest.approx(rows["bound, 1 sample"].nats_per_token)
        assert found.elbo_nats_per_token > found.nats_per_token and found.codebook_entries == 27
        assert (
            0 < found.reconstruction_accuracy <= 1
            and "reconstruction" in printed
            and "codebook" in printed
        )
    else:
        assert (
            found.elbo_nats_per_token is None is found.codebook_scale_mean
            and "codebook" not in printed
        )
        with pytest.raises(ValueError, match="num_flows can't be given"):
            evaluate_text(model, text, {}, num_flows=1)
