"""A server that makes digits: requests arrive at random, and each step of them is one batch.

Run from the repository root: python -m examples.serve
Requests of three picture sizes stand at different steps. `cached.batch` answers those of one size
in one call: rows that compute as one batch, rows that reuse as another. The same server runs
without a cache, and with a cache but one request at a time.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

if not __package__:  # run as a file: make the repository root importable
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import dit_cache_fx
from examples.digits import checkpoint
from examples.digits.model import DigitsDiT, modulate

SIZES = (16, 24, 32)
Answer = Callable[[Sequence["Request"]], Tensor]  # requests of one size -> velocity [B, 1, H, H]


class AnySizeDiT(DigitsDiT):
    """The demo's model for pictures of any even size: its positions are stretched."""

    def forward(self, x: Tensor, timestep: Tensor, y: Tensor) -> Tensor:
        patches: Tensor = self.embed(x)  # [B, D, H/2, W/2]
        grid = self.position.unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        position = F.interpolate(grid, patches.shape[2:])
        tokens = (patches + position).flatten(2).transpose(1, 2)
        cond = self.time(timestep) + self.label(y)
        for block in self.blocks:
            tokens = block(tokens, cond)
        shift, scale = self.modulation(cond).chunk(2, dim=-1)
        pixels = self.head(modulate(self.norm(tokens), shift, scale)).transpose(1, 2)
        return F.pixel_shuffle(pixels.unflatten(2, patches.shape[2:]), self.patch)


@dataclass(eq=False)
class Request:
    """One picture to be made, in `steps` steps; `session` holds its cache."""

    number: int
    size: int
    arrival: int
    steps: int
    session: dit_cache_fx.Session | None = None
    step: int = 0
    picture: Tensor = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.number)
        self.picture = torch.randn(1, 1, self.size, self.size, generator=generator)

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The model's arguments for its next step: a batch of one."""
        timestep = torch.tensor([1 - self.step / self.steps])
        return {"x": self.picture, "timestep": timestep, "y": torch.tensor([self.number % 10])}

    def advance(self, velocity: Tensor) -> None:
        """A step of Euler's."""
        self.picture = self.picture - velocity / self.steps
        self.step += 1

    @property
    def done(self) -> bool:
        return self.step == self.steps


def together(requests: Sequence[Request]) -> dict[str, Tensor]:
    """The model's arguments for the next step of each."""
    each = [request.inputs for request in requests]
    return {name: torch.cat([inputs[name] for inputs in each]) for name in each[0]}


def arrivals(count: int, steps: int, slots: int, seed: int) -> list[Request]:
    """Requests that come a little faster than they can be answered."""
    generator = torch.Generator().manual_seed(seed)
    gaps = torch.rand(count, generator=generator) * 2 * steps / slots * 0.8
    sizes = torch.randint(len(SIZES), (count,), generator=generator)
    ticks = (gaps.cumsum(0) - gaps[0]).int()
    return [
        Request(number, SIZES[int(sizes[number])], int(ticks[number]), steps)
        for number in range(count)
    ]


def serve(waiting: Sequence[Request], slots: int, answer: Answer) -> float:
    """Make every picture, at most `slots` at a time; the CPU seconds that it took.

    On each tick every request that is under way goes on by one step.
    """
    waiting, running, tick = list(waiting), list[Request](), 0
    begin = time.process_time()
    while waiting or running:
        while waiting and waiting[0].arrival <= tick and len(running) < slots:
            running.append(waiting.pop(0))
        for size in SIZES:
            same = [request for request in running if request.size == size]
            if same:
                for request, velocity in zip(same, answer(same).split(1), strict=True):
                    request.advance(velocity)
        for request in running:
            if request.done and request.session is not None:
                request.session.close()
        running, tick = [request for request in running if not request.done], tick + 1
    return time.process_time() - begin


@dataclass(frozen=True)
class Server:
    """A way to answer requests of one size. `cached`: its model, where that has a cache."""

    name: str
    answer: Answer
    cached: Any = None

    def run(self, options: argparse.Namespace) -> tuple[list[Request], float]:
        """All requests, answered, and the CPU seconds."""
        requests = arrivals(options.requests, options.steps, options.slots, options.seed)
        if self.cached is not None:
            for request in requests:
                request.session = self.cached.new_session()
        return requests, serve(requests, options.slots, self.answer)


def servers(model: AnySizeDiT) -> list[Server]:
    """Without a cache; with one, a request at a time; with one, in batches."""
    cached = dit_cache_fx.apply(model, "taylorcache", compute_ratio=0.5)

    def plain(requests: Sequence[Request]) -> Tensor:
        out: Tensor = model(**together(requests))
        return out

    def one_at_a_time(requests: Sequence[Request]) -> Tensor:
        rows = []
        for request in requests:
            assert request.session is not None
            with request.session:
                rows.append(cached(**request.inputs))
        return torch.cat(rows)

    def batched(requests: Sequence[Request]) -> Tensor:
        sessions = [request.session for request in requests if request.session is not None]
        with cached.batch(sessions):
            out: Tensor = cached(**together(requests))
        return out

    return [
        Server("no cache, batches", plain),
        Server("cache, one at a time", one_at_a_time, cached),
        Server("cache, batches", batched, cached),
    ]


def farthest(requests: Sequence[Request], others: Sequence[Request]) -> float:
    """The largest difference of any pixel."""
    pairs = zip(requests, others, strict=True)
    return max(float((a.picture - b.picture).abs().max()) for a, b in pairs)


def psnr_of(requests: Sequence[Request], others: Sequence[Request]) -> float:
    """The mean over all pictures, whose pixels go from -1 to 1."""
    pairs = zip(requests, others, strict=True)
    errors = [float((a.picture - b.picture).square().mean()) for a, b in pairs]
    return sum(10 * math.log10(4 / error) for error in errors) / len(errors)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=36)
    parser.add_argument("--steps", type=int, default=16, help="of each request")
    parser.add_argument("--slots", type=int, default=24, help="requests under way at a time")
    parser.add_argument("--rounds", type=int, default=2, help="the fastest of them counts")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


@torch.inference_mode()
def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    model = AnySizeDiT()
    model.load_state_dict(checkpoint.load().state_dict())
    systems = servers(model.eval())
    answers: dict[str, list[Request]] = {}
    seconds: dict[str, list[float]] = {system.name: [] for system in systems}
    for turn in range(options.rounds + 1):  # the first one captures, and is not timed
        for system in systems:
            answers[system.name], taken = system.run(options)
            seconds[system.name] += [taken] if turn else []
    rate = {name: options.requests / min(times) for name, times in seconds.items()}
    first, alone, batched = (system.name for system in systems)
    report = systems[-1].cached.cache_report()
    share = report.calls_computed / (report.calls_computed + report.calls_reused)
    print(f"{options.requests} requests of {options.steps} steps, sizes {SIZES}")
    for name in rate:
        print(f"{name:22} {rate[name]:6.1f} requests/s, {rate[name] / rate[first]:.2f}x")
    print(f"rows computed with a cache: {share:.0%}")
    print(f"batches against one at a time: {farthest(answers[batched], answers[alone]):.1e}")
    print(f"cache against no cache: {psnr_of(answers[batched], answers[first]):.1f} dB")


if __name__ == "__main__":
    main()
