"""What every test of compiled models runs under."""

from tests.compile.compiling import new_compiler

__all__ = ["new_compiler"]
