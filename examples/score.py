"""Score texts, the most likely one first.

    python examples/score.py runs/demo/model "the function returns a list" "the list returns a function"
    python examples/score.py USER/NAME "a text" --num_samples 64           # a tighter bound

Nats of a TarFlowLM are upper bounds, of the whole text; texts of different lengths compare by nats
per token. A file, or a text longer than the model's sequences: examples/evaluate.py.
"""

import argparse

import torch

from tarflow_hf.data import checked_ids, say_what_is_lost
from tarflow_hf.evaluation import cut_text
from tarflow_hf.loading import load_checkpoint


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="a folder, or a repository of the Hub")
    parser.add_argument("texts", nargs="+")
    parser.add_argument(
        "--num_samples", type=int, default=16, help="of the importance-weighted bound"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the latents")

    return parser.parse_args()


@torch.no_grad()
def main():
    arguments = parse_arguments()
    model, tokenizer = load_checkpoint(arguments.checkpoint)

    named = enumerate(arguments.texts, 1)
    texts = [torch.tensor(checked_ids(tokenizer, text, f"text {n}")) for n, text in named]
    # The last token is repeated until its patch is whole: a bound on more text bounds the text.
    whole = [cut_text(ids, 2**31, model.config.patch_size)[0]["input_ids"] for ids in texts]
    input_ids, attention_mask = (
        torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        for rows in (whole, [torch.ones_like(ids) for ids in whole])
    )
    lengths = torch.tensor([len(ids) for ids in texts])

    generator = torch.Generator().manual_seed(arguments.seed)
    bound = model.importance_weighted_bound(
        input_ids, attention_mask, arguments.num_samples, generator
    )
    say_what_is_lost(tokenizer, arguments.texts)
    for row in (-bound / lengths).argsort().tolist():
        nats, text = -bound[row].item(), tokenizer.decode(texts[row])
        print(f"{nats:9.3f} nats, {nats / lengths[row].item():.4f} per token: {text}")


if __name__ == "__main__":
    main()
