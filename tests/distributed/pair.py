"""Two processes that run one function at a time, each as one rank of a gloo group."""

from __future__ import annotations

import os
import pickle
import tempfile
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

WORLD = 2
#: seconds that a function may take: one that hangs fails its test, and the pair starts anew
LIMIT = 120


class RankError(AssertionError):
    """A function has raised in a process, or has not come to an end."""


class Pair:
    """The two processes. They stay, since importing torch and diffusers takes longest."""

    def __init__(self) -> None:
        self._processes: list[Any] = []
        self._ends: list[Connection] = []
        self._folder = tempfile.TemporaryDirectory()
        self._starts = 0

    def run(self, function: Callable[..., Any], *args: Any, limit: float = LIMIT) -> list[Any]:
        """What `function(*args)` gives in each process, which are ranks of one group."""
        if not self._processes:
            self._start()
        for end in self._ends:
            end.send_bytes(pickle.dumps((function, args)))
        answers = self._answers(limit)
        failed = [text for ok, text in answers.values() if not ok]
        if failed or len(answers) < WORLD:
            self.stop()
            missing = sorted({*range(WORLD)} - answers.keys())
            raise RankError("\n".join(map(str, failed)) or f"ranks {missing} hang")
        return [answers[rank][1] for rank in range(WORLD)]

    def _answers(self, limit: float) -> dict[int, tuple[bool, Any]]:
        """By rank; once one has failed the other one is not waited for long."""
        answers: dict[int, tuple[bool, Any]] = {}
        while len(answers) < WORLD:
            left = [end for rank, end in enumerate(self._ends) if rank not in answers]
            ready = wait(left, limit)
            if not ready:
                break
            for end in ready:
                rank = self._ends.index(end)  # type: ignore[arg-type]
                try:
                    answers[rank] = pickle.loads(end.recv_bytes())  # type: ignore[union-attr]
                except EOFError:
                    answers[rank] = False, f"rank {rank} has died"
                limit = limit if answers[rank][0] else 5
        return answers

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._starts += 1
        meeting = Path(self._folder.name) / f"meeting_{self._starts}"
        for rank in range(WORLD):
            here, there = context.Pipe()
            process = context.Process(target=serve, args=(rank, meeting, there), daemon=True)
            process.start()
            there.close()
            self._processes.append(process)
            self._ends.append(here)
        answers = self._answers(LIMIT)
        if [ok for ok, _ in answers.values()] != [True] * WORLD:
            self.stop()
            raise OSError(f"no two processes can talk to each other here: {answers}")

    def stop(self) -> None:
        """End them."""
        for end in self._ends:
            end.close()
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._ends = [], []


def serve(rank: int, meeting: Path, end: Connection) -> None:
    """The life of a process: join the group, then run what comes."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with suppress(EOFError, BrokenPipeError):
        answer(end, join, rank, meeting)
        while True:
            function, args = pickle.loads(end.recv_bytes())
            torch.manual_seed(0)
            answer(end, function, *args)


def join(rank: int, meeting: Path) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=30),
    )


def answer(end: Connection, function: Callable[..., Any], *args: Any) -> None:
    try:
        with torch.no_grad():
            result = True, function(*args)
        end.send_bytes(pickle.dumps(result))
    except Exception:
        end.send_bytes(pickle.dumps((False, traceback.format_exc())))
