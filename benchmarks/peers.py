"""The other libraries, imported only where one of their rows is measured."""

from __future__ import annotations

import importlib.util
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

PACKAGES = {"angelslim": "angelslim", "cache_dit": "cache-dit", "diffusers": "diffusers"}


class NotInstalled(Exception):
    """A peer that this environment does not have."""


def versions() -> dict[str, str]:
    """Of each peer that is installed."""
    found = {}
    for name in PACKAGES.values():
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def require(module: str) -> None:
    """Raise `NotInstalled` where there is no such module."""
    if importlib.util.find_spec(module) is None:
        raise NotInstalled(f"{PACKAGES[module]} is not installed (make bench installs it)")


def angelslim_helpers() -> ModuleType:
    """angelslim's package of cache helpers, without its parents, which import half of the world.

    Its Taylor helper compiles two of its functions where the platform allows it; the module that
    says so is given, so the helper runs as it does for its users.
    """
    require("angelslim")
    spec = importlib.util.find_spec("angelslim")
    assert spec is not None
    (root,) = spec.submodule_search_locations or ()
    compressor = Path(root) / "compressor"
    parents = ("angelslim", "angelslim.compressor")
    sys.modules.update((name, ModuleType(name)) for name in parents)
    try:
        _load("angelslim.compressor._platform", compressor / "_platform.py")
        folder = compressor / "diffusion" / "cache"
        return _load("angelslim_cache_helpers", folder / "__init__.py", folder)
    finally:
        for name in parents:
            del sys.modules[name]


def _load(name: str, file: Path, package: Path | None = None) -> ModuleType:
    folders = None if package is None else [str(package)]
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=folders)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
