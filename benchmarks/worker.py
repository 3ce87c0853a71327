"""Measures one system. Each lives in a process of its own and runs when the driver asks it to."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import (
    CompilationMetrics,
    clear_compilation_metrics,
    counters,
    get_compilation_metrics,
    set_compilation_metrics_limit,
)
from torch._inductor.async_compile import shutdown_compile_workers
from torch.utils import _pytree as pytree

from benchmarks.models import Place, Shape, shape
from benchmarks.peers import NotInstalled
from benchmarks.systems import ROWS, Plan, System

Result = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What a worker measures.

    `schedule`: steps, start, end, interval; see `Plan`. `reference`: the file with the uncached
    model's outputs.
    """

    model: str
    size: str
    system: str
    device: str
    dtype: str
    schedule: tuple[int, int, int, int]
    threads: int
    inner: str
    reference: str

    def place(self) -> Place:
        return Place(self.device, getattr(torch, self.dtype))

    def plan(self) -> Plan:
        return Plan(*self.schedule, self.place(), self.inner)


class Bench:
    """One system, ready to run generations."""

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(job.threads)
        torch._dynamo.reset()
        self.job, self.plan = job, job.plan()
        self.shape: Shape = shape(job.model, job.size)
        self.cuda = job.device != "cpu"
        self._warm_compiler()
        counters.clear()
        clear_compilation_metrics()
        set_compilation_metrics_limit(10_000)
        model = self.shape.build(self.plan.place)
        self.weights = sum(p.numel() * p.element_size() for p in model.parameters())
        self.decided: list[bool] = []
        self.cache_bytes: int | None = None
        self.row, self.calls = ROWS[job.system], 0
        if not self.row.compiles:
            self._count_calls(self.shape.lists(model)[-1][-1])
        self.system: System = self.row.make(model, self.shape, self.plan)

    def prepare(self) -> Result:
        """The first generation: everything is captured and compiled in it."""
        outputs, seconds, _ = self._generation(keep=True)
        shutdown_compile_workers()  # they would wait, and hold memory
        return {"first_seconds": seconds, **self._errors(outputs)}

    def generate(self) -> Result:
        """A generation: seconds of the whole, milliseconds of each step."""
        before, self.calls = len(get_compilation_metrics()), 0
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        with self._cache_measured():
            _, seconds, steps = self._generation()
        kinds = self.decided
        result: Result = {
            "seconds": seconds,
            "computed_ms": _median(t for t, kind in zip(steps, kinds, strict=True) if kind),
            "reused_ms": _median(t for t, kind in zip(steps, kinds, strict=True) if not kind),
            "computed": sum(kinds) if self.row.compiles else self.calls,
            "compiles": len(get_compilation_metrics()) - before,
        }
        if self.cuda:
            result["peak_bytes"] = torch.cuda.max_memory_allocated()
        return result

    def finish(self) -> Result:
        """Counts of what was compiled, and the bytes that are held between two steps."""
        compiled = get_compilation_metrics()
        return {
            "graphs": counters["stats"]["unique_graphs"],
            "inner_graphs": counters["aot_autograd"]["total"],
            # Dynamo does not count every break, but what follows each is a function of its own
            "breaks": max(sum(counters["graph_break"].values()), _resumed(compiled)),
            "break_reasons": [str(reason)[:200] for reason in counters["graph_break"]][:3],
            "recompiles": sum(metrics.recompile_reason is not None for metrics in compiled),
            "cache_bytes": self.cache_bytes,
            "weight_bytes": self.weights,
        }

    def _generation(self, keep: bool = False) -> tuple[list[Tensor], float, list[float]]:
        """Outputs, seconds, and milliseconds of each step."""
        inputs = self.shape.generation(self.plan.place, self.plan.steps)
        outputs, decided = [], []
        clock = _CudaClock() if self.cuda else _HostClock()
        with torch.no_grad():
            self.system.begin()
            clock.tick()
            for index, arguments in enumerate(inputs):
                if self.cuda:
                    torch.compiler.cudagraph_mark_step_begin()
                output = self.system.step(index, arguments)
                clock.tick()
                if keep:
                    outputs.append(_tensor(output).clone())
                decided.append(self.system.computes(index))
        self.decided = decided
        seconds, steps = clock.read()
        return outputs, seconds, steps

    def _errors(self, outputs: list[Tensor]) -> Result:
        """Relative errors to the uncached model's outputs, the largest of each kind of step."""
        file = Path(self.job.reference)
        if self.job.system == "eager" and not file.exists():
            torch.save([o.cpu() for o in outputs], file)
        if self.row.kind == "limit" or not file.exists():
            return {}
        wanted = torch.load(file)
        errors: dict[bool, list[float]] = {True: [], False: []}
        for kind, want, got in zip(self.decided, wanted, outputs, strict=True):
            want, got = want.float(), got.cpu().float()
            errors[kind].append(((got - want).norm() / want.norm()).item())
        return {
            "error_computed": max(errors[True], default=None),
            "error_reused": max(errors[False], default=None),
        }

    @contextmanager
    def _cache_measured(self) -> Iterator[None]:
        """Measure once what a generation leaves behind that its beginning did not have."""
        if self.cache_bytes is not None or not self.row.caches:
            yield
            return
        with torch.no_grad():
            self.system.begin()
        before = self._live_bytes()
        yield
        self.cache_bytes = self._live_bytes() - before

    def _live_bytes(self) -> int:
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            return torch.cuda.memory_allocated()
        storages = {}
        for thing in gc.get_objects():
            if type(thing) in (Tensor, nn.Parameter):  # not the compiler's stand-ins
                storage = thing.untyped_storage()
                storages[storage._cdata] = storage.nbytes()
        return sum(storages.values())

    def _count_calls(self, block: nn.Module) -> None:
        """Count the steps in which the last block computes, by a layer inside of it."""

        def count(layer: nn.Module, args: Any) -> None:
            self.calls += 1

        layer = next(m for m in block.modules() if isinstance(m, nn.Linear))
        layer.register_forward_pre_hook(count)

    def _warm_compiler(self) -> None:
        """What the first compilation of a process does once: headers, the pool of compilers."""
        if ROWS[self.job.system].compiles:
            torch.compile(torch.sin, backend=self.job.inner)(torch.ones(8, device=self.job.device))
            torch._dynamo.reset()


class _HostClock:
    def __init__(self) -> None:
        self.times: list[float] = []

    def tick(self) -> None:
        self.times.append(time.perf_counter())

    def read(self) -> tuple[float, list[float]]:
        steps = [1000 * (b - a) for a, b in zip(self.times, self.times[1:], strict=False)]
        return self.times[-1] - self.times[0], steps


class _CudaClock:
    """Seconds by the host, with the device waited for once; steps by events on the device."""

    def __init__(self) -> None:
        torch.cuda.synchronize()
        self.start = time.perf_counter()
        self.events: list[Any] = []

    def tick(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.events.append(event)

    def read(self) -> tuple[float, list[float]]:
        torch.cuda.synchronize()
        seconds = time.perf_counter() - self.start
        pairs = zip(self.events, self.events[1:], strict=False)
        return seconds, [a.elapsed_time(b) for a, b in pairs]


def _tensor(output: Any) -> Tensor:
    return next(leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))


def _resumed(compiled: list[CompilationMetrics]) -> int:
    """In how many places a function went on after a break."""
    places = {(m.co_name, m.co_filename, m.co_firstlineno) for m in compiled}
    return sum(str(name).startswith("torch_dynamo_resume_in") for name, _, _ in places)


def _median(values: Any) -> float | None:
    values = list(values)
    return median(values) if values else None


# --- the process -------------------------------------------------------------------------------


def serve(connection: Connection, job: Job, log: str) -> None:
    """Answer the driver's commands until it says "stop"; what is printed goes to `log`."""
    stream = open(log, "w", buffering=1)  # noqa: SIM115
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder  # nothing compiled before is found again
        bench: Bench | None = None
        while (command := connection.recv()) != "stop":
            try:
                if bench is None:
                    bench = Bench(job)
                connection.send({"ok": getattr(bench, command)()})
            except Exception as error:
                traceback.print_exc(file=sys.stdout)
                connection.send({"failed": reason(error)})
                return


def reason(error: Exception) -> str:
    """One line for the table."""
    text = " ".join(str(error).split())[:120]
    if isinstance(error, NotInstalled):
        return text
    return f"failed: {type(error).__name__}: {text}"
