"""Generative perplexity of texts under a judge, as a module of the `evaluate` library."""

import datasets
import evaluate
import torch

from tarflow_hf.evaluation import JUDGE, judge_texts, load_judge, token_statistics

_DESCRIPTION = """\
The perplexity of generated texts under a causal language model, the judge, with the mean entropy of the judge's tokens
within a text beside it. Perplexity alone can be made as low as one likes by texts that say the same again and again:
read it with the entropy. A text's first token is not scored, as nothing stands before it.
"""

_INPUTS = """\
Args:
    predictions (list of str): The texts, of at least two of the judge's tokens each.
    judge (str): A causal language model with its tokenizer: a folder, or a repository of the Hub. Default GPT-2 large.
    batch_size (int): Default 8.
    max_length (int): Tokens of the judge that are read of each text. Default 1,024.
    device (str): Default "cuda" where there is one.

Returns:
    perplexity, nats_per_token, standard_error (of nats_per_token, over the texts; None of a single one), perplexities
    (of each text), entropy (nats), num_truncated.

Example:
    >>> metric = evaluate.load("metrics/generative_perplexity")
    >>> metric.compute(predictions=["a text that was sampled", "another"], judge="gpt2")
"""


class GenerativePerplexity(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def add_batch(self, *, predictions=None, references=None, **options):
        """Adds texts.

        Raises:
            TypeError: If it is one string, whose characters would be taken for texts.
        """
        if isinstance(predictions, str):
            raise TypeError("predictions is one string; give a list of texts, [text].")

        return super().add_batch(predictions=predictions, references=references, **options)

    def _compute(
        self,
        predictions: list[str],
        judge: str = JUDGE,
        batch_size: int = 8,
        max_length: int = 1024,
        device: str | None = None,
    ) -> dict[str, float | int | list[float] | None]:
        model, tokenizer = load_judge(
            judge, device or ("cuda" if torch.cuda.is_available() else "cpu")
        )
        judged = judge_texts(predictions, model, tokenizer, batch_size, max_length)
        tokens = tokenizer(list(predictions), add_special_tokens=False, verbose=False).input_ids

        return {
            "perplexity": judged.perplexity,
            "nats_per_token": judged.nats_per_token,
            "standard_error": judged.standard_error if len(predictions) > 1 else None,
            "perplexities": (judged.nats / judged.num_tokens).exp().tolist(),
            "entropy": token_statistics(tokens).entropy,
            "num_truncated": judged.num_truncated,
        }
