"""The discrete baseline."""

import torch
from transformers import set_seed

from helpers.training import config
from tarflow_hf.evaluation import negative_log_likelihood
from tarflow_hf.training import compute_loss, discrete_baseline


def test_the_discrete_baseline_scores_every_token():
    """The loss is that of the sequence's probabilities, token by token.

    They are a distribution over all sequences.
    """
    set_seed(0)
    small = config(vocab_size=3, max_position_embeddings=4)
    model = discrete_baseline(small).eval()
    assert model.config.num_hidden_layers == 2 and model.config.hidden_size == small.hidden_size
    everything = torch.cartesian_prod(*[torch.arange(3)] * 4)

    with torch.no_grad():
        nats = negative_log_likelihood(model, everything)
        torch.testing.assert_close(compute_loss(model, everything[:7]), nats[:7].mean() / 4)
        start = torch.full((81, 1), 3)
        logits = model(torch.cat([start, everything], 1)).logits[:, :-1].log_softmax(-1)

    # One entry of the vocabulary is the start itself, which no text contains: what is lost to it is
    # all that is lost.
    torch.testing.assert_close(nats, -logits.gather(-1, everything[..., None]).sum((1, 2)))
    assert (-nats).exp().sum() < 1
