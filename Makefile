# Everything runs from .venv, which the first target that needs it creates. Start with `make demo` or `make test`.
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
PYTEST ?=
WORKERS ?= 2
QUICK ?=
MINUTES ?= 10
FUZZ ?=
RELEASE ?=
REHEARSE ?=
PARTS ?=
export OMP_NUM_THREADS ?= 1

.PHONY: help venv demo test test-ci test-all fuzz release-check bench bench-convergence gpu gpu-wheels docs docs-serve lint format type clean
.DELETE_ON_ERROR:

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*##/make \1\t/p' $(MAKEFILE_LIST) | expand -t 24

venv: $(STAMP)  ## create .venv with the pinned versions

$(STAMP): pyproject.toml constraints.txt launch/venv.sh
	@launch/venv.sh
	@touch $@

demo: $(STAMP)  ## train AdaFisher beside AdamW and Muon on 2 CPU ranks or all GPUs, about three minutes
	@$(BIN)/python launch/demo.py

test: $(STAMP)  ## the desk's: all in one process but the longest, and each layout once at two ranks; PYTEST="-k name" chooses
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow and not ci and (desk or not dist and not deepspeed)" $(PYTEST)

test-ci: $(STAMP)  ## CI's: all but the slow ones
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow" $(PYTEST)

test-all: $(STAMP)  ## all tests: hours
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST)

fuzz: $(STAMP)  ## hostile inputs, flipped bits, kills, loads beside saves, in turn for MINUTES=10; a summary
	@$(BIN)/python tests/fuzz.py --minutes $(MINUTES) $(FUZZ)

release-check: $(STAMP)  ## build the wheel; try it with the oldest and newest torch and DeepSpeed (network, 15 GB)
	@$(BIN)/python tests/release.py $(RELEASE)

bench: $(STAMP)  ## the figures of docs/ but convergence.py's (forty minutes); QUICK=--quick: five, into runs/bench
	@$(BIN)/python benchmarks/step_time.py $(QUICK)
	@$(BIN)/python benchmarks/host_time.py $(QUICK)
	@$(BIN)/python benchmarks/scaling.py $(QUICK)
	@$(BIN)/python benchmarks/latency.py $(QUICK)
	@$(BIN)/python benchmarks/memory.py $(QUICK)
	@$(BIN)/python benchmarks/stages.py $(QUICK)
	@$(BIN)/python benchmarks/checkpoint.py $(QUICK)
	@$(BIN)/python benchmarks/metrics.py $(QUICK)
	@$(BIN)/python benchmarks/convergence.py --quick

bench-convergence: $(STAMP)  ## AdaFisher beside eight other optimizers: a day of two cores; goes on where it was stopped
	@$(BIN)/python benchmarks/convergence.py

# A GPU machine is lent bare: this needs no .venv.
gpu:  ## all that needs a GPU, in eight minutes, into runs/gpu; REHEARSE=1: tiny, on a CPU; PARTS="fast trains": some; KERNEL=1: by the kernel
	@GPU_COMMAND='make gpu$(if $(KERNEL), KERNEL=$(KERNEL))$(if $(REHEARSE), REHEARSE=1)$(if $(PARTS), PARTS="$(PARTS)")' \
		$(if $(KERNEL),ADAFISHER_KERNEL=$(KERNEL)) \
		$$(test -x $(BIN)/python && echo $(BIN)/python || echo python3) benchmarks/gpu/run.py \
		$(if $(REHEARSE),--rehearse) $(if $(PARTS),--parts "$(PARTS)")

gpu-wheels: $(STAMP)  ## fetch into .gpu/wheels what the GPU machine lacks (network); `make gpu` installs it there
	@PYTHON=$(BIN)/python benchmarks/gpu/wheels.sh

docs: $(STAMP)  ## the documentation's site, into site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "site/index.html"

docs-serve: $(STAMP)  ## the same at http://127.0.0.1:8000, while it is written
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve

lint: $(STAMP)  ## ruff and the layers of DESIGN.md
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/lint-imports --no-logo

format: $(STAMP)  ## let ruff mend what it can
	@$(BIN)/ruff check --fix --quiet .
	@$(BIN)/ruff format --quiet .

type: $(STAMP)  ## mypy
	@$(BIN)/mypy

clean:  ## remove .venv, caches and site/; runs/ stays
	rm -rf $(VENV) build site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
