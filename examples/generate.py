"""Sample text from a checkpoint: a folder, or a repository of the Hub.

python examples/generate.py runs/demo/model
python examples/generate.py runs/demo/model --num_samples 4 --max_new_tokens 128 --temperature 0.9 --seed 1
python examples/generate.py runs/demo/model --prompt "the function returns"
python examples/generate.py runs/demo/model --top_p 0.9 --flow_temperatures 1 1 0.9 --num_candidates 8
python examples/generate.py runs/demo/model --show_states          # the text that every flow's state decodes to
python examples/generate.py runs/demo/model --show_drafts          # guesses in yellow, until they are certain
"""

import argparse

import torch
from transformers import set_seed

from tarflow_hf.data import checked_ids, say_what_is_lost
from tarflow_hf.loading import load_checkpoint


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="a folder, or a repository of the Hub")
    parser.add_argument("--prompt", default="", help="text to continue")
    parser.add_argument("--num_samples", type=int, default=1)
    parser.add_argument(
        "--max_new_tokens", type=int, help="default: as long as the model was made for"
    )
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="standard deviation of the noise"
    )
    parser.add_argument(
        "--flow_temperatures",
        type=float,
        nargs="+",
        help="of each flow's state, from the data side",
    )
    parser.add_argument("--mixture_temperature", type=float, help="of the weights of Mix-d flows")
    parser.add_argument(
        "--top_k", type=int, help="components that Mix-d flows keep: the k of the largest weights"
    )
    parser.add_argument(
        "--top_p", type=float, help="components that Mix-d flows keep: the fewest of weight p"
    )
    parser.add_argument(
        "--num_candidates", type=int, help="samples to choose each from, by the likelihood bound"
    )
    parser.add_argument(
        "--decode", choices=["argmax", "sample"], default="argmax", help="from latents to tokens"
    )
    parser.add_argument(
        "--show_states", action="store_true", help="decode every flow's state, from noise to text"
    )
    parser.add_argument(
        "--prompt_lookup_num_tokens",
        type=int,
        help="tokens that are copied from the text as a guess, and verified in one pass",
    )
    parser.add_argument(
        "--show_drafts", action="store_true", help="show one sample while it comes about"
    )
    parser.add_argument(
        "--sleep_time", type=float, default=0.05, help="seconds that each guess is shown"
    )
    parser.add_argument("--seed", type=int, default=0)

    arguments = parser.parse_args()
    if arguments.show_drafts and (arguments.num_samples > 1 or arguments.show_states):
        parser.error("--show_drafts is for one sample, without --show_states.")

    return arguments


def main():
    arguments = parse_arguments()
    set_seed(arguments.seed)
    model, tokenizer = load_checkpoint(arguments.checkpoint)

    prompt = None
    if arguments.prompt:
        prompt = torch.tensor([checked_ids(tokenizer, arguments.prompt, "the prompt")])
        say_what_is_lost(tokenizer, [arguments.prompt], "the prompt")

    streamer = None
    if arguments.show_drafts:
        from transformers import TextDiffusionStreamer  # newer than the oldest version

        streamer = TextDiffusionStreamer(
            tokenizer, sleep_time=arguments.sleep_time, skip_special_tokens=True
        )

    out = model.generate(
        prompt,
        max_new_tokens=arguments.max_new_tokens,
        num_return_sequences=arguments.num_samples,
        temperature=arguments.temperature,
        flow_temperatures=arguments.flow_temperatures,
        mixture_temperature=arguments.mixture_temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        num_candidates=arguments.num_candidates,
        decode=arguments.decode,
        prompt_lookup_num_tokens=arguments.prompt_lookup_num_tokens,
        streamer=streamer,
        output_states=True,
    )
    if arguments.show_drafts:
        return

    for sample in range(arguments.num_samples):
        if arguments.show_states:
            for flow in range(len(out.states) - 1, 0, -1):
                tokens = model.decode(out.states[flow][sample : sample + 1]).argmax(-1)
                print(f"[before flow {flow}] {tokenizer.decode(tokens[0])}\n")
        print(tokenizer.decode(out.sequences[sample], skip_special_tokens=True), end="\n\n")


if __name__ == "__main__":
    main()
