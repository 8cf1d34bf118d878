# Two commands do all the set-up: `make demo` and `make test`. Both create .venv themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help demo test lint types imports unit test-frameworks kinds test-cuda soak mutants bench bench-proof bench-engine bench-ledger data docs clean

help:            ## this list
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: $(STAMP)   ## diagnose, tune and run two example scripts on real data
	PATH="$(CURDIR)/$(BIN):$$PATH" bash scripts/demo.sh

test: $(STAMP) lint types imports unit   ## linters, strict types, import rules, tests

lint: $(STAMP)   ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## mypy --strict
	$(BIN)/mypy

imports: $(STAMP) ## which layer may import which
	$(BIN)/lint-imports

unit: $(STAMP)   ## the tests
	$(BIN)/pytest -n 2 --dist worksteal

test-frameworks: $(STAMP)  ## Lightning, Trainer and Accelerate (installs them)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[frameworks]'
	$(BIN)/pytest tests/e2e/test_frameworks.py

kinds: $(STAMP)  ## every common kind of script, end to end (installs the frameworks; about ten minutes)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[frameworks]'
	$(BIN)/pytest -m kinds tests/e2e/test_kinds.py tests/e2e/test_resume.py

test-cuda: $(STAMP)  ## tests that need a CUDA device
	$(BIN)/pytest -m cuda

soak: $(STAMP)   ## long simulations of the statistics, a search by whole runs, faults at scale
	$(BIN)/python benchmarks/proof_simulation.py
	HYPOTHESIS_PROFILE=anew $(BIN)/pytest -m extra
	HYPOTHESIS_PROFILE=anew $(BIN)/pytest -n 2 tests/records tests/measure tests/diagnose tests/report tests/hardware tests/advise
	$(BIN)/python benchmarks/engine/crash_states.py --all
	$(BIN)/python benchmarks/engine/kills.py --kills 3000

mutants: $(STAMP) ## remove guards one by one; the tests must notice
	$(BIN)/python scripts/mutants.py

bench: $(STAMP)  ## measure the figures of benchmarks/RESULTS.md (long)
	$(BIN)/python benchmarks/bench.py

bench-proof: $(STAMP)  ## how often the proof is wrong, on trials whose truth is known (about an hour)
	$(BIN)/python benchmarks/bench_proof.py

bench-engine: $(STAMP)  ## the engine of jobs: a step against other frameworks, stalls of saving, goodput under kills (two hours)
	$(BIN)/python benchmarks/engine/overhead.py
	$(BIN)/python benchmarks/engine/overhead.py --tiny
	$(BIN)/python benchmarks/engine/stall.py
	$(BIN)/python benchmarks/engine/goodput.py

bench-ledger: $(STAMP)  ## what recording costs, how good estimates are, how long a long run's report takes
	$(BIN)/python benchmarks/ledger/overhead.py
	$(BIN)/python benchmarks/ledger/memory.py
	$(BIN)/python benchmarks/ledger/steptime.py
	$(BIN)/python benchmarks/ledger/long_run.py

data: $(STAMP)   ## fetch the real data sets some examples use
	$(BIN)/python examples/get_data.py all

docs: $(STAMP)   ## the documentation as a site, in site/ (installs its generator)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[docs]'
	$(BIN)/python scripts/site_pages.py build/site-pages
	$(BIN)/zensical build --strict --clean

clean:           ## remove what tests and runs left
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .cache .upshift build site src/*.egg-info
