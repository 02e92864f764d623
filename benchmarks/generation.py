"""Tokens per second of `generate`, compared with the library's Llama of the same size.

    python benchmarks/generation.py --quick                           # minutes on two CPU cores
    python benchmarks/generation.py --output generation.jsonl         # the tables of docs/performance.md, all sizes
    python benchmarks/generation.py --checkpoint runs/demo/model      # a trained stack
    python benchmarks/generation.py --config examples/recipes/openwebtext_deep.json --patch_sizes 1   # on a GPU

Four tables.

1. Whole stacks, in every mode: with random weights where no checkpoint is given, whose flows are
   easier to invert in parallel than trained ones. `--patch_steps 0 --train_steps 0` leaves it at
   that.
2. Patches, their cost in likelihood and their gain in speed: the configuration with each patch size, with
   and without a second decoder over the tokens of a patch (`patch_head_layers`), trained alike for
   `--patch_steps` on the Python documentation; the ELBO of held-out text in bits per character.
3. Trained flows, one by one, in parallel and sequentially: of the checkpoint, or of a small Mix-1
   stack that is trained first.
4. With `--parts`: where the time of "auto" goes, flow by flow.

A mode whose tokens differ from those of the sequential inverse for the same noise gets no time.
Times are medians of repeats in which the modes take turns.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial, wraps
from pathlib import Path
from unittest import mock

import torch
from measure import Results, median_times
from torch import Tensor
from transformers import AutoModel, DynamicCache, set_seed

from tarflow_hf import TarFlowLMConfig, TarFlowLMModel
from tarflow_hf.data import PYTHON_DOCS, PackedTokens, character_tokenizer, load_splits
from tarflow_hf.evaluation import likelihood
from tarflow_hf.modeling.generation_writing import TokenWriter
from tarflow_hf.modeling.inverse_options import FlowInverse
from tarflow_hf.modeling.slots_tarflowlm import to_positions, to_tokens
from tarflow_hf.training import TrainingConfig, compute_loss, discrete_baseline, make_optimizer

LIBRARY = "transformers, Llama"
METHODS = {
    "sequential": {"inverse_method": "sequential"},
    "sequential, captured step": {"inverse_method": "sequential", "capture_step": True},
    "parallel": {"inverse_method": "parallel"},
    "auto": {"inverse_method": "auto"},
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    recipes = Path(__file__).parent.parent / "examples" / "recipes"
    parser.add_argument(
        "--config",
        default=str(recipes / "demo.json"),
        help="a recipe, or a TarFlowLMConfig as JSON",
    )
    parser.add_argument("--checkpoint", help="a trained stack instead, with its own patch size")
    parser.add_argument("--hidden_size", type=int, help="another width than the configuration's")
    parser.add_argument("--latent_size", type=int, help="another than the configuration's")
    parser.add_argument(
        "--vocab_size", type=int, default=27, help="where the configuration names none"
    )
    parser.add_argument("--patch_sizes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--num_tokens", type=int, nargs="+", default=[256, 1024])
    parser.add_argument(
        "--recompute_up_to", type=int, default=256, help="tokens of the loop without a cache"
    )
    parser.add_argument(
        "--captured_step", action="store_true", help="also the step that a GPU captures as a graph"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--patch_steps",
        type=int,
        default=300,
        help="of the second table's models; 0: no such table",
    )
    parser.add_argument(
        "--train_steps", type=int, default=300, help="of the third table's stack; 0: no such table"
    )
    parser.add_argument(
        "--log_scale", type=float, help="of the codebook: -3 is separated, as a trained one"
    )
    parser.add_argument("--parts", action="store_true", help="the fourth table, too")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument(
        "--quick", action="store_true", help="128 tokens, batch 1 and 4, little training"
    )
    parser.add_argument("--output", type=Path, help="file to append the rows to, as JSON lines")

    arguments = parser.parse_args()
    if arguments.quick:
        arguments.num_tokens = [128]
        arguments.batch_sizes = [1, 4]
        arguments.patch_steps = min(arguments.patch_steps, 30)
        arguments.train_steps = min(arguments.train_steps, 60)
        arguments.recompute_up_to = min(arguments.recompute_up_to, 128)

    return arguments


# -------------------------------------------------------------------------------------- what is run


def cached_loop(model: TarFlowLMModel, noise: Tensor) -> Tensor:
    """The plainest cached inverse of every flow: a list, and a dynamic cache."""
    codebook = model.codebook()
    h = to_positions(noise, model.config.patch_size)

    for layer in reversed(model.flow.layers):
        u, states, cache = layer.order(h).arrange(h), [], DynamicCache(config=layer.decoder.config)
        inputs = layer.inputs(u, codebook, first=0, last=1)

        for n in range(u.shape[1]):
            context = layer.context(inputs, first=n, cache=cache)
            states.append(layer.head(u[:, n : n + 1], context, codebook, task="inverse"))
            inputs = layer.inputs(states[-1], codebook, first=1, last=2)

        h = layer.order(u).rearrange(torch.cat(states, 1))

    return model.decode(to_tokens(h, model.config.patch_size)).argmax(-1)


def recomputing_loop(model: TarFlowLMModel, noise: Tensor) -> Tensor:
    """Every prefix is read again for every position: no cache."""
    codebook = model.codebook()
    h = to_positions(noise, model.config.patch_size)

    for layer in reversed(model.flow.layers):
        u = layer.order(h).arrange(h)
        states = torch.zeros_like(u)

        for n in range(u.shape[1]):
            inputs = layer.inputs(states, codebook, last=n + 1)
            context = layer.decoder(inputs_embeds=inputs, use_cache=False).last_hidden_state[:, -1:]
            states[:, n : n + 1] = layer.head(u[:, n : n + 1], context, codebook, task="inverse")

        h = layer.order(u).rearrange(states)

    return model.decode(to_tokens(h, model.config.patch_size)).argmax(-1)


def build(arguments: argparse.Namespace, patch_size: int, **options: int) -> TarFlowLMModel:
    """A stack with random weights, long enough for what is asked; with options of its Mix-d flows."""
    fields = json.loads(Path(arguments.config).read_text(encoding="utf-8"))
    fields = {"vocab_size": arguments.vocab_size, **fields.get("config", fields)}
    fields["max_position_embeddings"] = max(
        *arguments.num_tokens, fields.get("max_position_embeddings", 1024)
    )
    fields["flows"] = [
        flow | (options if flow["coupling"] == "mixture_rosenblatt" else {})
        for flow in fields.get("flows", [])
    ] or None
    for name in ("hidden_size", "latent_size"):
        if getattr(arguments, name) is not None:
            fields[name] = getattr(arguments, name)

    if arguments.log_scale is not None:
        fields["initial_log_scale"] = arguments.log_scale

    return TarFlowLMModel(TarFlowLMConfig(**fields | {"patch_size": patch_size}))


def mix_1_stack(num_tokens: int) -> TarFlowLMModel:
    """Three shallow Mix-1 flows for the characters of the Python documentation."""
    flow = {"coupling": "mixture_cdf", "num_components": 8, "head_hidden_size": 32}
    config = TarFlowLMConfig(
        vocab_size=len(character_tokenizer()),
        latent_size=8,
        max_position_embeddings=num_tokens,
        hidden_size=128,
        num_attention_heads=4,
        flows=[
            {**flow, "direction": "left_to_right", "num_hidden_layers": 2},
            {**flow, "direction": "right_to_left", "num_hidden_layers": 2},
            {**flow, "direction": "left_to_right", "num_hidden_layers": 1},
        ],
    )

    return TarFlowLMModel(config)


@cache
def documentation(split: str, num_tokens: int) -> PackedTokens:
    return PackedTokens(load_splits(PYTHON_DOCS)[split], character_tokenizer(), num_tokens)


def train(
    model: TarFlowLMModel, num_tokens: int, batch_size: int, num_steps: int, **options: float
) -> None:
    """Trains on the Python documentation, in batches of sequences of so many characters."""
    set_seed(0)
    training = TrainingConfig(num_steps=num_steps, **options)
    optimizer = make_optimizer(model, training)
    data = documentation("train", num_tokens)
    order = torch.randperm(len(data)).tolist()

    for step in range(num_steps):
        rows = (order[(batch_size * step + i) % len(order)] for i in range(batch_size))
        input_ids = torch.stack([torch.as_tensor(data[row]["input_ids"]) for row in rows]).to(
            model.device
        )
        loss = compute_loss(model, input_ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * min(1, (step + 1) / training.warmup_steps)

        optimizer.step()
        optimizer.zero_grad()

    model.eval()


# ------------------------------------------------------------------------------------ how it is run


def stacks_of(arguments: argparse.Namespace) -> dict[int, TarFlowLMModel]:
    """The stacks by their patch size."""
    if arguments.checkpoint:
        models = [AutoModel.from_pretrained(arguments.checkpoint)]
    else:
        models = [build(arguments, patch_size) for patch_size in arguments.patch_sizes]

    dtype = getattr(torch, arguments.dtype)
    return {model.config.patch_size: model.to(arguments.device, dtype).eval() for model in models}


def facts_of(model: TarFlowLMModel) -> dict[str, float]:
    names = ("vocab_size", "latent_size", "hidden_size", "initial_log_scale")
    return {name: getattr(model.config, name) for name in names}


def modes_of(
    model: TarFlowLMModel, noise: Tensor, methods: dict[str, dict], with_recomputing: bool
) -> dict[str, Callable[[], Tensor]]:
    """The ways from noise to its tokens: the methods of `generate`, and the plain loops."""
    modes = {
        name: partial(model.generate, noise=noise, **options) for name, options in methods.items()
    }
    modes["cached loop"] = partial(cached_loop, model, noise)
    if with_recomputing:
        modes["without a cache"] = partial(recomputing_loop, model, noise)

    return modes


def same_tokens(
    modes: dict[str, Callable[[], Tensor]],
) -> tuple[dict[str, Callable[[], Tensor]], list[str]]:
    """The modes that find the tokens of the sequential inverse, and the names of the others."""
    expected = modes["sequential"]()
    runs, differ = {}, []
    for name, run in modes.items():
        if torch.equal(run(), expected):
            runs[name] = run
        else:
            differ.append(name)

    return runs, differ


def whole_stacks(
    models: dict[int, TarFlowLMModel], arguments: argparse.Namespace, table: Results
) -> None:
    """Every mode of `generate` at every size, and the library's own model beside them."""
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    first = next(iter(models.values()))
    library = discrete_baseline(first.config).to(device, dtype).eval()
    methods = {
        name: options
        for name, options in METHODS.items()
        if arguments.captured_step or "captured" not in name
    }
    table.title(mode=27, patch=5, batch=5, tokens=6, seconds=9, tokens_per_second=17, ratio=6)

    for batch in arguments.batch_sizes:
        for length in arguments.num_tokens:
            start = torch.full((batch, 1), library.config.bos_token_id, device=device)
            options = {"max_new_tokens": length, "min_new_tokens": length, "pad_token_id": 0}
            sample = partial(library.generate, start, do_sample=True, top_k=0, **options)
            is_short = length <= arguments.recompute_up_to
            with_recomputing = is_short and batch == min(arguments.batch_sizes)

            runs = {(LIBRARY, 1): sample}
            differ = []
            for patch_size, model in models.items():
                noise = torch.randn(batch, length, model.config.latent_size, device=device)
                same, others = same_tokens(modes_of(model, noise, methods, with_recomputing))
                runs |= {(name, patch_size): run for name, run in same.items()}
                differ += [(name, patch_size) for name in others]

            times = median_times(runs, arguments.repeats, device)
            for (name, patch_size), seconds in times.items():
                ratio = times[LIBRARY, 1] / seconds
                speed = batch * length / seconds
                values = {"seconds": seconds, "tokens_per_second": speed, "ratio": ratio}
                values |= facts_of(first if name == LIBRARY else models[patch_size])
                table.row(mode=name, patch=patch_size, batch=batch, tokens=length, **values)

            for name, patch_size in differ:
                values = dict.fromkeys(("seconds", "tokens_per_second", "ratio"), "differs")
                values |= facts_of(models[patch_size])
                table.row(mode=name, patch=patch_size, batch=batch, tokens=length, **values)


@contextmanager
def times_of_parts(model: TarFlowLMModel) -> Iterator[Counter]:
    """The seconds inside, by flow and part: inputs, decoder, coupling; and the choice of tokens."""
    seconds = Counter()

    def timed(key: tuple[str, str], method: Callable) -> Callable:
        @wraps(method)
        def run(*args, **kwargs):
            start = time.perf_counter()
            result = method(*args, **kwargs)
            seconds[key] += time.perf_counter() - start
            return result

        return run

    with ExitStack() as stack:
        for index, layer in enumerate(model.flow.layers):
            names = {"inputs": "inputs", "context": "decoder", "invert_position": "coupling"}
            for name, part in names.items():
                method = timed((str(index), part), getattr(layer, name))
                stack.enter_context(mock.patch.object(layer, name, method))

        put = timed(("", "tokens"), TokenWriter.put)
        stack.enter_context(mock.patch.object(TokenWriter, "put", put))
        yield seconds


def parts(model: TarFlowLMModel, arguments: argparse.Namespace, table: Results) -> None:
    """The time of each part of "auto" on a CPU; means over the repeats."""
    table.title(flow=4, part=8, batch=5, tokens=6, seconds=9, share=5)
    for batch in arguments.batch_sizes:
        for length in arguments.num_tokens:
            noise = torch.randn(batch, length, model.config.latent_size)
            model.generate(noise=noise)
            with times_of_parts(model) as seconds:
                start = time.perf_counter()
                for _ in range(arguments.repeats):
                    model.generate(noise=noise)
                total = time.perf_counter() - start

            seconds["", "the rest"] = total - seconds.total()
            for (flow, part), value in seconds.items():
                size = {"batch": batch, "tokens": length, **facts_of(model)}
                values = {"seconds": value / arguments.repeats, "share": value / total}
                table.row(flow=flow, part=part, **size, **values)


def patches(arguments: argparse.Namespace, table: Results) -> None:
    """Each patch size with and without a decoder over the tokens of a patch.

    Measured are the likelihood, and the speed compared with patch 1.
    """
    length = min(arguments.num_tokens)
    data = documentation("validation", length)
    sizes = [
        (patch_size, head_layers)
        for patch_size in arguments.patch_sizes
        for head_layers in ((0, 1) if patch_size > 1 else (0,))
    ]
    models, bits = {}, {}

    for key in sizes:
        patch_size, head_layers = key
        set_seed(0)
        options = {"patch_head_layers": head_layers} if head_layers else {}
        models[key] = build(arguments, patch_size, **options).to(arguments.device)
        train(models[key], length, 8, arguments.patch_steps, learning_rate=2e-3)
        bits[key] = likelihood(models[key], data, max_sequences=64).bits_per_token

    table.title(
        patch=5,
        head_layers=11,
        parameters=10,
        bits=5,
        batch=5,
        tokens=6,
        tokens_per_second=17,
        speedup=7,
    )

    for batch in arguments.batch_sizes:
        noise = torch.randn(
            batch, length, next(iter(models.values())).config.latent_size, device=arguments.device
        )
        runs = {key: partial(model.generate, noise=noise) for key, model in models.items()}

        times = median_times(runs, arguments.repeats, arguments.device)
        for (patch_size, head_layers), seconds in times.items():
            key = (patch_size, head_layers)
            table.row(
                patch=patch_size,
                head_layers=head_layers,
                parameters=sum(parameter.numel() for parameter in models[key].parameters()),
                bits=bits[key],
                batch=batch,
                tokens=length,
                tokens_per_second=batch * length / seconds,
                speedup=next(iter(times.values())) / seconds,
                train_steps=arguments.patch_steps,
            )


def trained_flows(model: TarFlowLMModel, arguments: argparse.Namespace, table: Results) -> None:
    """The parallel and the sequential inverse of each flow of a trained stack, from the noise side."""
    device = arguments.device
    length = min(max(arguments.num_tokens), model.config.max_position_embeddings)
    table.title(
        flow=4,
        coupling=18,
        layers=6,
        batch=5,
        tokens=6,
        sequential=10,
        parallel=9,
        ratio=6,
        iterations=10,
    )

    for batch in arguments.batch_sizes:
        noise = torch.randn(batch, length, model.config.latent_size, device=device)
        u = to_positions(noise, model.config.patch_size)
        codebook = model.codebook()

        for index in reversed(range(len(model.flow.layers))):
            layer, facts = model.flow.layers[index], model.config.flows[index]
            runs = {
                method: partial(layer, u, codebook, options=FlowInverse(method), task="invert")
                for method in ("sequential", "parallel")
            }

            h, _ = runs["sequential"]()
            found, report = runs["parallel"]()
            row = {
                "flow": index,
                "coupling": facts["coupling"],
                "layers": facts["num_hidden_layers"],
                "batch": batch,
                "tokens": length,
                "iterations": report.iterations,
                "residual": report.residual,
                "max_difference": (found - h).abs().max().item(),
            }

            if torch.allclose(found, h, rtol=1e-2, atol=1e-2):
                times = median_times(runs, arguments.repeats, device)
                table.row(**row, **times, ratio=times["sequential"] / times["parallel"])
            else:
                table.row(**row, **dict.fromkeys(("sequential", "parallel", "ratio"), "differs"))

            u = h


def main():
    arguments = parse_arguments()
    set_seed(0)
    table = Results(arguments.device, arguments.output)
    with torch.no_grad():
        models = stacks_of(arguments)
        whole_stacks(models, arguments, table)
        if arguments.parts:
            parts(next(iter(models.values())), arguments, table)

    if arguments.patch_steps and not arguments.checkpoint:
        patches(arguments, table)

    if arguments.checkpoint:
        model = AutoModel.from_pretrained(arguments.checkpoint).to(arguments.device).eval()
    elif arguments.train_steps:
        model = mix_1_stack(max(arguments.num_tokens)).to(arguments.device)
        train(model, max(arguments.num_tokens), 2, arguments.train_steps)
    else:
        return

    with torch.no_grad():
        trained_flows(model, arguments, table)


if __name__ == "__main__":
    main()
