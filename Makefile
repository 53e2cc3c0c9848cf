# Each target makes .venv if it is missing, and installs the pinned versions into it when they have changed.
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PACKAGING := setup.cfg pyproject.toml fedtower/__init__.py requirements/fbgemm-gpu-cpu-shim/pyproject.toml
# One more than the cores it is meant for: many tests wait for a server or a child.
WORKERS ?= 3

.PHONY: help run test soak format protos bench
.DEFAULT_GOAL := help

help:  ## say what there is
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

run: .venv/.ready-to-run  ## set up and train a federated two-tower recommender on synthetic data
	@$(BIN)/fedtower run dssm-synthetic

test: .venv/.ready-to-test  ## format, lint, types, import arrows, doctests, tests and conformance
	$(call stage,format,$(BIN)/ruff format --check --quiet .)
	$(call stage,lint,$(BIN)/ruff check --quiet .)
	$(call stage,types,$(BIN)/mypy)
	$(call stage,import arrows,$(BIN)/lint-imports --no-cache)
	$(call stage,tests,$(BIN)/python -m pytest -q -rfEs -n $(WORKERS) --dist worksteal)

soak: .venv/.ready-to-test  ## the sizes that are too long for `make test`
	$(call stage,soak,$(BIN)/python -m pytest -q -rfEs -m soak)

format: .venv/.ready-to-test  ## write the code the way `make test` wants it
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

# Through fedtower/, so that what is written imports fedtower.protos; a test compares what is committed with this.
PROTOS := fedtower/protos/v1/federation.proto
PROTOS_OUT := .

protos: .venv/.ready-to-test  ## write protos/*/*_pb2* from the .proto files
	@$(BIN)/python -m grpc_tools.protoc --proto_path=. --python_out=$(PROTOS_OUT) --grpc_python_out=$(PROTOS_OUT) \
		--plugin=$(BIN)/protoc-gen-mypy --mypy_out=quiet:$(PROTOS_OUT) \
		--plugin=$(BIN)/protoc-gen-mypy_grpc --mypy_grpc_out=quiet:$(PROTOS_OUT) $(PROTOS)

bench: .venv/.ready-to-run  ## run every program of benchmarks/; each prints a table and writes JSON
	@set -e; for program in $(wildcard benchmarks/*.py); do echo "== $$program"; $(BIN)/python "$$program"; done

define stage
@echo "== $(1)"; $(2) || { code=$$?; echo "make $@: stage '$(1)' failed (exit $$code); stages after it did not run"; exit $$code; }
endef

.venv/bin/python:
	@[ -n "$(PYTHON)" ] || { echo "no python3.11 found: install it, or say make PYTHON=/path/to/python3.11 ..."; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is not there, or is older than Python 3.11: say make PYTHON=/path/to/python3.11 ..."; exit 1; }
	@echo "== making .venv with $(PYTHON)"
	@"$(PYTHON)" -m venv .venv || { rm -rf .venv; echo "$(PYTHON) cannot make an environment: is its venv package there?"; exit 1; }

# The package goes in without its dependencies: every one of them is pinned, and `pip check` sees that none is missing.
.venv/.ready-to-run: requirements/cpu.txt $(PACKAGING) | .venv/bin/python
	@echo "== installing the pinned versions (a minute or two the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/cpu.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

.venv/.ready-to-test: requirements/test.txt .venv/.ready-to-run
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/test.txt
	@$(BIN)/python -m pip check
	@touch $@
