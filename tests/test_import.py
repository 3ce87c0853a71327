"""Importing the package is cheap: the compiler is imported when it is first used."""

from __future__ import annotations

import json
import subprocess
import sys

#: what takes long to import, and `import torch` leaves out
HEAVY = (
    "torch._dynamo",
    "torch._inductor",
    "torch.export._trace",
    "torch.fx.experimental.symbolic_shapes",
    "sympy",
    "diffusers",
    "transformers",
    "matplotlib",
)

_SCRIPT = """
import json, sys, time
import torch
before = set(sys.modules)
began = time.perf_counter()
{}
seconds = time.perf_counter() - began
print(json.dumps([sorted(set(sys.modules) - before), seconds]))
"""


def imported_by(code: str) -> set[str]:
    """The modules that `code` imports on top of torch, in a process of its own."""
    script = _SCRIPT.format(code)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    modules, seconds = json.loads(done.stdout.splitlines()[-1])
    print(f"{len(modules)} modules in {seconds:.2f} s on top of torch: {code.splitlines()[0]}")
    return set(modules)


def test_importing_the_package_imports_no_compiler() -> None:
    modules = imported_by("import dit_cache_fx")
    assert not modules.intersection(HEAVY)
    assert "dit_cache_fx.api" in modules


def test_applying_imports_no_compiler() -> None:
    modules = imported_by(
        "import dit_cache_fx\n"
        "model = torch.nn.Module().eval()\n"
        "model.blocks = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(2, 2))])\n"
        "model.forward = lambda x, timestep: model.blocks[0](x)\n"
        "dit_cache_fx.apply(model, 'taylorcache', no_cache_steps={0, 2})\n"
    )
    assert not modules.intersection(HEAVY)
