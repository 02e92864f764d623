"""Bits per token of texts under a TarFlowLM, as a module of the `evaluate` library."""

import datasets
import evaluate
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tarflow_hf  # noqa: F401  registers the model, so that no remote code is needed
from tarflow_hf.data import CharacterCount, is_of_characters, token_ids
from tarflow_hf.evaluation import cut_text, likelihood, longest_sequence

_DESCRIPTION = """\
Bits per token and per character of texts. Of a TarFlowLM they are upper bounds, from the importance-weighted bound on
the likelihood; of a discrete model with a beginning-of-sequence token they are exact. Every token counts. A text longer
than the model takes is cut, and nothing reaches over a cut.
"""

_INPUTS = """\
Args:
    predictions (list of str): The texts, none empty.
    checkpoint (str): Of the model and its tokenizer: a folder, or a repository of the Hub.
    num_samples (int): Of the importance-weighted bound; 1 gives the ELBO. Default 16.
    batch_size (int): Default 16.
    seed (int): Of the latents. Default 0.
    device (str): Default "cuda" where there is one.

Returns:
    bits_per_token, bits_per_character, nats_per_token, standard_error (of nats_per_token, over the texts' sequences;
    None of a single one), perplexity (per token), num_tokens, num_characters, num_dropped_characters.

    Bits per character divide by num_characters: the characters of the texts, or for a tokenizer of
    single characters those that it makes of them.

Example:
    >>> metric = evaluate.load("metrics/bits_per_token")
    >>> metric.compute(predictions=["a text", "another"], checkpoint="runs/demo/model")
"""

_CITATION = """\
@inproceedings{zhang2025flexible,
  title = {Flexible Language Modeling in Continuous Space with Transformer-based Autoregressive Flows},
  author = {Zhang, Ruixiang and Zhai, Shuangfei and Gu, Jiatao and Zhang, Yizhe and Zheng, Huangjie and
            Chen, Tianrong and Bautista, Miguel Angel and Susskind, Josh and Jaitly, Navdeep},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2025},
}
"""


class BitsPerToken(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("string")}),
            reference_urls=["https://arxiv.org/abs/2507.00425"],
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
        checkpoint: str,
        num_samples: int = 16,
        batch_size: int = 16,
        seed: int = 0,
        device: str | None = None,
    ) -> dict[str, float | int | None]:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        sequences, characters = [], CharacterCount(tokenizer)

        for number, text in enumerate(predictions):
            ids = token_ids(tokenizer, text)
            characters.add(text)
            if not ids:
                raise ValueError(
                    f"A text without tokens has no bits: prediction {number} (the first is 0), "
                    f"{text[:40]!r}. Leave it out."
                )

            sequences += cut_text(
                torch.tensor(ids), longest_sequence(model), getattr(model.config, "patch_size", 1)
            )

        result = likelihood(
            model, sequences, batch_size=batch_size, num_samples=num_samples, seed=seed
        )
        num_characters = characters.num_characters
        if is_of_characters(tokenizer):
            num_characters = result.num_tokens

        return {
            "bits_per_token": result.bits_per_token,
            "bits_per_character": result.bits_per_character(num_characters / result.num_tokens),
            "nats_per_token": result.nats_per_token,
            "standard_error": result.standard_error if len(sequences) > 1 else None,
            "perplexity": result.perplexity,
            "num_tokens": result.num_tokens,
            "num_characters": num_characters,
            "num_dropped_characters": characters.num_lost,
        }
