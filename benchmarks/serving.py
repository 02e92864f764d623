"""The server under load: 1, 4 and 16 clients at once, bad requests, cut-off streams, memory.

    python benchmarks/serving.py checkpoints/python-docs --output benchmarks/results/serving.jsonl

Starts `python -m tarflow_hf.serve` as a process of its own. For each number of clients a row says how
fast completions come, and that every seed gave the text that it gives alone. One row counts the
statuses of requests that cannot be answered, sent while others are, and of streams that are cut off
in the middle. The last two are the server's resident memory after 50 and after 1,000 completions.
"""

import argparse
import contextlib
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from measure import Results

PATIENCE = 600  # seconds for an answer; a request that waits longer has none

# Requests that have no answer, beside the model's name, and the status that each has to get.
BAD_REQUESTS = {
    "a prompt too long": ({"prompt": "a" * 5000}, 400),
    "no text": ({"prompt": 5}, 400),
    "several prompts": ({"prompt": ["a", "b"]}, 400),
    "no tokens": ({"prompt": "a", "max_tokens": 0}, 400),
    "a number out of range": ({"prompt": "a", "top_p": 7}, 400),
    "another model": ({"prompt": "a", "model": "other"}, 400),
    "an unknown field": ({"prompt": "a", "typo": 1}, 422),
    "no object": ([1, 2], 422),
    "no JSON": ("{nonsense", 422),
}


class Server:
    """A server of a checkpoint in a process of its own, and what is asked of it."""

    def __init__(self, checkpoint: str, process: subprocess.Popen, address: str):
        self.checkpoint, self.process = checkpoint, process
        self.client = httpx.Client(
            base_url=address, timeout=PATIENCE, limits=httpx.Limits(max_connections=64)
        )

    def completion(self, seed: int, tokens: int) -> str:
        """The text of a seed.

        Raises:
            httpx.HTTPStatusError: If the answer is none.
        """
        request = {"model": self.checkpoint, "prompt": "the ", "max_tokens": tokens, "seed": seed}
        answer = self.client.post("/v1/completions", json=request)
        answer.raise_for_status()
        return answer.json()["choices"][0]["text"]

    def status_of(self, request: dict | list | str) -> int:
        """The status of a request, which may be malformed."""
        if isinstance(request, str):
            return self.client.post("/v1/completions", content=request).status_code
        if isinstance(request, dict):
            request = {"model": self.checkpoint} | request

        return self.client.post("/v1/completions", json=request).status_code

    def cut_off(self, tokens: int) -> None:
        """Begins a stream, and goes away after its first part."""
        request = {"model": self.checkpoint, "prompt": "the ", "max_tokens": tokens, "stream": True}
        with self.client.stream("POST", "/v1/completions", json=request) as answer:
            next(answer.iter_lines())

    def resident_memory(self) -> int:
        """The bytes that the process holds, on Linux."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        return 1024 * int(status.split("VmRSS:")[1].split()[0])


@contextlib.contextmanager
def served(checkpoint: str) -> Iterator[Server]:
    """A server that answers, until the end of the block."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    command = [sys.executable, "-m", "tarflow_hf.serve", checkpoint, "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    server = Server(checkpoint, process, f"http://localhost:{port}")
    try:
        deadline = time.monotonic() + PATIENCE
        while not is_up(server):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"The server of {checkpoint} does not start.")

            time.sleep(0.2)

        yield server
    finally:
        server.client.close()
        process.terminate()
        process.wait()


def is_up(server: Server) -> bool:
    try:
        return server.client.get("/health").status_code == 200
    except httpx.TransportError:
        return False


def timed(call: Callable[[int, int], str], seed: int, tokens: int) -> tuple[float, str]:
    start = time.perf_counter()
    text = call(seed, tokens)
    return time.perf_counter() - start, text


def load_row(server: Server, clients: int, requests: int, tokens: int, alone: list[str]) -> dict:
    """Completions by several clients at once: their speed, and how many differ from those alone."""
    seeds = [index % len(alone) for index in range(requests)]
    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(lambda seed: timed(server.completion, seed, tokens), seeds))

    seconds = time.perf_counter() - start
    times = sorted(each for each, _ in answers)
    return {
        "what": "load",
        "clients": clients,
        "requests": requests,
        "tokens": tokens,
        "requests_per_second": requests / seconds,
        "tokens_per_second": requests * tokens / seconds,
        "median_seconds": statistics.median(times),
        "longest_seconds": times[-1],
        "changed": sum(text != alone[seed] for seed, (_, text) in zip(seeds, answers, strict=True)),
    }


def trouble_row(server: Server, rounds: int, tokens: int, alone: list[str]) -> dict:
    """Bad requests and cut-off streams among good ones: what each of them got."""
    wrong, changed = Counter(), 0
    with ThreadPoolExecutor(16) as pool:
        for _ in range(rounds):
            good = [pool.submit(server.completion, seed, tokens) for seed in range(len(alone))]
            cut = [pool.submit(server.cut_off, tokens) for _ in range(4)]
            bad = {
                name: pool.submit(server.status_of, request)
                for name, (request, _) in BAD_REQUESTS.items()
            }
            for name, status in bad.items():
                if status.result() != BAD_REQUESTS[name][1]:
                    wrong[f"{name}: {status.result()}"] += 1

            changed += sum(text.result() != alone[seed] for seed, text in enumerate(good))
            for each in cut:
                each.result()

    return {
        "what": "trouble",
        "bad_requests": rounds * len(BAD_REQUESTS),
        "wrong_statuses": dict(wrong),
        "cut_off": 4 * rounds,
        "good_requests": rounds * len(alone),
        "changed": changed,
        "is_alive": is_up(server),
    }


def memory_rows(server: Server, counts: list[int], tokens: int) -> list[dict]:
    """The server's memory after so many completions, counted from here, by 4 clients."""
    rows, done = [], 0
    with ThreadPoolExecutor(4) as pool:
        for count in counts:
            list(pool.map(lambda seed: server.completion(seed, tokens), range(done, count)))
            done = count
            memory = server.resident_memory()
            rows.append({"what": "memory", "requests": count, "resident_bytes": memory})

    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--requests", type=int, default=64, help="for each number of clients")
    parser.add_argument("--tokens", type=int, default=32, help="of each completion")
    parser.add_argument("--rounds", type=int, default=5, help="of bad requests and cut-off streams")
    parser.add_argument("--memory_after", type=int, nargs="+", default=[50, 1000])
    parser.add_argument("--output", type=Path, help="a file to append the rows to")
    arguments = parser.parse_args()

    results, tokens = Results("cpu", arguments.output), arguments.tokens
    with served(arguments.checkpoint) as server:
        alone = [server.completion(seed, tokens) for seed in range(8)]
        results.title(clients=7, requests=8, requests_per_second=19, median_seconds=14, changed=7)
        for clients in arguments.clients:
            results.row(**load_row(server, clients, arguments.requests, tokens, alone))

        results.title(bad_requests=12, wrong_statuses=30, cut_off=7, good_requests=13, changed=7)
        results.row(**trouble_row(server, arguments.rounds, tokens, alone))
        results.title(requests=8, resident_bytes=14)
        for row in memory_rows(server, arguments.memory_after, tokens):
            results.row(**row)


if __name__ == "__main__":
    main()
