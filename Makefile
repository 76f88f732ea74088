# Every target builds what it needs in .venv; run again, a target whose inputs have not changed costs nothing.
PYTHON3 ?= python3
VENV    := .venv
BIN     := $(VENV)/bin
# Compiled once here, instead of by every process where Python is told not to write bytecode.
UV      := tools/uv pip install --compile-bytecode --python $(BIN)/python
MEMBERS := $(sort $(wildcard adapters/[a-z]*/pyproject.toml contrib/[a-z]*/pyproject.toml))
PINS    := constraints.txt pyproject.toml $(MEMBERS)
UV_PIN  := $(shell grep '^uv==' constraints.txt 2>/dev/null || echo uv)
EDITABLE := -e . $(patsubst %/pyproject.toml,-e %,$(MEMBERS))
RUNTIME := $(VENV)/.runtime
DEV     := $(VENV)/.dev

# verl and the CPU build of vLLM, whose pins clash with those of other trainers.
VERL       := .venv-verl
VERL_UV    := tools/uv pip install --compile-bytecode --python $(VERL)/bin/python
VERL_PINS  := adapters/verl/constraints.txt
VERL_READY := $(VERL)/.ready

# OpenRLHF and the CPU build of its vLLM.
OPENRLHF       := .venv-openrlhf
OPENRLHF_UV    := tools/uv pip install --compile-bytecode --python $(OPENRLHF)/bin/python
OPENRLHF_PINS  := adapters/openrlhf/constraints.txt
OPENRLHF_READY := $(OPENRLHF)/.ready

# Tests run in two processes, so one thread each.
WORKERS ?= 2
PYTEST  := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 $(BIN)/python -m pytest
VERL_PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 $(VERL)/bin/python -m pytest adapters/verl
OPENRLHF_PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 $(OPENRLHF)/bin/python -m pytest adapters/openrlhf
CLAIMS  := $(filter-out %/claims.py, $(sort $(wildcard examples/claims/*.py)))

.PHONY: help setup demo test test-long claims benchmark lint format docs dist constraints constraints-verl clean test-verl test-verl-long setup-verl constraints-openrlhf \
        test-openrlhf test-openrlhf-long setup-openrlhf

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14

setup: $(RUNTIME) $(DEV)  ## build .venv with everything, test tools included

demo: $(RUNTIME)  ## an ablation of real methods on a small arithmetic task, with a report
	$(BIN)/python -m rlplugins_local.arithmetic runs/arithmetic
	$(BIN)/rlplugins ablate examples/arithmetic/study.yaml

test: $(DEV)  ## the test suite (ARGS="-k knapsack" for a part of it)
	$(PYTEST) -n $(WORKERS) --dist worksteal -m "not long" $(ARGS)
	$(MAKE) test-verl
	$(MAKE) test-openrlhf

test-long: $(DEV)  ## the tests that take minutes each
	$(PYTEST) -m long --timeout 3600 $(ARGS)
	$(MAKE) test-verl-long
	$(MAKE) test-openrlhf-long

setup-verl: $(VERL_READY)  ## build .venv-verl: verl, vLLM for the CPU, and everything of this repository

test-verl: $(VERL_READY)  ## the tests that run verl itself; part of `make test`
	$(VERL_PYTEST) -n 0 -m "not long" --timeout 1800 $(ARGS) || [ $$? -eq 5 ] # 5: ARGS selects none of them

test-verl-long: $(VERL_READY)  ## those of them that take minutes each; part of `make test-long`
	$(VERL_PYTEST) -n 0 -m long --timeout 3600 $(ARGS) || [ $$? -eq 5 ]

setup-openrlhf: $(OPENRLHF_READY)  ## build .venv-openrlhf: OpenRLHF, vLLM for the CPU, and everything of this repository

test-openrlhf: $(OPENRLHF_READY)  ## the tests that run OpenRLHF itself; part of `make test`
	$(OPENRLHF_PYTEST) -n 0 -m "not long" --timeout 1800 $(ARGS) || [ $$? -eq 5 ] # 5: ARGS selects none of them

test-openrlhf-long: $(OPENRLHF_READY)  ## those of them that take minutes each; part of `make test-long`
	$(OPENRLHF_PYTEST) -n 0 -m long --timeout 3600 $(ARGS) || [ $$? -eq 5 ]

claims: $(RUNTIME)  ## the published claims, measured at CPU size
	@set -e; for script in $(CLAIMS); do $(BIN)/python $$script; done
	$(BIN)/python tools/generate.py

benchmark: $(DEV)  ## measure, and rewrite the table of docs/performance.md
	$(BIN)/python -m pytest benchmarks --benchmark-enable --benchmark-only $(ARGS)

lint: $(DEV)  ## ruff, mypy, and whether what is generated is fresh
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/generate.py --check

format: $(DEV)  ## fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(DEV)  ## rewrite what is generated: extras, versions, the plugin gallery
	$(BIN)/python tools/generate.py

dist: $(RUNTIME)  ## wheels of the core, the adapters and the contrib plugins
	rm -rf dist
	tools/wheels dist

constraints: $(DEV)  ## pin, in constraints.txt, what is installed in .venv now
	{ echo "# Written by \`make constraints\`: names and versions, no addresses."; \
	  tools/uv pip freeze --python $(BIN)/python --exclude-editable | sed -e '/^pip==/d' -e 's/+[a-z0-9.]*$$//'; } > constraints.new
	mv constraints.new constraints.txt

constraints-verl: $(VERL_READY)  ## pin, in adapters/verl/constraints.txt, what is installed in .venv-verl now
	{ echo "# Written by \`make constraints-verl\`: names and versions, no addresses. Installed without resolving: torchvision,"; \
	  echo "# torchaudio and torchcodec, which packages ask for, come as CUDA builds that transformers fails to import."; \
	  tools/uv pip freeze --python $(VERL)/bin/python --exclude-editable | sed -e '/^pip==/d' -e 's/+[a-z0-9.]*$$//'; } > constraints.new
	mv constraints.new $(VERL_PINS)

constraints-openrlhf: $(OPENRLHF_READY)  ## pin, in adapters/openrlhf/constraints.txt, what is installed in .venv-openrlhf now
	{ echo "# Written by \`make constraints-openrlhf\`: names and versions, no addresses. Installed without resolving: flash-attn builds for"; \
	  echo "# CUDA only; torchvision, torchaudio and torchcodec come as CUDA builds that transformers fails to import."; \
	  tools/uv pip freeze --python $(OPENRLHF)/bin/python --exclude-editable | sed -e '/^pip==/d' -e 's/+[a-z0-9.]*$$//'; } > constraints.new
	mv constraints.new $(OPENRLHF_PINS)

clean:  ## remove what the targets above have made
	rm -rf $(VENV) $(VERL) $(OPENRLHF) dist build runs .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks
	find . -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.uv: constraints.txt
	$(PYTHON3) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(UV_PIN)
	touch $@

$(RUNTIME): $(VENV)/.uv $(PINS)
	$(UV) -c constraints.txt $(EDITABLE)
	touch $@

$(DEV): $(RUNTIME)
	$(UV) -c constraints.txt --group dev
	$(UV) -c constraints.txt --no-deps --group verl
	touch $@

$(VERL)/.packages: $(VENV)/.uv $(VERL_PINS)
	test -x $(VERL)/bin/python || $(BIN)/uv venv --quiet --python $(PYTHON3) $(VERL)
	$(VERL_UV) --no-deps -r $(VERL_PINS)
	touch $@

$(VERL_READY): $(VERL)/.packages pyproject.toml $(MEMBERS)
	$(VERL_UV) --no-deps $(EDITABLE)
	touch $@

$(OPENRLHF)/.packages: $(VENV)/.uv $(OPENRLHF_PINS)
	test -x $(OPENRLHF)/bin/python || $(BIN)/uv venv --quiet --python $(PYTHON3) $(OPENRLHF)
	$(OPENRLHF_UV) --no-deps -r $(OPENRLHF_PINS)
	touch $@

$(OPENRLHF_READY): $(OPENRLHF)/.packages pyproject.toml $(MEMBERS)
	$(OPENRLHF_UV) --no-deps $(EDITABLE)
	touch $@
