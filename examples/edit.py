"""Edit a text in the space of the flows.

Encode it, change its noise (or the state of a flow), and decode it again.

    python examples/edit.py runs/demo/model "the function returns a list"                  # unedited it comes back
    python examples/edit.py runs/demo/model "the function returns a list" --redraw 4:12    # new noise for these tokens
    python examples/edit.py runs/demo/model "the function returns a list" --towards "a class without any state"

With `--num_flows l` the edit is one of the state h of flow l, and what the flows above it have made
is kept.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

import tarflow_hf  # noqa: F401  registers the model, so that no remote code is needed
from tarflow_hf.data import checked_ids, say_what_is_lost


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="a folder, or a repository of the Hub")
    parser.add_argument("text")
    parser.add_argument("--redraw", metavar="START:END", help="tokens to draw anew")
    parser.add_argument(
        "--towards", metavar="TEXT", help="another text, to go to in steps; the longer one is cut"
    )
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument(
        "--num_flows", type=int, help="edit the state of this flow; default: the noise"
    )
    parser.add_argument("--seed", type=int, default=0)

    return parser.parse_args()


def interpolate(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    """Interpolates along the great circle: what lies between two draws of N(0, I) looks like one."""
    angle = torch.acos(torch.cosine_similarity(a.flatten(1), b.flatten(1)).clamp(-1, 1)).reshape(
        -1, 1, 1
    )
    circle = (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)
    return torch.where(angle.sin() > 1e-3, circle, torch.lerp(a, b, t))


@torch.no_grad()
def main():
    arguments = parse_arguments()
    set_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint)
    model = AutoModelForCausalLM.from_pretrained(arguments.checkpoint).eval()

    texts = [
        checked_ids(tokenizer, text)
        for text in (arguments.text, arguments.towards)
        if text is not None
    ]
    say_what_is_lost(tokenizer, [arguments.text, arguments.towards or ""])
    length = min(map(len, texts)) // model.config.patch_size * model.config.patch_size
    latents = model.encode(torch.tensor([ids[:length] for ids in texts]))
    states = model.flow(latents, num_flows=arguments.num_flows).noise  # of the stack cut there
    edits = states[:1]

    if arguments.redraw is not None:
        start, end = map(int, arguments.redraw.split(":"))
        edits[:, start:end] = torch.randn_like(edits[:, start:end])

    if arguments.towards is not None:
        steps = torch.linspace(0, 1, arguments.steps).tolist()
        edits = torch.cat([interpolate(edits, states[1:], step) for step in steps])

    print(
        "\n".join(
            tokenizer.batch_decode(model.generate(noise=edits, num_flows=arguments.num_flows))
        )
    )


if __name__ == "__main__":
    main()
