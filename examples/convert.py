"""Convert a causal language model to a TarFlowLM of one flow, without training and without loss.

    python examples/convert.py SOURCE OUT                       # an id of the Hub, or a folder
    python examples/convert.py FOLDER OUT --gguf_file F.gguf    # needs the package gguf
    python examples/convert.py SOURCE OUT --text my.txt         # the text of the probe

OUT then loads with transformers and torch only, by `trust_remote_code=True`.
"""

import argparse
from pathlib import Path

import torch
from huggingface_hub import ModelCard

from tarflow_hf.conversion import (
    PROBE_TEXT,
    adopt,
    from_causal_lm,
    load_source,
    probe,
)

CARD = """---
library_name: transformers
pipeline_tag: text-generation
license: {license}
base_model: {source}
tags: [tarflowlm, normalizing-flows]
---

# {name}

{source}, converted to a TarFlowLM of one flow by `tarflow_hf`, without training. Minus its
ELBO is the source's cross-entropy. On {num_tokens} tokens, in nats a token: source {probe.source_nats:.6f}, minus ELBO
{probe.elbo_nats:.6f}. The closest two means of its codebook are {probe.closest_means:.1f} scales apart.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("OUT", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("OUT")
tokens = model.generate(**tokenizer("The history of the city", return_tensors="pt"), max_new_tokens=40)
print(tokenizer.decode(tokens[0]))
```

Every text begins behind token {start}, which the model reads by itself: leave it out of prompts.

Licence: that of the source, {license}. The code is under Apache-2.0. Limits and biases are those of the source.
"""


def parse_arguments() -> argparse.Namespace:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("source", help="an id of the Hub, or a folder")
    parser.add_argument("output", type=Path, help="the folder to write")
    parser.add_argument("--gguf_file", help="the file of the source to read")
    parser.add_argument("--latent_size", type=int, default=16)
    parser.add_argument("--start_token_id", type=int, help="the token before the first one")
    parser.add_argument("--conditional", action="store_true", help="to be trained for gaps")
    parser.add_argument("--dtype", help="such as bfloat16; by default the source's")
    parser.add_argument("--text", type=Path, help="a text for the probe")
    parser.add_argument("--name", help="the source's name on the card")
    parser.add_argument("--license", help="the source's licence; by default what its card says")

    return parser.parse_args()


def license_of(source: str) -> str:
    """The licence that the source's own card names."""
    card = Path(source) / "README.md"
    try:
        data = ModelCard.load(card if Path(source).exists() else source).data
    except (OSError, ValueError):
        return "unknown"

    return getattr(data, "license", None) or "unknown"


def main():
    arguments = parse_arguments()
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    source, tokenizer = load_source(arguments.source, gguf_file=arguments.gguf_file, dtype=dtype)
    model = from_causal_lm(
        source.eval(),
        tokenizer,
        arguments.latent_size,
        start_token_id=arguments.start_token_id,
        conditional=arguments.conditional,
    )
    adopt(model, source, tokenizer)

    text = arguments.text.read_text(encoding="utf-8") if arguments.text else PROBE_TEXT
    ids = torch.arange(64).remainder(model.config.vocab_size).unsqueeze(0)
    if tokenizer is not None:
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids

    found = probe(source, model, ids[:, : min(256, model.config.max_position_embeddings)])
    print(found)

    model.save_pretrained(arguments.output)
    if tokenizer is not None:
        tokenizer.save_pretrained(arguments.output)

    name = arguments.name or arguments.source.rstrip("/").split("/")[-1]
    card = CARD.format(
        name=f"{name} as a TarFlowLM",
        source=arguments.name or (name if Path(arguments.source).exists() else arguments.source),
        license=arguments.license or license_of(arguments.source),
        probe=found,
        num_tokens=min(256, ids.shape[1]),
        start=model.config.start_token_id,
    )
    (arguments.output / "README.md").write_text(card, encoding="utf-8")
    print(
        f"{arguments.output}: load it by AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)"
    )


if __name__ == "__main__":
    main()
