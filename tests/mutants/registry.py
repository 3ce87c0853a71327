"""All mutants."""

from __future__ import annotations

from tests.mutants import of_capture, of_passes, of_runtime, of_strategies, of_the_rest

MUTANTS = (
    *of_capture.MUTANTS,
    *of_passes.MUTANTS,
    *of_runtime.MUTANTS,
    *of_strategies.MUTANTS,
    *of_the_rest.MUTANTS,
)
