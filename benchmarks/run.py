"""The driver: starts the workers, asks them in turn, and keeps every answer at once.

No two workers ever run at the same time. A worker that fails, crashes or hangs is a row that says
so.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import platform
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import torch

from benchmarks import peers
from benchmarks.figures import run_name
from benchmarks.models import SHAPES, shape
from benchmarks.systems import ROWS
from benchmarks.worker import Bench, Job, Result, reason, serve
from dit_cache_fx import interval_schedule

MODELS = ("flux", "hunyuan", "dit", "dit8")
#: whose time to compile is measured on a model of many blocks
COMPILERS = ("compiled", "apply-compile", "apply-steps", "backend")
FAILED = "failed"


@dataclass(frozen=True)
class Settings:
    """One run.

    `folder`: where results are kept. `live`: how many workers are held at once (0: what fits).
    `fresh`: measure the chosen systems again. `schedule`: see `Plan`.
    """

    folder: Path
    device: str = "cpu"
    size: str = "cpu"
    dtype: str = "float32"
    models: Sequence[str] = MODELS
    systems: Sequence[str] = tuple(ROWS)
    generations: int = 3
    schedule: tuple[int, int, int, int] = (50, 11, 45, 4)
    threads: int = 2
    inner: str = "inductor"
    live: int = 0
    timeout: float = 900.0
    in_process: bool = False
    fresh: bool = False

    @property
    def file(self) -> Path:
        """The JSON with everything measured."""
        return self.folder / f"{run_name(_told(self))}.json"

    def job(self, model: str, system: str) -> Job:
        steps, dtype = self.schedule[0], self.dtype
        name = f"{self.device}-{self.size}-{dtype}-{steps}-{model}.pt"
        reference = self.folder / "scratch" / name
        return Job(
            model,
            self.size,
            system,
            self.device,
            self.dtype,
            self.schedule,
            self.threads,
            self.inner,
            str(reference),
        )


@dataclass
class Results:
    """What is measured so far, written to a file after each answer."""

    file: Path
    data: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def open(settings: Settings) -> Results:
        """Those of the file, if they were measured on the same machine with the same settings."""
        wanted = {"settings": _told(settings), "machine": machine(settings), "models": {}}
        if settings.file.exists():
            found = json.loads(settings.file.read_text())
            found["settings"]["generations"] = settings.generations
            if found["settings"] == wanted["settings"] and found["machine"] == wanted["machine"]:
                return Results(settings.file, found)
            _say(f"{settings.file} was measured with other settings or elsewhere: begun anew")
        return Results(settings.file, wanted)

    def rows(self, model: str) -> dict[str, Any]:
        """By system, what was measured of a model."""
        entry = self.data["models"].setdefault(model, {"title": "", "rows": {}})
        return entry["rows"]  # type: ignore[no-any-return]

    def done(self, model: str, system: str, generations: int) -> bool:
        """Whether nothing is left to do: enough generations, or it cannot work."""
        row = self.rows(model).get(system, {})
        enough = len(row.get("generations", ())) >= generations and "graphs" in row
        return enough or FAILED in row

    def save(self) -> None:
        """Write the file; a reader never sees half of it."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        half = self.file.with_suffix(".tmp")
        half.write_text(json.dumps(self.data, indent=1) + "\n")
        half.replace(self.file)


def measure(settings: Settings) -> dict[str, Any]:
    """Measure what is not measured yet; all results, those of earlier runs included."""
    results = Results.open(settings)
    (settings.folder / "scratch").mkdir(parents=True, exist_ok=True)
    for model in (m for m in settings.models if settings.size in SHAPES[m]):
        results.data["models"].setdefault(model, {"rows": {}})["title"] = shape(
            model, settings.size
        ).title
        todo = [
            name
            for name in _wanted(settings)
            if settings.fresh or not results.done(model, name, settings.generations)
        ]
        _make_reference(settings, model, todo)
        for group in _groups(todo, _live(settings, model)):
            _measure_together(settings, results, model, group)
    results.save()
    return results.data


def _wanted(settings: Settings) -> list[str]:
    return [s for s in settings.systems if settings.device != "cpu" or not ROWS[s].gpu_only]


def _make_reference(settings: Settings, model: str, todo: Sequence[str]) -> None:
    """The uncached outputs, which every system is compared with."""
    job = settings.job(model, "eager")
    if not todo:
        return
    Path(job.reference).unlink(missing_ok=True)
    _say(f"{model}: the uncached outputs")
    worker = _worker(settings, job)
    worker.ask("prepare")
    worker.stop()


def _measure_together(
    settings: Settings, results: Results, model: str, systems: Sequence[str]
) -> None:
    """Prepare each system, then a generation of each, again and again."""
    rows, workers = results.rows(model), {}
    for name in systems:
        worker = _worker(settings, settings.job(model, name))
        rows[name] = {"generations": []}
        if _note(results, rows[name], worker.ask("prepare"), f"{model}: {name}: first generation"):
            workers[name] = worker
        else:
            worker.stop()
    for turn in range(settings.generations):
        for name in list(workers):
            answer = workers[name].ask("generate")
            what = f"{model}: {name}: generation {turn + 1} of {settings.generations}"
            if not _note(results, rows[name], answer, what):
                workers.pop(name).stop()
    for name, worker in workers.items():
        _note(results, rows[name], worker.ask("finish"), f"{model}: {name}: counts")
        worker.stop()


def _note(results: Results, row: dict[str, Any], answer: Result, what: str) -> bool:
    """Write an answer down; whether it was a good one."""
    good = "ok" in answer
    if not good:
        row.update(answer)
    elif "seconds" in answer["ok"]:
        row["generations"].append(answer["ok"])
    else:
        row.update(answer["ok"])
    told = answer.get("ok", {})
    seconds = told.get("seconds", told.get("first_seconds"))
    done = "done" if seconds is None else f"{seconds:.2f} s"
    _say(f"{what}: {done if good else answer[FAILED]}")
    results.save()
    return good


# --- workers -----------------------------------------------------------------------------------


class Process:
    """A worker in a process of its own."""

    def __init__(self, job: Job, folder: Path, timeout: float) -> None:
        context = _processes(job.device)
        self.timeout = timeout
        self.log = folder / f"{job.device}-{job.model}-{job.system}.log"
        self.connection, theirs = context.Pipe()
        arguments = (theirs, job, str(self.log))
        self.process = context.Process(target=serve, args=arguments, daemon=False)
        self.process.start()
        theirs.close()

    def ask(self, command: str) -> Result:
        """The answer to a command, or why there is none."""
        try:
            self.connection.send(command)
            if not self.connection.poll(self.timeout):
                self.process.kill()
                return {FAILED: f"failed: no answer within {self.timeout:.0f} s"}
            return self.connection.recv()  # type: ignore[no-any-return]
        except (EOFError, ConnectionError):
            self.process.join(10)
            return {FAILED: f"failed: crashed (exit code {self.process.exitcode})"}

    def stop(self) -> None:
        """End the process, which gives its memory back."""
        with contextlib.suppress(OSError, ValueError):
            self.connection.send("stop")
        self.process.join(30)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.connection.close()


def _processes(device: str) -> BaseContext:
    """Workers are forked from a process that has imported everything and run nothing.

    For a GPU each is started anew: libraries ask for one when they are imported, and no process
    that was forked after that can use it.
    """
    if device != "cpu" or "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.preload"])
    return context


class InProcess:
    """A worker in this process, for a smoke run."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.bench: Bench | None = None

    def ask(self, command: str) -> Result:
        """As `Process.ask`."""
        try:
            self.bench = self.bench or Bench(self.job)
            return {"ok": getattr(self.bench, command)()}
        except Exception as error:
            return {FAILED: reason(error)}

    def stop(self) -> None:
        """Let go of the model."""
        self.bench = None


def _worker(settings: Settings, job: Job) -> Process | InProcess:
    if settings.in_process:
        return InProcess(job)
    return Process(job, settings.folder / "scratch", settings.timeout)


def _groups(systems: Sequence[str], size: int) -> Iterable[Sequence[str]]:
    for start in range(0, len(systems), size):
        yield systems[start : start + size]


def _live(settings: Settings, model: str) -> int:
    """How many workers fit into memory together. In one process: one, for its compiler's counts."""
    if settings.live or settings.in_process:
        return settings.live or 1
    with torch.device("meta"):
        weights = sum(p.numel() for p in shape(model, settings.size).model().parameters())
    width = torch.finfo(getattr(torch, settings.dtype)).bits // 8
    overhead = 0.5e9 if settings.device == "cpu" else 4e9
    return max(1, int(0.8 * _memory(settings.device) / (1.3 * weights * width + overhead)))


def _memory(device: str) -> float:
    if device != "cpu":
        return float(torch.cuda.mem_get_info()[0])
    return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def compile_times(settings: Settings, repeats: int) -> dict[str, list[float]]:
    """Seconds to compile a model of 24 blocks: uncached and cached, each time in a new process."""
    settings = replace(settings, schedule=(4, 2, 4, 2), fresh=True)
    (settings.folder / "scratch").mkdir(parents=True, exist_ok=True)
    seconds: dict[str, list[float]] = {}
    _make_reference(settings, "flux24", ["compiled"])
    for turn in range(repeats):
        for name in COMPILERS:
            worker = _worker(settings, settings.job("flux24", name))
            first, later = worker.ask("prepare"), worker.ask("generate")
            worker.stop()
            if "ok" in first and "ok" in later:
                taken = first["ok"]["first_seconds"] - later["ok"]["seconds"]
                seconds.setdefault(name, []).append(taken)
                _say(f"24 blocks, {name}, {turn + 1} of {repeats}: {taken:.1f} s")
            else:
                _say(f"24 blocks, {name}: {first.get(FAILED, later.get(FAILED))}")
    return seconds


# --- what is written beside the figures ----------------------------------------------------------


def machine(settings: Settings) -> dict[str, Any]:
    """What the figures were measured on."""
    about = {
        "device": _device_name(settings.device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "peers": peers.versions(),
    }
    if settings.device == "cpu":
        about["threads"] = settings.threads
    return about


def _device_name(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {os.cpu_count()} cores" if names else platform.processor()


def _told(settings: Settings) -> dict[str, Any]:
    names = ("device", "size", "dtype", "generations", "inner")
    return {
        **{name: getattr(settings, name) for name in names},
        "schedule": list(settings.schedule),
        "steps": settings.schedule[0],
        "computed": len(interval_schedule(*settings.schedule)),
    }


def _say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)
