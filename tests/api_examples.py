"""Runs the `Example:` blocks of docstrings; every name that one uses without making it is a toy."""

from __future__ import annotations

import ast
import doctest
import importlib
import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import dit_cache_fx
from dit_cache_fx import helpers
from tests.integrations.engine import Engine, stand_in
from tests.toys import ToyDiT, make, toy_inputs

VLLM_OMNI = "dit_cache_fx.integrations.vllm_omni"
TIMESTEPS = torch.linspace(1000.0, 100.0, 12)


def module_of(path: str) -> ModuleType:
    """A module of the package; vllm-omni's integration over modules that stand in for it."""
    if path != VLLM_OMNI:
        return importlib.import_module(path)
    with stand_in():
        sys.modules.pop(path, None)
        module = importlib.import_module(path)
    del sys.modules[path]
    return module


class Pipe:
    """A pipeline of diffusers, as far as `apply` looks at one."""

    def __init__(self) -> None:
        self.transformer = make(ToyDiT)
        self.scheduler = SimpleNamespace(timesteps=TIMESTEPS)


def generate(model: nn.Module, seed: int = 0) -> Tensor:
    """A whole generation; the result is the last sample."""
    given = toy_inputs(0.0, seed=seed)
    sample = given["x"]
    for t in TIMESTEPS:
        sample = sample - 0.1 * model(sample, t[None], given["text"])
    return sample


def _cached() -> nn.Module:
    cached = dit_cache_fx.apply(make(ToyDiT), "taylorcache", computed_steps=4, timesteps=TIMESTEPS)
    generate(cached)
    return cached


def _exported() -> dit_cache_fx.Exported:
    return dit_cache_fx.export(_cached(), tuple(toy_inputs(900.0).values()))


def _calibration() -> dit_cache_fx.Calibration:
    cached = _cached()
    runs = [lambda seed=seed: generate(cached, seed) for seed in range(2)]
    return dit_cache_fx.calibrate(cached, runs, computed=(4, 6), progress=False)


#: the names that an example may use, each made when one does
TOYS: dict[str, Callable[[], Any]] = {
    "dit_cache_fx": lambda: dit_cache_fx,
    "torch": lambda: torch,
    "generate": lambda: generate,
    "model": lambda: make(ToyDiT),
    "sample": lambda: toy_inputs(900.0)["x"],
    "timestep": lambda: toy_inputs(900.0)["timestep"],
    "prompt": lambda: toy_inputs(900.0)["text"],
    "cached": _cached,
    "pipe": Pipe,
    "exported": _exported,
    "runner": lambda: _exported().runner(),
    "calibration": _calibration,
    "pipeline": Engine,
    "DitCacheBackend": lambda: module_of(VLLM_OMNI).DitCacheBackend,
    "register": lambda: module_of(VLLM_OMNI).register,
    "cached_in": lambda: module_of(VLLM_OMNI).cached_in,
    **{name: lambda name=name: getattr(helpers, name) for name in helpers.__all__},
}


def run_example(text: str) -> None:
    """Run an example, and assert what it prints wherever it shows that (`...`: anything)."""
    examples = doctest.DocTestParser().get_examples(text)
    assert examples
    names = {n.id for e in examples for n in ast.walk(ast.parse(e.source)) if _is_read(n)}
    with stand_in(), torch.no_grad():
        scope = {name: TOYS[name]() for name in TOYS if name in names}
        for example in examples:
            with _printed() as printed:
                exec(compile(example.source, "<example>", "single"), scope)
            if example.want:
                told = doctest.OutputChecker()
                same = told.check_output(example.want, printed.getvalue(), doctest.ELLIPSIS)
                assert same, f"{example.source} printed {printed.getvalue()!r}"


def _is_read(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)


@contextmanager
def _printed() -> Iterator[io.StringIO]:
    with redirect_stdout(io.StringIO()) as printed:
        yield printed
