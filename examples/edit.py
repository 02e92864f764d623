"""Edit a text in the space of the flows.

Encode it, change its noise (or the state of a flow), and decode it again.

    python examples/edit.py runs/demo/model "the function returns a list"                  # unedited it comes back
    python examples/edit.py runs/demo/model "the function returns a list" --redraw 4:12    # new noise for these tokens
    python examples/edit.py runs/demo/model "the function returns a list" --towards "a class without any state"

With `--num_flows l` the edit is one of the state h of flow l, and what the flows above it have made
is kept. All that is read after a redrawn token may change, too: in a terminal what changed is in
reverse video. To change a part and nothing else, fill a gap: examples/infill.py.
"""

import argparse
import sys

import torch
from transformers import set_seed

from tarflow_hf.data import checked_ids, say_what_is_lost
from tarflow_hf.loading import load_checkpoint
from tarflow_hf.report import Pass


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="a folder, or a repository of the Hub")
    parser.add_argument("text")
    parser.add_argument(
        "--redraw", metavar="START:END", type=part, help="tokens to draw anew; the first is 0"
    )
    parser.add_argument(
        "--towards", metavar="TEXT", help="another text, to go to in steps; the longer one is cut"
    )
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument(
        "--num_flows", type=int, help="edit the state of this flow; default: the noise"
    )
    parser.add_argument("--seed", type=int, default=0)

    return parser.parse_args()


def part(text: str) -> range:
    """The numbers from START to before END."""
    start, _, end = text.partition(":")
    if not (start.isdigit() and end.isdigit() and int(start) < int(end)):
        raise argparse.ArgumentTypeError(f"must be START:END, such as 4:12, not {text!r}")

    return range(int(start), int(end))


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
    model, tokenizer = load_checkpoint(arguments.checkpoint)

    texts = [
        checked_ids(tokenizer, text)
        for text in (arguments.text, arguments.towards)
        if text is not None
    ]
    say_what_is_lost(tokenizer, [arguments.text, arguments.towards or ""])
    length = min(map(len, texts)) // model.config.patch_size * model.config.patch_size
    if not length:
        raise ValueError(
            f"The model takes {model.config.patch_size} tokens at a time: give a longer text."
        )
    if length < max(map(len, texts)):
        print(f"Only the first {length} tokens of the texts are taken.", file=sys.stderr)

    latents = model.encode(torch.tensor([ids[:length] for ids in texts]))
    states = model.flow(latents, num_flows=arguments.num_flows).noise  # of the stack cut there
    edits = states[:1]

    if (redraw := arguments.redraw) is not None:
        if redraw.stop > length:
            raise ValueError(
                f"--redraw {redraw.start}:{redraw.stop} goes beyond the text, which has {length} tokens."
            )
        edits[:, redraw] = torch.randn_like(edits[:, redraw])

    if arguments.towards is not None:
        steps = torch.linspace(0, 1, arguments.steps).tolist()
        edits = torch.cat([interpolate(edits, states[1:], step) for step in steps])

    edited = model.generate(noise=edits, num_flows=arguments.num_flows)
    is_changed = edited.cpu() != torch.tensor(texts[0][:length])
    if sys.stdout.isatty() and arguments.towards is None:
        is_given = torch.zeros_like(is_changed[0])
        print(Pass("", edited[0], is_changed[0], is_given).marked(tokenizer, color=True))
    else:
        print("\n".join(tokenizer.batch_decode(edited)))

    if redraw is not None and arguments.towards is None:
        print(
            f"{len(redraw)} of {length} tokens were redrawn, {int(is_changed.sum())} changed.",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()
