"""One command measures step caching side by side: `python -m benchmarks`."""
