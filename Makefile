# Every recipe makes .venv by itself when it is absent. To use an interpreter that
# has torch already: make test-gpu PY=python3, or VENV_BIN=/path/to/venv/bin.

PYTHON   ?= python3
VENV_BIN ?= .venv/bin
PY       ?= $(VENV_BIN)/python
ARGS     ?=
WORKERS  ?= 2

# The root holds folders with generic names (cli): keep it off every sys.path.
export PYTHONSAFEPATH := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Only our own environment is ours to make.
ifeq ($(PY),.venv/bin/python)
READY := .venv/.ready
endif

.DEFAULT_GOAL := help
.PHONY: help demo test test-faults same-bytes soak check fix test-gpu bench bench-gpu clean

help: ## list the recipes
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

demo: $(READY) ## quantize the bundled model, show before and after
	$(VENV_BIN)/rsq-stream demo $(ARGS)

# A worker that dies ends the suite: one that is replaced hangs it (pytest-xdist 3.8, loadfile).
test: $(READY) ## the suite without a GPU, shapes checked (ARGS="-k solver", WORKERS=0)
	$(VENV_BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --max-worker-restart=0 --jaxtyping-packages=rsq_stream,beartype.beartype -m "not gpu" $(ARGS)

check: $(READY) ## format, lint, types, direction of imports, contents of the wheel
	$(VENV_BIN)/ruff format --check .
	$(VENV_BIN)/ruff check .
	$(VENV_BIN)/mypy
	$(VENV_BIN)/lint-imports
	@rm -rf rsq_stream.egg-info; out=$$(mktemp -d) && trap 'rm -rf "$$out"' EXIT && \
	$(PY) -m build --no-isolation --outdir "$$out" . > "$$out/log" 2>&1 || \
	{ cat "$$out/log"; exit 1; }; $(VENV_BIN)/check-wheel-contents "$$out"/*.whl

fix: $(READY) ## format, and mend what ruff can mend
	$(VENV_BIN)/ruff format .
	$(VENV_BIN)/ruff check --fix .

test-faults: $(READY) ## every step on disk, every kind of crash (some 20 minutes)
	RSQ_ALL_FAULTS=1 $(VENV_BIN)/pytest tests/faults $(ARGS)

same-bytes: $(READY) ## toy outputs of this tree against a commit's (BASE=main)
	@test -n "$(BASE)" || { echo "say with which commit: make same-bytes BASE=HEAD" >&2; exit 1; }
	$(PY) tests/same_bytes.py $(BASE) $(ARGS)

soak: $(READY) ## SIGKILL at random times for 10 minutes (ARGS="--minutes 1")
	$(PY) tests/soak.py $(ARGS)

test-gpu: $(READY) ## the tests that need a CUDA device
	$(PY) -m pytest -m gpu $(ARGS)

bench: $(READY) ## benchmarks on the CPU
	$(PY) benchmarks/run.py $(ARGS)

# Some minutes. The largest: make bench-gpu SHAPE="--shape 70B --samples 128
# --sequence-length 2048 --vram 20GiB --ram 100GiB", and again with --ram 8GiB.
SHAPE ?= --shape 8B --samples 16 --sequence-length 2048

bench-gpu: $(READY) ## benchmarks on a CUDA device (SHAPE="--shape 70B ..." for others)
	$(PY) benchmarks/kernels.py --device cuda
	$(PY) benchmarks/run.py --device cuda $(ARGS)
	$(PY) benchmarks/shapes.py --device cuda $(SHAPE)

clean: ## remove builds and caches (not .venv, not the work folder of a run)
	rm -rf build dist *.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find benchmarks cli rsq_stream tests -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first and alone: the constraint then picks the one build that all else uses.
.venv/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	echo "rsq-stream needs Python 3.11 or newer; $(PYTHON) is: $$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.12" >&2; exit 1; }
	@echo "Making .venv (once; most of it is torch)"
	@$(PYTHON) -m venv .venv
	@.venv/bin/python -m pip install -qq --upgrade 'pip>=25.1'
	@.venv/bin/python -m pip install --progress-bar auto torch -c constraints.txt
	@.venv/bin/python -m pip install -qq -e . -c constraints.txt
	@.venv/bin/python -m pip install -qq --group dev -c constraints.txt
	@touch $@
