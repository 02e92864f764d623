"""Bounds on the likelihood of text, reconstruction and the codebook, against enumeration and cases
by hand.
"""

import json
import math
import runpy
import sys
from pathlib import Path

import pytest
import torch
from scipy.special import logsumexp
from test_modeling import STACKS, enumerate_likelihoods, make

from tarflow_hf import TarFlowLMModel, evaluation
from tarflow_hf.checkpointing import save_model
from tarflow_hf.data import PackedTokens, character_tokenizer
from tarflow_hf.evaluation import (
    Evaluation,
    codebook_state,
    cut_text,
    evaluate_text,
    likelihood,
    likelihoods,
    nearest_distances,
    reconstruction,
)
from tarflow_hf.modeling.codebook import Gaussians
from tarflow_hf.provenance import provenance_of, weights_checksum
from tarflow_hf.training import discrete_baseline

ROOT = Path(__file__).parents[1]
TEXT = (
    "the quick brown fox jumps over the lazy dog and then it sleeps in the warm light of the sun "
    * 3
)


@pytest.fixture(scope="module")
def flow() -> TarFlowLMModel:
    return make(STACKS["mix-d, mix-1, mix-1"], vocab_size=27, noise=0.3).float()


@pytest.fixture(scope="module")
def sequences() -> list[dict]:
    ids = torch.tensor(character_tokenizer()(TEXT).input_ids)
    return cut_text(ids, 18)


# --------------------------------------------------------------------------------------- likelihood


@pytest.mark.parametrize("kind", ["flow", "discrete"])
def test_neither_batches_nor_what_follows_change_a_score(flow, sequences, kind):
    model = flow if kind == "flow" else discrete_baseline(flow.config)
    samples = 3 if kind == "flow" else 1
    expected, num_tokens = evaluation.score(model, sequences, batch_size=16, num_samples=samples)
    assert expected.shape == (samples, len(sequences)) and num_tokens.sum() == len(TEXT)

    for options in ({"batch_size": 1}, {"batch_size": 5, "max_sequences": 7}):
        scores, _ = evaluation.score(model, sequences, num_samples=samples, **options)
        torch.testing.assert_close(scores, expected[:, : scores.shape[1]], rtol=1e-5, atol=1e-4)

    if kind == "flow":
        assert (expected[0] != expected[1]).all()
        other, _ = evaluation.score(model, sequences, num_samples=samples, seed=1)
        assert (other != expected).all()
    else:  # nothing is drawn, so the order is free
        scores, _ = evaluation.score(model, sequences[::-1])
        torch.testing.assert_close(scores.flip(1), expected, rtol=1e-5, atol=1e-4)


def test_both_bounds_come_from_the_same_samples(flow, sequences):
    nats, num_tokens = evaluation.score(flow, sequences, num_samples=4)
    rows = likelihoods(flow, sequences, 4)
    elbo, bound = rows.values()
    assert (
        elbo.nats == pytest.approx(nats.mean(0).sum().item())
        and elbo.num_tokens == num_tokens.sum()
    )
    expected = -(logsumexp(-nats.numpy(), axis=0) - math.log(4)).sum()
    assert bound.nats == pytest.approx(expected) and bound.nats < elbo.nats
    assert bound == likelihood(flow, sequences, num_samples=4)
    rate = (
        nats.mean(0) / num_tokens
    )  # of equally long sequences it is the standard error of a mean, but for n - 1
    full = num_tokens == 18
    alone = likelihoods(flow, [s for s in sequences if len(s["input_ids"]) == 18], 4)[
        "bound, 1 sample"
    ]
    n = int(full.sum())
    assert alone.standard_error == pytest.approx(
        rate[full].std().item() / math.sqrt(n) * math.sqrt((n - 1) / n)
    )


def test_the_bound_reaches_the_enumerated_likelihood():
    model = make(STACKS["mix-d"], vocab_size=3, latent_size=1)
    exact, elbo = enumerate_likelihoods(model, 2, points=150)

    for x in ((0, 0), (2, 1)):
        sequence = [{"input_ids": torch.tensor(x)}]
        samples = evaluation.score(model, sequence * 300, batch_size=300, num_samples=40)[0].neg()
        one, many = samples[0], evaluation.log_mean_exp(samples)
        assert one.mean().item() == pytest.approx(
            elbo[x], abs=5 * one.std().item() / math.sqrt(300)
        )
        assert elbo[x] < many.mean() < exact[x] + 0.01 and exact[x] - many.mean() < 0.2 * (
            exact[x] - elbo[x]
        )


def test_what_fills_a_patch_keeps_the_bound_one():
    """A text of one token in patches of two: its probability is the sum over whatever follows."""
    model = make(STACKS["mix-d"], patch_size=2, vocab_size=3, latent_size=1)
    exact, _ = enumerate_likelihoods(model, 2, points=150)

    for token in range(3):
        sequences = cut_text(torch.tensor([token]), 18, patch_size=2)
        result = likelihood(model, sequences, num_samples=200)
        assert result.num_tokens == 1
        assert result.nats > -math.log(sum(math.exp(exact[token, other]) for other in range(3)))
        assert result.nats == pytest.approx(-exact[token, token], abs=0.2)

    assert cut_text(torch.tensor([], dtype=torch.long), 18, 2) == []


def test_bad_input(flow, sequences):
    with pytest.raises(ValueError, match="no sequence"):
        likelihood(flow, [])

    with pytest.raises(ValueError, match="num_samples must be at least 1, not 0"):
        likelihood(flow, sequences, num_samples=0)

    broken = make(STACKS["affine"], vocab_size=27)
    broken.codebook.mean.data[3] = math.nan

    with pytest.raises(
        ValueError, match=r"likelihood of sequence 0 is .*nan.*are the weights finite"
    ):
        likelihood(broken, sequences)


# ----------------------------------------------------------------------------------------- codebook


def test_reconstruction_by_hand(monkeypatch):
    """Two entries 2 r scales apart are taken for each other with probability Phi(-r), and a third
    one is far away.
    """
    model = make(STACKS["affine"], vocab_size=4, latent_size=1)
    model.codebook.mean.data[:, 0] = torch.tensor([0.0, 1.0, 50.0, 50.0])
    model.codebook.log_scale.data[:] = math.log(0.5)
    ids = torch.tensor([0, 1] * 10_000)
    result = reconstruction(model, cut_text(ids, 1000))
    assert (
        result.accuracy == pytest.approx(0.8413, abs=4 * result.standard_error)
        and result.num_tokens == 20_000
    )
    assert 0.001 < result.standard_error < 0.005
    assert (result.num_text_tokens, result.num_used_tokens) == (2, 2)
    whole = reconstruction(model, cut_text(ids[:100], 50))
    monkeypatch.setattr(evaluation, "MAX_SCORES", 28)  # seven tokens at a time
    assert reconstruction(model, cut_text(ids[:100], 50)) == whole

    # Entries that have fallen together: only one of them ever comes back.
    fallen = reconstruction(model, cut_text(torch.tensor([2, 3] * 50), 10))
    assert (fallen.accuracy, fallen.num_text_tokens, fallen.num_used_tokens) == (0.5, 2, 1)

    # What fills a patch is no text.
    assert reconstruction(model, cut_text(torch.tensor([2, 2, 2]), 4, patch_size=4)).num_tokens == 3
    with pytest.raises(ValueError, match="no sequence"):
        reconstruction(model, [])


def test_nearest_distances(monkeypatch):
    torch.manual_seed(0)
    codebook = Gaussians(torch.randn(23, 3), torch.randn(23))
    expected = []

    for j in range(23):
        others = [k for k in range(23) if k != j]
        units = [(codebook.log_scale[j].exp() + codebook.log_scale[k].exp()) / 2 for k in others]
        away = [torch.linalg.norm(codebook.mean[j] - codebook.mean[k]) for k in others]
        expected.append(min(distance / unit for distance, unit in zip(away, units, strict=True)))

    for limit in (2**24, 50):
        monkeypatch.setattr(evaluation, "MAX_SCORES", limit)
        torch.testing.assert_close(nearest_distances(codebook), torch.stack(expected))

    state = codebook_state(codebook)
    assert state.nearest_distance_min == pytest.approx(min(expected).item())
    assert state.scale_min <= state.scale_mean <= state.scale_max and (
        state.num_entries,
        state.latent_size,
    ) == (23, 3)
    assert math.isnan(
        codebook_state(Gaussians(torch.zeros(1, 2), torch.zeros(1))).nearest_distance_min
    )


# ---------------------------------------------------------------------------------------- all of it


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
    rows = likelihoods(model, cut_text(text.tokens, 18), 2)
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


def test_a_record_of_other_fields_is_rejected(flow):
    record = provenance_of(flow, "here", None) | {"mine": 1.0}
    with pytest.raises(ValueError, match=r"no Evaluation.*'mine', 'nats_per_token'"):
        Evaluation.from_json(json.dumps(record))
    assert record["command"].startswith("python ") and record["data_sha256"] is None


def test_the_checksum_is_of_the_weights(flow, tmp_path):
    flow.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = TarFlowLMModel.from_pretrained(tmp_path)
    assert weights_checksum(again) == weights_checksum(flow)
    again.flow.layers[1].start.data[0] += 1
    assert weights_checksum(again) != weights_checksum(flow)
