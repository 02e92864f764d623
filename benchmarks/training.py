"""A training step of a TarFlowLM compared with one of the library's Llama.

Both have the same blocks, layers and batch, in one run.

    python benchmarks/training.py --quick                                            # the demo, on CPU: a minute
    python benchmarks/training.py --recipe openwebtext_deep --vocab_size 50257 --num_flows 1 --dtype bfloat16
    python benchmarks/training.py --recipe text8_deep --batch_size 64 --output training.jsonl

Random ids, so no corpus is needed. The models take turns; a time is the median of the rounds, and
covers forward, backward, gradient clipping and AdamW. bfloat16 is autocast, with weights in
float32. A model's peak memory on a GPU is its weights and optimiser state, and what a step of it
allocates at most besides. On a CPU it is what three steps, the making of the model included, add to
the largest resident size of a process of its own (on Linux), the median of five: what the allocator
and the library of the matrix products keep back counts, too. With --quick it is not measured there.

With --num_flows L the stack is cut after its first flows, and the Llama has the layers of these:
its first stage of progressive training. With --stage L the flows before it are frozen, too.

With --parts torch's profiler says where the time of a further step goes, as each operator's own
time, without that of the operators that it calls; first come those in which the models differ most.

With --scoring both models score sequences as the table does with which `examples/train.py` closes,
in place of steps: the stack by an ELBO and the importance-weighted bound of 16 samples, the Llama
exactly.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from measure import device_name, facts, output_of_own_process, peak_resident_memory
from transformers import PreTrainedModel, set_seed

from tarflow_hf import TarFlowLMConfig, TarFlowLMModel
from tarflow_hf.baseline import flows_of
from tarflow_hf.cost import forward_flops, peak_flops, training_flops
from tarflow_hf.evaluation import score
from tarflow_hf.report import Table
from tarflow_hf.training import (
    RowNoise,
    TrainingConfig,
    compute_loss,
    discrete_baseline,
    draw_step,
    make_optimizer,
    make_stages,
    recompute_activations,
)

MODELS = ("TarFlowLM", "Llama")
NUM_SAMPLES = 16  # of the closing table's bound
NUM_PARTS = 12  # operators in the table of parts
RECIPES = Path(__file__).parent.parent / "examples" / "recipes"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--recipe", default="demo", help="of examples/recipes, whose model is timed"
    )
    parser.add_argument("--num_flows", type=int, help="cut the stack after its first flows")
    parser.add_argument(
        "--stage", type=int, help="stage of progressive training: flows before it are frozen"
    )
    parser.add_argument("--vocab_size", type=int, default=27, help="where the recipe names none")
    parser.add_argument(
        "--log_scale", type=float, help="of the codebook: -3 is separated, as a trained one"
    )
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument(
        "--num_tokens", type=int, help="of a sequence; default: the longest of the model"
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3, help="steps of each that are not timed")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--compile", action="store_true", help="torch.compile, of both models")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--parts", action="store_true", help="where the time goes, by operator")
    parser.add_argument(
        "--scoring",
        type=int,
        metavar="SEQUENCES",
        help="score so many as the closing table does, in place of steps; it has 64",
    )
    parser.add_argument("--quick", action="store_true", help="128 tokens, 3 rounds")
    parser.add_argument(
        "--memory_of", choices=MODELS, help="print the memory of this model's steps alone, on a CPU"
    )
    parser.add_argument("--output", type=Path, help="file to append the rows to, as JSON lines")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.num_tokens, arguments.rounds, arguments.warmup = 128, 3, 1

    return arguments


class Step:
    """A model with its optimiser, which takes steps on the same ids again and again."""

    def __init__(
        self, model: PreTrainedModel, arguments: argparse.Namespace, num_flows: int | None, device
    ):
        self.model, self.num_flows, self.device = model.to(device), num_flows, device
        if arguments.gradient_checkpointing:
            recompute_activations(model)

        self.optimizer = make_optimizer(model, TrainingConfig())
        self.call = torch.compile(model) if arguments.compile else model
        self.noise = RowNoise(0, arguments.batch_size, 0, device)
        self.autocast = torch.autocast(
            device.type, torch.bfloat16, enabled=arguments.dtype == "bfloat16"
        )
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.num_steps, self.seconds, self.memory = 0, [], []

    def flops(self, input_ids: torch.Tensor) -> float:
        rows, num_tokens = input_ids.shape
        return rows * training_flops(self.model, num_tokens, self.num_flows)

    def take(self, input_ids: torch.Tensor) -> None:
        is_gpu = self.device.type == "cuda"
        if is_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()

        start = time.perf_counter()
        with self.autocast:
            generators = self.noise.at(self.num_steps, 0)
            draws = draw_step(self.model, input_ids.shape, generators)
            loss = compute_loss(self.call, input_ids, draws, self.num_flows)

        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if is_gpu:
            torch.cuda.synchronize()

        self.seconds.append(time.perf_counter() - start)
        self.num_steps += 1

        if is_gpu:
            state = [
                x
                for values in self.optimizer.state.values()
                for x in values.values()
                if torch.is_tensor(x)
            ]
            own = sum(x.numel() * x.element_size() for x in [*self.model.parameters(), *state])
            self.memory.append(torch.cuda.max_memory_allocated() - before + own)


class Scoring:
    """A model that scores the same random ids again and again; it has `seconds` as a `Step` has."""

    def __init__(self, model: PreTrainedModel, device: torch.device):
        self.model = model.to(device).eval()
        self.seconds, self.memory = [], []

    def flops(self, input_ids: torch.Tensor) -> float:
        rows, num_tokens = input_ids.shape
        num_samples = NUM_SAMPLES if flows_of(self.model) else 1
        return rows * num_samples * sum(forward_flops(self.model, num_tokens))

    def take(self, input_ids: torch.Tensor) -> None:
        sequences = [{"input_ids": row} for row in input_ids.cpu()]
        start = time.perf_counter()
        score(self.model, sequences, num_samples=NUM_SAMPLES)
        self.seconds.append(time.perf_counter() - start)


def parts_of(step: Step | Scoring, input_ids: torch.Tensor) -> dict[str, float]:
    """The milliseconds of each operator's own time; one and its form in place count together."""
    with torch.profiler.profile() as profile:
        step.take(input_ids)

    is_gpu = input_ids.device.type == "cuda"
    time_of = "self_device_time_total" if is_gpu else "self_cpu_time_total"
    times: dict[str, float] = {}
    for event in profile.key_averages():
        name = event.key.removeprefix("aten::").rstrip("_")
        times[name] = times.get(name, 0) + getattr(event, time_of) / 1000

    return {name: milliseconds for name, milliseconds in times.items() if milliseconds >= 0.01}


def print_parts(flow: dict[str, float], library: dict[str, float]) -> None:
    """The operators that tell the two models apart most, and the sums of all others."""
    names = sorted(flow | library, key=lambda n: abs(flow.get(n, 0) - library.get(n, 0)))
    rows = [
        (name, flow.get(name, 0), library.get(name, 0)) for name in names[: -NUM_PARTS - 1 : -1]
    ]
    total = sum(flow.values()), sum(library.values())
    named = sum(row[1] for row in rows), sum(row[2] for row in rows)
    rows.append(("the rest", total[0] - named[0], total[1] - named[1]))
    rows.append(("all", *total))
    cells = [(n, f"{a:,.1f}", f"{b:,.1f}", f"{a - b:+,.1f}") for n, a, b in rows]
    print("\n" + Table(["operator, ms", *MODELS, "difference"], cells).to_markdown())


def make_models(
    arguments: argparse.Namespace, names: tuple[str, ...] = MODELS
) -> tuple[dict[str, PreTrainedModel], TarFlowLMConfig, int | None]:
    """Makes the flow model and the library's, of equal layers.

    Returns them, their configuration, and the number of flows at which the stack is cut.
    """
    fields = json.loads((RECIPES / f"{arguments.recipe}.json").read_text(encoding="utf-8"))[
        "config"
    ]
    if arguments.log_scale is not None:
        fields["initial_log_scale"] = arguments.log_scale

    config = TarFlowLMConfig(**{"vocab_size": arguments.vocab_size, **fields})

    num_flows = arguments.stage or arguments.num_flows
    if num_flows is not None:
        if not 1 <= num_flows <= len(config.flows):
            raise ValueError(
                f"num_flows and stage must be in 1, ..., {len(config.flows)}, not {num_flows}."
            )

        config = TarFlowLMConfig(
            **{"vocab_size": arguments.vocab_size, **fields, "flows": config.flows[:num_flows]}
        )

    set_seed(0)
    make = {"TarFlowLM": TarFlowLMModel, "Llama": discrete_baseline}

    models = {name: make[name](config) for name in names}
    if arguments.stage and "TarFlowLM" in models:
        stages = make_stages(
            models["TarFlowLM"], TrainingConfig(mode="progressive", num_steps=len(config.flows))
        )
        stages[-1].choose_parameters(models["TarFlowLM"])

    return models, config, num_flows


def make_steps(
    arguments: argparse.Namespace, device: torch.device, names: tuple[str, ...] = MODELS
) -> tuple[dict[str, Step], torch.Tensor, TarFlowLMConfig]:
    models, config, num_flows = make_models(arguments, names)
    num_tokens = arguments.num_tokens or config.max_position_embeddings
    num_sequences = arguments.scoring or arguments.batch_size
    input_ids = torch.randint(config.vocab_size, (num_sequences, num_tokens), device=device)
    if arguments.scoring:
        return {n: Scoring(model, device) for n, model in models.items()}, input_ids, config

    steps = {
        name: Step(model, arguments, num_flows if name == "TarFlowLM" else None, device)
        for name, model in models.items()
    }

    return steps, input_ids, config


def print_memory(arguments: argparse.Namespace) -> None:
    before = peak_resident_memory()
    steps, input_ids, _ = make_steps(arguments, torch.device("cpu"), (arguments.memory_of,))
    for _ in range(3):
        steps[arguments.memory_of].take(input_ids)
    print(json.dumps({"bytes": peak_resident_memory() - before}))


def memory_of_steps(arguments: argparse.Namespace, steps: dict[str, Step]) -> dict[str, float]:
    """The peak in bytes by model; on a CPU of processes of their own, not with --quick or --scoring."""
    is_gpu = torch.device(arguments.device).type == "cuda"
    if is_gpu or arguments.quick or arguments.scoring or sys.platform != "linux":
        return {name: max(step.memory) for name, step in steps.items() if step.memory}

    memory = {}
    for model in MODELS:
        command = __file__, *sys.argv[1:], "--memory_of", model
        runs = [output_of_own_process(*command)["bytes"] for _ in range(5)]
        memory[model] = statistics.median(runs)

    return memory


def make_rows(
    arguments: argparse.Namespace,
    steps: dict[str, Step],
    input_ids: torch.Tensor,
    config: TarFlowLMConfig,
) -> list[dict]:
    num_tokens = input_ids.shape[1]
    peak = peak_flops(input_ids.device, {"bfloat16": "bf16"}.get(arguments.dtype))
    memory = memory_of_steps(arguments, steps)
    rows = []

    for name, step in steps.items():
        seconds = statistics.median(step.seconds)
        flops_per_second = step.flops(input_ids) / seconds
        rows.append({
            "model": name,
            "recipe": arguments.recipe,
            "stage": arguments.stage,
            "layers": config.num_hidden_layers,
            "width": config.hidden_size,
            "vocab_size": config.vocab_size,
            "log_scale": config.initial_log_scale,
            "parameters": step.model.num_parameters(),
            "scoring": arguments.scoring,
            "batch_size": len(input_ids),
            "num_tokens": num_tokens,
            "dtype": arguments.dtype,
            "compiled": arguments.compile,
            "gradient_checkpointing": arguments.gradient_checkpointing,
            "seconds": seconds,
            "seconds_of_rounds": step.seconds,
            "tokens_per_second": input_ids.numel() / seconds,
            "flops_per_second": flops_per_second,
            "model_flops_utilization": flops_per_second / peak if peak else None,
            "peak_memory_gib": memory[name] / 2**30 if name in memory else None,
            "parts": parts_of(step, input_ids) if arguments.parts else None,
            **facts(arguments.device),
        })  # fmt: skip

    return rows


def print_rows(arguments: argparse.Namespace, rows: list[dict]) -> None:
    first = rows[0]
    print(
        f"{first['recipe']}, {first['layers']} layers of width {first['width']}, V = {first['vocab_size']}"
    )
    batch = f"batch {first['batch_size']} x {first['num_tokens']} tokens, {first['dtype']}"
    print(f"{batch}, {device_name(arguments.device)}\n")
    cells = []
    for row in rows:
        used, memory = row["model_flops_utilization"], row["peak_memory_gib"]
        cells.append([
            row["model"],
            f"{row['parameters']:,}",
            f"{1000 * row['seconds']:,.1f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['flops_per_second']:.3g}",
            "peak unknown" if used is None else f"{used:.1%}",
            "not measured" if memory is None else f"{memory:.2f}",
        ])  # fmt: skip

    work = "scoring" if arguments.scoring else "step"
    head = ["model", "parameters", f"ms/{work}", "tokens/s", "FLOP/s", "utilisation"]
    print(Table([*head, "peak memory, GiB"], cells).to_markdown())

    flow, library = rows
    ratio = flow["tokens_per_second"] / library["tokens_per_second"]
    text = f"tokens/s of TarFlowLM / Llama: {ratio:.3f}"
    if flow["peak_memory_gib"] is not None:
        text += f"; peak memory: {flow['peak_memory_gib'] / library['peak_memory_gib']:.3f}"

    print(f"\n{text}")
    if arguments.parts:
        print_parts(flow["parts"], library["parts"])


def main():
    arguments = parse_arguments()
    if arguments.memory_of:
        print_memory(arguments)
        return

    steps, input_ids, config = make_steps(arguments, torch.device(arguments.device))

    for round_ in range(arguments.warmup + arguments.rounds):
        for step in steps.values():
            step.take(input_ids)
            if round_ < arguments.warmup:
                step.seconds.clear()
                step.memory.clear()

    rows = make_rows(arguments, steps, input_ids, config)
    print_rows(arguments, rows)

    if arguments.output:
        with arguments.output.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
