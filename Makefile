# `make help` lists the targets. Everything they need is set up below this folder, by uv, which
# comes from the PATH or through pip (scripts/uv); nothing is set up twice (stamp files).

MODEL ?=
PORT ?= 8000
ARGS ?=
TESTS ?=
JOBS ?= 2
PEERS ?= transformers,llama.cpp
OUT ?= benchmarks/results

VENV ?= .venv
OLDEST ?= .venv-jax0112
ORACLES ?= .venv-oracles
AOT ?= .venv-aot
AOT_TESTS := aot and not slow
AOT_CASES := --first-cases
TRITON ?= .venv-triton
TRITON_TESTS := not slow
RAY ?= .venv-ray

UV := scripts/uv
BIN := $(VENV)/bin
PYTEST := -m pytest -n $(JOBS) --dist worksteal --timeout 300

.DEFAULT_GOAL := help
.PHONY: help setup serve test test-slow test-oldest test-aot test-aot-slow test-triton test-triton-slow \
  test-ray \
  check format docs notebooks bench plots robustness gpu oracles constraints clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

setup: $(VENV)/.stamp-dev ## set up .venv with everything that the other targets need
	@:

serve: $(VENV)/.stamp-serve ## serve a model on PORT: make serve [MODEL=...] [PORT=8000] [ARGS='--flag ...']
	@exec $(BIN)/python -m jaxserve.serve $(MODEL) --port $(PORT) $(ARGS)

# What programs compute hardly depends on how hard LLVM tries, and most of the time goes into that.
# It tries as hard as ever for tests with the mark `optimized`, in make test-slow and in notebooks.
# And programs that take less than a second to compile are not written to disk.
QUICKLY := JAX_DISABLE_MOST_OPTIMIZATIONS=1 JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=1

test: $(VENV)/.stamp-dev ## run the tests: make test [TESTS='tests/unit -k name'] [JOBS=2]
	@$(QUICKLY) $(BIN)/python $(PYTEST) -m "not slow and not aot" $(TESTS)

test-slow: $(VENV)/.stamp-dev ## run the tests that take long
	@$(BIN)/python $(PYTEST) -m "slow and not aot" $(TESTS)

# Texts and their tokens, policies, and what the simulator has in common with the engine depend on no
# version of JAX.
OLDEST_TESTS := tests/engine $(foreach name,chat_template detokenizer likeness slo_policy tokenizer \
  wordpiece,--ignore=tests/engine/test_$(name).py)

test-oldest: $(OLDEST)/.stamp-dev ## run the engine tests on the oldest supported JAX, one case of each
	@$(QUICKLY) $(OLDEST)/bin/python $(PYTEST) --first-cases \
	  -m "not slow" $(or $(TESTS),$(OLDEST_TESTS))

# The oldest JAX compiles one kernel of each kind here, and like the newest all of them when thorough.
test-aot: $(AOT)/.stamp $(AOT)-jax0112/.stamp ## compile kernels for a GPU that need not be there
	@JAX_PLATFORMS=cpu PYTHONPATH=src $(AOT)/bin/python $(PYTEST) -m "$(AOT_TESTS)" \
	  $(or $(TESTS),tests/kernels)
	@JAX_PLATFORMS=cpu PYTHONPATH=src $(AOT)-jax0112/bin/python $(PYTEST) -m "$(AOT_TESTS)" \
	  $(AOT_CASES) $(or $(TESTS),tests/kernels)

test-aot-slow: AOT_CASES :=
test-aot-slow: AOT_TESTS := aot and slow
test-aot-slow: test-aot ## compile the kernels that test-aot leaves out

test-triton: $(TRITON)/.stamp ## run the tests of Triton kernels: interpreted, then compiled for GPUs that are not there
	@TRITON_INTERPRET=1 $(TRITON)/bin/python $(PYTEST) -m "interpreted and ($(TRITON_TESTS))" $(or $(TESTS),tests/triton)
	@$(TRITON)/bin/python $(PYTEST) -m "compiled and ($(TRITON_TESTS))" $(or $(TESTS),tests/triton)

test-triton-slow: TRITON_TESTS := slow or not slow
test-triton-slow: export THOROUGH := 1
test-triton-slow: test-triton ## all tests of Triton kernels, and more examples of each; half an hour

test-ray: $(RAY)/.stamp ## run the tests of replicas in Ray actors
	@$(RAY)/bin/python -m pytest --timeout 300 $(or $(TESTS),tests/cluster/test_ray.py)

check: $(VENV)/.stamp-dev ## check format, lint, types, import contracts and spelling
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/basedpyright
	@$(BIN)/lint-imports
	@$(BIN)/typos

format: $(VENV)/.stamp-dev ## format, and fix what the linter can fix
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format .

docs: $(VENV)/.stamp-docs ## build the documentation into build/docs; warnings are errors
	@$(BIN)/python scripts/pair_notebooks.py
	@$(BIN)/sphinx-build -q -W --keep-going -n -b html docs build/docs
	@echo "built: build/docs/index.html"

notebooks: $(VENV)/.stamp-docs ## run the notebooks into build/notebooks, where make docs finds their outputs
	@$(BIN)/python scripts/pair_notebooks.py
	@mkdir -p build/notebooks && cp notebooks/*.ipynb build/notebooks/
	@cd notebooks && printf '%s\n' *.ipynb | (cd .. && xargs -n 1 -P $(JOBS) sh -c \
	  '$(BIN)/jupyter-execute --inplace --timeout=600 "build/notebooks/$$0" && echo "$$0"')

bench: $(VENV)/.stamp-dev ## measure on this machine, against the peers that are there: make bench [PEERS=...]
	@$(BIN)/python -m benchmarks.golden
	@$(BIN)/python -m benchmarks.steady
	@$(BIN)/python -m benchmarks.structured
	@$(BIN)/python -m benchmarks.speculation
	@$(BIN)/python -m benchmarks.lora
	@$(BIN)/python -m benchmarks.serving --peers $(PEERS)

plots: $(VENV)/.stamp-docs ## draw what benchmarks have recorded into docs/images
	@$(BIN)/python -m benchmarks.rooms.slos_serve --plot
	@$(BIN)/python -m benchmarks.rooms.polyserve --plot
	@$(BIN)/python -m benchmarks.rooms.live_fleet --plot
	@$(BIN)/python -m benchmarks.rooms.flash --plot
	@$(BIN)/python -m benchmarks.rooms.tactic --plot

robustness: $(VENV)/.stamp-dev ## try four Python clients, and what bad ones can do; downloads them into build/environments
	@$(BIN)/python -m benchmarks.clients
	@$(BIN)/python -m benchmarks.robustness

# Where a GPU is, JAX for it is too: with a Python that has JAX and Flax nothing is installed and no
# package index is needed. Only a machine without them gets .venv, to be told what would be done.
SETUP := $(MAKE) --no-print-directory --silent
HAS_JAX := from importlib.metadata import version as v; v('flax'); \
  assert tuple(map(int, v('jax').split('.')[:3])) >= (0, 11, 2)

gpu: ## all GPU tests and benchmarks, ten minutes at most, results in OUT; without a GPU, says what it would do (ARGS=--dry: compiles it)
	@python=$$(scripts/find-python "$(HAS_JAX)" 2>/dev/null) \
	  || { [ -z "$(PYTHON)" ] && $(SETUP) $(VENV)/.stamp-dev && python=$(BIN)/python; } \
	  || { echo "make gpu needs a Python (3.12 or newer) with JAX 0.11.2 or newer and Flax" >&2; exit 1; }; \
	OUT="$(OUT)" PYTHONPATH=src "$$python" -m benchmarks.gpu $(ARGS)

oracles: $(ORACLES)/.stamp ## write the golden tensors again with torch: make oracles [ORACLE_PYTHON=python3.11]
	@set -e; for script in tests/oracles/make_*.py; do \
	  echo "$$script"; PYTHONPATH=src:. $(ORACLES)/bin/python "$$script"; \
	done

constraints: ## resolve the pins again (constraints*.txt)
	@scripts/pin

clean: ## remove everything that these targets made
	rm -rf .venv .venv-jax0112 .venv-oracles .venv-aot .venv-aot-jax0112 .venv-triton .venv-ray
	rm -rf .tools .cache build dist
	rm -rf docs/notebooks .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests benchmarks docs scripts -name __pycache__ -type d -prune -exec rm -rf {} +

%/bin/python:
	@$(UV) venv --quiet --seed --clear --python "$$(scripts/find-python)" $* || { rm -rf $*; exit 1; }

$(VENV)/.stamp-serve: pyproject.toml constraints.txt | $(BIN)/python
	@$(UV) pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt \
	    --editable '.[serve]'
	@touch $@

$(VENV)/.stamp-dev: pyproject.toml constraints.txt | $(BIN)/python
	@$(UV) pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt \
	    --editable '.[serve]' --group test --group lint --group bench
	@touch $@ $(VENV)/.stamp-serve

$(VENV)/.stamp-docs: pyproject.toml constraints.txt | $(BIN)/python
	@$(UV) pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt \
	    --editable '.[serve]' --group docs --group notebooks
	@touch $@ $(VENV)/.stamp-serve

$(OLDEST)/.stamp-dev: pyproject.toml constraints-jax-0.11.2.txt | $(OLDEST)/bin/python
	@$(UV) pip install --quiet --compile-bytecode --python $(OLDEST)/bin/python \
	    --constraint constraints-jax-0.11.2.txt --editable '.[serve]' --group test
	@touch $@

$(TRITON)/.stamp: pyproject.toml constraints.txt scripts/make-triton-env | $(TRITON)/bin/python
	@scripts/make-triton-env $(TRITON)
	@touch $@

$(RAY)/.stamp: pyproject.toml constraints.txt | $(RAY)/bin/python
	@$(UV) pip install --quiet --compile-bytecode --python $(RAY)/bin/python --constraint constraints.txt \
	    --editable '.[serve,ray]' --group test
	@touch $@

$(ORACLES)/.stamp: scripts/make-oracles-env
	@scripts/make-oracles-env $(ORACLES)
	@touch $@

$(AOT)/.stamp: scripts/make-aot-env constraints.txt constraints-aot.txt
	@scripts/make-aot-env $(AOT) constraints.txt
	@touch $@

$(AOT)-jax0112/.stamp: scripts/make-aot-env constraints-jax-0.11.2.txt constraints-aot.txt
	@scripts/make-aot-env $(AOT)-jax0112 constraints-jax-0.11.2.txt
	@touch $@
