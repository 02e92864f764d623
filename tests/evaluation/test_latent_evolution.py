"""Latent evolution, against definitions written out."""

import pytest
import torch

from helpers.scripts import script
from tarflow_hf.data import character_tokenizer
from tarflow_hf.evaluation import (
    cut_text,
    evolution_of_samples,
    evolution_of_text,
    measure_evolution,
    measure_state,
    provenance_of,
)
from tarflow_hf.training import save_model


def by_definition(state):
    """The four measures of one sequence's states (T, d)."""
    length = len(state)
    pairs = [(i, j) for i in range(length) for j in range(i + 1, length)]
    cosines = [torch.cosine_similarity(state[i], state[j], dim=0) for i, j in pairs]
    eigenvalues = torch.linalg.eigvalsh(
        torch.cov(state.T, correction=0).reshape(state.shape[1], -1)
    )

    return {
        "norm": state.norm(dim=-1).mean(),
        "cosine": torch.stack(cosines).mean() if pairs else torch.tensor(1.0),
        "participation_ratio": eigenvalues.sum() ** 2 / eigenvalues.square().sum()
        if pairs
        else torch.tensor(0.0),
        "centroid": state.mean(0),
    }


@pytest.mark.parametrize("size", [1, 2, 5])
def test_measures_by_definition(size):
    torch.manual_seed(size)
    lengths = [1, 2, 7, 4]
    state = torch.randn(4, 7, size, dtype=torch.float64) + 0.5
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    state = state.masked_fill(~mask[..., None], torch.nan)  # what is no token is not read
    measured = measure_state(state, mask)
    order = torch.randperm(7)
    shuffled = measure_state(state[:, order], mask[:, order])

    for row, length in enumerate(lengths):
        for name, expected in by_definition(state[row, :length]).items():
            torch.testing.assert_close(measured[name][row], expected, check_dtype=False)
            torch.testing.assert_close(shuffled[name][row], expected, check_dtype=False)


def test_known_shapes():
    """Measures of states whose shape is known.

    States on a line vary in one direction, states in a ball in all of them. A shift of the states
    shifts their centre by as much.
    """
    torch.manual_seed(0)
    line = torch.linspace(-1, 3, 50)[None, :, None] * torch.ones(3)
    ball = torch.randn(1, 20_000, 3)
    assert measure_state(line)["participation_ratio"].item() == pytest.approx(1)
    assert measure_state(ball)["participation_ratio"].item() == pytest.approx(3, abs=0.01)
    assert measure_state(ball)["cosine"].item() == pytest.approx(0, abs=1e-3)
    evolution = measure_evolution([[line, line + torch.tensor([0.0, 3.0, 4.0])]])
    assert evolution.centroid_movement[0].mean == pytest.approx(5)
    assert [len(getattr(evolution, name)) for name in ("norm", "cosine", "centroid_movement")] == [
        2,
        2,
        1,
    ]


@pytest.mark.parametrize(
    ("states", "message"),
    [
        ([], "no sequence to measure"),
        ([[torch.zeros(2, 3)]], r"State 0 of 0: .*\(B, T, d\), not \(2, 3\)"),
        ([[torch.zeros(1, 0, 2)]], "needs a token"),
        (
            [[torch.zeros(1, 3, 2), torch.full((1, 3, 2), torch.nan)]],
            "State 1 of 1: .*not finite in 3 tokens",
        ),
    ],
)
def test_bad_states(states, message):
    with pytest.raises(ValueError, match=message):
        measure_evolution(states)


def test_evolution_of_text_and_samples(model):
    ids = torch.randint(27, (11, 18))
    sequences = [{"input_ids": row} for row in ids]
    whole = evolution_of_text(model, sequences)
    assert whole.num_states == 4 and (whole.num_sequences, whole.num_tokens, whole.latent_size) == (
        11,
        18,
        2,
    )
    halves = [
        evolution_of_text(model, sequences, **options)
        for options in ({"batch_size": 3}, {"max_sequences": 5})
    ]
    assert (
        halves[0].norm[2].mean == pytest.approx(whole.norm[2].mean, rel=1e-5)
        and halves[1].num_sequences == 5
    )
    with torch.no_grad():
        states = model.flow(model.encode(ids)).states  # other latents, alike

    assert states[1].norm(dim=-1).mean().item() == pytest.approx(whole.norm[1].mean, rel=0.1)

    one, other = (evolution_of_samples(model, 5, length=8, batch_size=size) for size in (2, 16))
    assert one.num_states == 4 and one.norm[0].mean == pytest.approx(other.norm[0].mean, rel=1e-4)
    many = evolution_of_samples(model, 200, length=8, batch_size=200)
    assert many.norm[-1].mean == pytest.approx(
        1.2533, abs=0.05
    )  # of N(0, I) in two dimensions: sqrt(pi / 2)


def test_evolution_as_a_command(model, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    save_model(model, character_tokenizer(), tmp_path / "model")
    (tmp_path / "text.txt").write_text("some words to encode " * 10)
    arguments = [
        "--data",
        tmp_path / "text.txt",
        "--num_sequences",
        4,
        "--length",
        9,
        "--device",
        "cpu",
    ]
    arguments += ["--figure", tmp_path / "evolution.svg", "--output", tmp_path / "evolution.json"]
    options = {"monkeypatch": monkeypatch, "capsys": capsys}
    printed = script("latent_evolution.py", tmp_path / "model", *arguments, **options)
    assert printed.count("flow 3") == 2 and "text: 4 sequences of 9 tokens" in printed
    import json

    found = json.loads((tmp_path / "evolution.json").read_text())
    ids = torch.tensor(character_tokenizer()("some words to encode " * 10).input_ids)
    expected = evolution_of_text(model, cut_text(ids[:36], 9))
    assert found["text"]["norm"][3]["mean"] == pytest.approx(expected.norm[3].mean, rel=1e-4)
    assert set(found) == {*provenance_of(model, "", None), "text", "samples"}
