"""What every test of `backend()` runs under."""

from tests.compile.compiling import new_compiler

__all__ = ["new_compiler"]
