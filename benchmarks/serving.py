"""Server under load: latency, images a second, and the number of requests refused for want of room.

    python3 benchmarks/serving.py --gpt-ckpt c2i_B_256.pt --vq-ckpt vq_ds16_c2i.pt --engine native
    python3 benchmarks/serving.py --url http://127.0.0.1:8000 --requests 200 --bursts 4 --hang-up 0.1

Requests come in bursts; with --attempts above 1, one that gets 429 comes again when the server said. Without --url a
server is started, with the flags that are not this script's (`--engine native --batch-size 8`), and ended afterwards.
"""

import argparse
import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from statistics import fmean

from utils.cli import (
    CFG_SCALE,
    SHARE,
    flag_parser,
    nonnegative_float,
    nonnegative_int,
    positive_float,
    positive_int,
    run_script,
)

ROOT = Path(__file__).parent.parent
IMAGES = "/v1/images/generations"


@dataclass
class Outcome:
    """Outcome of a request.

    status: of the last answer; "hung up" where the client did, "unreachable" where nobody listened, "broken" where the
    connection ended without an answer. seconds: from the first attempt to the answer. begun_at: time.monotonic() of the
    last attempt. refused: answers of 429 before the last.
    """

    number: int
    status: int | str = "broken"
    seconds: float = 0.0
    begun_at: float = 0.0
    refused: int = 0
    answer: dict = field(default_factory=dict)


async def run_load(
    url: str,
    bodies: Sequence[dict],
    *,
    bursts: int = 4,
    pause: float = 1.0,
    rate: float | None = None,
    hang_up: float = 0.0,
    attempts: int = 1,
    longest_wait: float = 60.0,
    timeout: float = 600.0,
) -> list[Outcome]:
    """Asks for each body, in bursts with `pause` seconds between them, or as a Poisson process of `rate` requests a second.

    hang_up: the share of clients that leave while they wait. attempts: how often one comes before 429 is the last word.
    longest_wait: seconds between attempts, where the server says more. timeout: seconds without an
    answer after which a request counts as broken.
    """
    import httpx

    chance = random.Random(0)
    leaving = set(chance.sample(range(len(bodies)), round(hang_up * len(bodies))))
    patience = {number: chance.uniform(0.02, 0.5) for number in leaving}
    per_burst = -(-len(bodies) // bursts)
    gaps = random.Random(1)
    times = [number // per_burst * pause for number in range(len(bodies))]
    if rate:
        times = [*accumulate(gaps.expovariate(rate) for _ in bodies)]
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)

    async def ask(client: httpx.AsyncClient, number: int) -> Outcome:
        outcome = Outcome(number)
        await asyncio.sleep(times[number])
        began = time.monotonic()
        for attempt in range(attempts):
            outcome.begun_at = time.monotonic()
            try:
                async with asyncio.timeout(patience.get(number)):
                    response = await client.post(url + IMAGES, json=bodies[number])
            except TimeoutError:
                outcome.status = "hung up"
                break
            except httpx.ConnectError:
                outcome.status = "unreachable"
                break
            except httpx.TransportError:
                outcome.status = "broken"
                break
            outcome.status, outcome.answer = response.status_code, response.json()
            if response.status_code != 429 or attempt + 1 == attempts:
                break
            outcome.refused += 1
            await asyncio.sleep(min(longest_wait, float(response.headers["retry-after"])))
        outcome.seconds = time.monotonic() - began
        return outcome

    async with httpx.AsyncClient(timeout=timeout, limits=limits) as client:
        return await asyncio.gather(*(ask(client, number) for number in range(len(bodies))))


@dataclass
class Server:
    """A server's process, its address, and what it has logged so far."""

    process: subprocess.Popen
    url: str = ""
    lines: list[str] = field(default_factory=list)
    terminated: bool = False

    def events(self) -> list[dict]:
        """Return the lines that are JSON objects."""
        return [json.loads(line) for line in list(self.lines) if line.startswith("{")]

    def terminate(self) -> None:
        """Sends SIGTERM, once: a second one would not wait for what was accepted."""
        if not self.terminated and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.terminated = True

    def end(self, timeout: float = 300) -> int:
        """Terminates it and waits. Returns its exit code."""
        self.terminate()
        return self.process.wait(timeout)


@contextmanager
def started_server(words: Sequence[object], timeout: float = 600) -> Iterator[Server]:
    """Yield a server of its own on a free port, ended with the block. Raises ConnectionError with its last words if it does not start."""
    line = [sys.executable, "-m", "autoregressive.serve.server", *map(str, words), "--port", "0"]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    server, listens = Server(process), threading.Event()

    def read() -> None:
        for text in process.stdout:
            server.lines.append(text.rstrip("\n"))
            found = re.search(r"running on (http://\S+)", text)
            if found:
                server.url = found[1]
                listens.set()
        listens.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        if not listens.wait(timeout) or not server.url:
            raise ConnectionError("the server did not start: " + " | ".join(server.lines[-5:]))
        yield server
    finally:
        try:
            server.end()
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        reader.join(10)


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that `share` of the values do not exceed; nan of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def table(outcomes: Sequence[Outcome], images: int, seconds: float) -> str:
    """Return the figures of a run as a table. images: of a request. seconds: the run's."""
    done = [outcome.seconds for outcome in outcomes if outcome.status == 200]
    statuses = Counter(outcome.status for outcome in outcomes if outcome.status != 200)
    others = ", ".join(f"{count} {status}" for status, count in sorted(statuses.items(), key=str)) or "none"
    refused = sum(outcome.refused + (outcome.status == 429) for outcome in outcomes)
    return (
        "| requests | answered | mean s | p50 s | p95 s | images/s | answers of 429 | not answered with an image |\n"
        "|---|---|---|---|---|---|---|---|\n"
        f"| {len(outcomes)} | {len(done)} | {fmean(done or [float('nan')]):.2f} | {percentile(done, 0.5):.2f} | {percentile(done, 0.95):.2f} | "
        f"{len(done) * images / seconds:.2f} | {refused} | {others} |"
    )


def main(args: argparse.Namespace) -> None:
    if args.url and args.rest:
        raise ValueError(f"{' '.join(args.rest)}: with --url no server is started that could take these")
    own = nullcontext() if args.url else started_server(["--max-queue", args.max_queue, *args.rest])
    with own as server:
        url = server.url if server else args.url.rstrip("/")
        report(url, args, make_bodies(url, args))


def make_bodies(url: str, args: argparse.Namespace) -> list[dict]:
    """Return the requests: classes in turn, or a prompt, each with a seed of its own."""
    import httpx

    (model,) = httpx.get(f"{url}/v1/models").json()["data"]

    def asked(number: int) -> dict:
        if model["kind"] == "t2i":
            return {"prompt": f"a picture of {number} boats"}
        return {"class_label": number % model["num_classes"]}

    return [
        {**asked(i), "seed": i * args.n, "n": args.n, "guidance_scale": args.cfg_scale + i % args.settings / 2}
        for i in range(args.requests)
    ]


def report(url: str, args: argparse.Namespace, bodies: list[dict]) -> None:
    """Warms up, runs the load and prints its table."""
    asyncio.run(run_load(url, bodies[: args.warmup], bursts=1))
    began = time.monotonic()
    settings = {name: getattr(args, name) for name in ("bursts", "pause", "rate", "hang_up", "attempts")}
    outcomes = asyncio.run(run_load(url, bodies, **settings))
    coming = f"{args.rate:g} a second, at random," if args.rate else f"in {args.bursts} bursts {args.pause:g} s apart,"
    print(
        f"{args.requests} requests of {args.n} image{'s' * (args.n > 1)} {coming} {args.settings} kinds of settings, "
        f"guidance {args.cfg_scale:g}, {args.hang_up:.0%} hang up"
    )
    print(table(outcomes, args.n, time.monotonic() - began))


def flags() -> argparse.ArgumentParser:
    """Return the script's flags; those it does not know are the server's, and left in `rest`."""
    parser = flag_parser(__doc__, rest=True)
    parser.add_argument("--url", default=None, help="of a server that runs (default: one is started)")
    parser.add_argument("--requests", type=positive_int, default=200, help="in all")
    parser.add_argument("--bursts", type=positive_int, default=4, help="in how many bursts they come")
    parser.add_argument("--pause", type=nonnegative_float, default=5.0, help="seconds between the bursts")
    help = "requests a second that come one by one, at random (a Poisson process), in place of bursts"
    parser.add_argument("--rate", type=positive_float, default=None, help=help)
    parser.add_argument("--settings", type=positive_int, default=1, help="so many guidance scales in turn")
    parser.add_argument("--hang-up", type=SHARE, default=0.1, help="the share of clients that leave while they wait")
    parser.add_argument("--attempts", type=positive_int, default=1, help="how often a client comes that gets 429")
    parser.add_argument("--n", type=positive_int, default=1, help="images of a request")
    parser.add_argument("--cfg-scale", type=CFG_SCALE, default=4.0, help="guidance scale, 1 for none")
    parser.add_argument("--warmup", type=nonnegative_int, default=8, help="requests before the time is taken")
    parser.add_argument("--max-queue", type=positive_int, default=64, help="of the server that is started")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
