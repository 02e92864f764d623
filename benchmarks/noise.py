"""The noise of texts, replayed: under no change, under another condition, and by a changed model.

    python benchmarks/noise.py checkpoints/python-docs
    python benchmarks/noise.py FOLDER --gguf_file F.gguf --num_texts 32     # converted first

Two tables.

1. Counterfactuals. The noise of each text is drawn (`noise_of`) and replayed: `changed` counts the
   tokens that come back otherwise. Then the same noise writes behind the beginning of another text,
   at another temperature of the mixtures, and the first token of its own beginning is forced to be
   the other text's. `kept` is the share of tokens behind the beginning that stay those of the text,
   `first` the mean number of them in front of the first that differs, and `fresh` the share under
   new noise, behind the same beginning.
2. The model and itself in 8 bits and in bfloat16, by `tarflow_hf.evaluation.compare`: from the same
   noise `same` texts stay, others part at a token with probability `rate`; scores in bits a token,
   B minus A, with the standard error, paired and unpaired.
"""

import argparse
import copy
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from measure import Results, load_and_convert
from torch import Tensor

from tarflow_hf import TarFlowLMModel
from tarflow_hf.data import PYTHON_DOCS, PackedTokens, held_out_documents
from tarflow_hf.evaluation import compare, round_to_int8
from tarflow_hf.loading import load_checkpoint


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a TarFlowLM, or with --gguf_file the folder of a source")
    parser.add_argument("--gguf_file", help="of a causal language model that is converted first")
    parser.add_argument(
        "--data",
        type=Path,
        help="a text, cut into pieces; default: the Python documentation's test split",
    )
    parser.add_argument("--num_texts", type=int, default=64)
    parser.add_argument("--num_tokens", type=int, default=64, help="of a text")
    parser.add_argument("--begin", type=int, default=8, help="tokens of a beginning")
    parser.add_argument("--temperature", type=float, default=0.7, help="of the mixtures")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--output", type=Path, help="file to append the rows to, as JSON lines")

    return parser.parse_args()


def in_batches(function, size: int, *tensors: Tensor) -> Tensor:
    parts = [tensor.split(size) for tensor in tensors]
    return torch.cat([function(*rows) for rows in zip(*parts, strict=True)])


def counterfactuals(
    model: TarFlowLMModel, texts: Tensor, arguments: argparse.Namespace, table: Results
) -> None:
    """Measures how much of texts (n, T) stays when their noise writes under another condition."""
    begin, size = arguments.begin, arguments.batch_size
    generator = torch.Generator().manual_seed(0)
    noise = in_batches(lambda ids: model.noise_of(ids, generator=generator), size, texts)
    fresh = torch.randn(noise.shape, generator=generator)
    others = texts.roll(1, 0)
    forced = torch.cat([others[:, :1], texts[:, 1:begin]], 1)

    def write(prompts: Tensor, noise: Tensor, **options) -> Tensor:
        def of(prompt: Tensor, noise: Tensor) -> Tensor:
            return model.generate(prompt, noise=noise, **options)

        return in_batches(of, size, prompts, noise)

    table.title(condition=24, texts=5, tokens=6, changed=7, kept=5, first=6, fresh=5)
    facts = {"kind": "counterfactual", "texts": len(texts), "tokens": texts.shape[1]}
    facts |= {"begin": begin, "temperature": arguments.temperature}
    changed = int((write(texts[:, :0], noise) != texts).sum())
    nothing = dict.fromkeys(("kept", "first", "fresh"))
    table.row(condition="none", changed=changed, **nothing, **facts)

    conditions = {
        "another beginning": (others[:, :begin], {}),
        "another first token": (forced, {}),
        "another temperature": (texts[:, :begin], {"mixture_temperature": arguments.temperature}),
    }
    for condition, (prompts, options) in conditions.items():
        is_kept, is_kept_by_chance = (
            write(prompts, u, **options)[:, begin:] == texts[:, begin:] for u in (noise, fresh)
        )
        table.row(
            condition=condition,
            changed=None,
            kept=is_kept.double().mean().item(),
            first=is_kept.long().cumprod(-1).sum(-1).double().mean().item(),
            fresh=is_kept_by_chance.double().mean().item(),
            **facts,
        )


def changed_models(
    model: TarFlowLMModel, texts: Tensor, arguments: argparse.Namespace, table: Results
) -> None:
    """Compares the model with itself in 8 bits, and in bfloat16."""
    rounded = copy.deepcopy(model)
    round_to_int8(rounded)
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        halved = TarFlowLMModel.from_pretrained(folder, dtype=torch.bfloat16).eval()

    table.title(change=24, texts=5, tokens=6, same=5, rate=8, difference=10, error=9, unpaired=9)
    for change, other in {"8 bits": rounded, "decoders in bfloat16": halved}.items():
        found = compare(model, other, *texts.shape, texts, arguments.batch_size)
        table.row(
            kind="compare",
            change=change,
            texts=len(texts),
            tokens=texts.shape[1],
            same=int(found.is_same.sum()),
            rate=found.rate,
            difference=found.difference,
            error=found.standard_error,
            unpaired=found.unpaired_standard_error,
            bits=found.scores[0].mean().item(),
        )


@torch.no_grad()
def main():
    arguments = parse_arguments()
    if arguments.gguf_file is None:
        model, tokenizer = load_checkpoint(arguments.model)
    else:
        _, model, tokenizer = load_and_convert(arguments.model, arguments.gguf_file)

    name = arguments.data or PYTHON_DOCS
    documents = held_out_documents(name)
    pieces = PackedTokens(documents, tokenizer, arguments.num_tokens)
    texts = torch.stack([piece["input_ids"] for piece in pieces.first(arguments.num_texts)])

    table = Results("cpu", arguments.output)
    table.facts["model"] = Path(arguments.gguf_file or arguments.model).stem
    table.facts["data"] = Path(name).name
    counterfactuals(model, texts, arguments, table)
    changed_models(model, texts, arguments, table)


if __name__ == "__main__":
    main()
