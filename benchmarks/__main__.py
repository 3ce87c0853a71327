"""Measure step caching side by side: tables, pictures and JSON in one command.

    python -m benchmarks            # all of it, on the CPU and on a GPU where there is one
    python -m benchmarks --models flux --systems eager,compiled,limit,apply-compile
    python -m benchmarks --quick    # a smoke run of a minute, its figures mean nothing

Run it again to go on where it was stopped: what is measured with the same settings is kept.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import table
from benchmarks.plot import plot
from benchmarks.run import MODELS, Results, Settings, compile_times, measure
from benchmarks.systems import ROWS

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks" / "results"
#: by name what a run is: the device, the models' size, the steps
DEVICES = {
    "cpu": Settings(FOLDER),
    "cuda": Settings(FOLDER, device="cuda", size="cuda", dtype="bfloat16"),
    "cuda-28": Settings(
        FOLDER, device="cuda", size="cuda", dtype="bfloat16", schedule=(28, 6, 25, 4)
    ),
}
QUICK_SYSTEMS = ("eager", "compiled", "limit", "apply", "apply-compile", "backend")


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 1 where nothing could be measured."""
    options = _parser().parse_args(arguments)
    chosen = options.devices or ["cpu", *["cuda", "cuda-28"] * torch.cuda.is_available()]
    settings = _settings(options)
    for name in chosen:
        if not options.report:
            measure(settings[name])
        if options.compile_time and not options.report:
            _keep_compile_times(settings[name], options.compile_time)
    sections = []
    for name, one in settings.items():  # what other runs have measured stays on the page
        if one.file.exists() and (name in chosen or not options.quick):
            data = json.loads(one.file.read_text())
            sections.append(table.report(data, "python -m benchmarks"))
            if name in chosen:
                plot(data, options.docs / "img")
    if not sections:
        return 1
    table.write(options.docs / "benchmarks.md", sections)
    print("\n\n".join(sections))
    return 0


def _settings(options: argparse.Namespace) -> dict[str, Settings]:
    """Of every run, by name, with what was asked for."""
    chosen = {
        "models": options.models,
        "systems": options.systems,
        "generations": options.generations,
        "threads": options.threads,
        "live": options.live,
        "fresh": options.fresh,
    }
    if options.quick:
        options.docs = options.docs or FOLDER / "quick"
        chosen |= {"folder": options.docs, "size": "tiny", "generations": 2}
        chosen |= {
            "schedule": (8, 3, 7, 2),
            "inner": "eager",
            "in_process": True,
            "fresh": True,
        }
        if options.systems == list(ROWS):
            chosen["systems"] = QUICK_SYSTEMS
    options.docs = options.docs or ROOT / "docs"
    return {name: replace(settings, **chosen) for name, settings in DEVICES.items()}


def _keep_compile_times(settings: Settings, repeats: int) -> None:
    times = compile_times(settings, repeats)
    results = Results.open(replace(settings, fresh=False))
    results.data["compile_times"] = times
    results.save()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", type=_names(MODELS), default=list(MODELS))
    parser.add_argument("--systems", type=_names(ROWS), default=list(ROWS), help=", ".join(ROWS))
    parser.add_argument("--devices", type=_names(DEVICES), help=", ".join(DEVICES))
    parser.add_argument("--generations", type=int, default=3, help="timed generations of each")
    parser.add_argument("--threads", type=int, default=2, help="of each system on the CPU")
    parser.add_argument("--live", type=int, default=0, help="workers held at once (0: what fits)")
    parser.add_argument(
        "--compile-time",
        type=int,
        metavar="N",
        help="also compile a model of 24 blocks, N times with each form",
    )
    parser.add_argument("--fresh", action="store_true", help="measure the chosen systems again")
    parser.add_argument("--report", action="store_true", help="only write what is measured already")
    parser.add_argument("--quick", action="store_true", help="a smoke run: tiny models, few steps")
    parser.add_argument("--docs", type=Path, help="where benchmarks.md and img/ are written")
    return parser


def _names(known: object) -> object:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:  # type: ignore[operator]
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")  # type: ignore[call-overload]
        return names

    return parse


if __name__ == "__main__":
    sys.exit(main())
