# Two commands on a fresh machine: `make demo` and `make test`. Both make .venv when it is missing
# or when what it has to hold has changed; another Python: make test PYTHON=python3.12

PYTHON ?= python3
TORCH ?= torch==2.13.0
# its own requirements, which its cache helpers do not use, are a hundred packages
ANGELSLIM := angelslim==0.5.0
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# the theme's advertisement of its successor
export NO_MKDOCS_2_WARNING := 1

.PHONY: demo test test-all check bench dist gpu

demo: $(INSTALLED)
	$(BIN)/python -m examples.digits.demo

# Everything side by side, with the other libraries; more: .venv/bin/python -m benchmarks --help
bench: $(INSTALLED)
	$(BIN)/pip install --quiet --editable '.[bench]'
	$(BIN)/pip install --quiet --no-deps $(ANGELSLIM)
	$(BIN)/python -m benchmarks

# Everything that needs a CUDA device: its tests, then its tables for docs/benchmarks.md
gpu: $(INSTALLED)
	@$(BIN)/python -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "no CUDA device")'
	$(BIN)/python -m pytest -m gpu
	$(BIN)/pip install --quiet --editable '.[bench]'
	$(BIN)/pip install --quiet --no-deps $(ANGELSLIM)
	$(BIN)/python -m benchmarks --devices cuda,cuda-28

# A file's tests share what they build: they stay in one process
test: check
	$(BIN)/python -m pytest -n auto --dist loadfile

# Every case of every model, compiled and exported too: an hour or two
test-all: check
	$(BIN)/python -m pytest -n auto -m "exhaustive or not exhaustive"

# A wheel and a source archive in dist/, installed and imported in environments of their own
dist: $(INSTALLED)
	rm -rf dist
	$(BIN)/pip install --quiet '.[dist]'
	$(BIN)/python -m build --outdir dist
	for made in dist/*.whl dist/*.tar.gz; do \
		rm -rf dist/venv && $(PYTHON) -m venv dist/venv && \
		dist/venv/bin/pip install --quiet $(TORCH) "$$made" && \
		(cd dist && venv/bin/python -c "import dit_cache_fx; print(dit_cache_fx.__version__)") \
		|| exit 1; \
	done
	rm -rf dist/venv

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(MAKE) docs

.PHONY: docs docs-serve
# The documentation with the API reference: in site/, or at http://127.0.0.1:8000. A link or an
# anchor that leads nowhere fails (with --quiet it would not)
docs: $(INSTALLED)
	$(BIN)/python -m mkdocs build --strict

docs-serve: $(INSTALLED)
	$(BIN)/python -m mkdocs serve

$(INSTALLED): pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed: make PYTHON=python3.12" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable '.[test,examples,docs]'
	touch $@
