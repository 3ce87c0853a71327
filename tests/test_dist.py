"""What is published: a wheel of the package, which imports without the repository beside it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.metadata import Distribution
from pathlib import Path
from zipfile import ZipFile

import pytest

import dit_cache_fx

ROOT = Path(__file__).parents[1]
#: what the build reads
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "dit_cache_fx")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    for name in SOURCES:
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, folder / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", folder, folder], check=True)
    (made,) = folder.glob("*.whl")
    return made


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        names = set(archive.namelist())
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "dit_cache_fx").rglob("*.py")}
    packed = {name for name in names if ".dist-info/" not in name}
    assert packed == modules | {"dit_cache_fx/py.typed"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_wheel_imports_from_where_it_is_installed(wheel: Path, tmp_path: Path) -> None:
    with ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = "import dit_cache_fx as d; print(d.__version__, d.__file__)"
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
        check=True,
        capture_output=True,
        text=True,
    )
    version, file = run.stdout.split()
    assert version == dit_cache_fx.__version__
    assert Path(file).is_relative_to(tmp_path)


def test_its_metadata(wheel: Path) -> None:
    (info,) = [p for p in _unpacked(wheel).iterdir() if p.suffix == ".dist-info"]
    metadata = Distribution.at(info).metadata
    assert metadata["Version"] == dit_cache_fx.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"


def _unpacked(wheel: Path) -> Path:
    folder = wheel.parent / "unpacked"
    with ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder
