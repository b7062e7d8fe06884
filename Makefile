# The only commands to remember. Each one sets up what it needs.
PYTHON ?= python3
# An environment for each version of Python, so that another PYTHON= is really another one.
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
VENV    ?= .venv-$(VERSION)
BIN     := $(VENV)/bin
LOWEST  := $(VENV)-lowest/bin

# XLA on CPU takes new memory for temporaries in every step, which huge pages make cheaper
# (benchmarks/README.md). Linux with glibc heeds this, others ignore it.
HUGE_PAGES := GLIBC_TUNABLES=glibc.malloc.hugetlb=1

# Compiling is most of the tests' time; these flags halve it, where the installed XLA has them.
# `make test-lowest` compiles as users do.
TEST_FLAGS = XLA_FLAGS="$(XLA_FLAGS) $$($(BIN)/python tests/support/xla_flags.py)"

.PHONY: demo evidence test test-fast test-lowest test-clients lint bench docs clean

$(VENV)/.installed-%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@

demo: $(VENV)/.installed-demo
	$(HUGE_PAGES) $(BIN)/python -m examples.demo --out demo_results

test: $(VENV)/.installed-test
	$(TEST_FLAGS) $(BIN)/python -m pytest -n 2 --dist worksteal

# What a contributor wants to know first: the modules one by one, without whole programs.
test-fast: $(VENV)/.installed-test
	$(TEST_FLAGS) $(BIN)/python -m pytest -n 2 --dist worksteal tests/layers tests/anchors tests/core

# The oldest versions that pyproject.toml declares, in an environment of their own.
test-lowest:
	test -x $(LOWEST)/python || $(PYTHON) -m venv $(VENV)-lowest
	$(LOWEST)/python -m pip install --quiet uv
	$(LOWEST)/uv pip install --quiet --python $(LOWEST)/python --resolution lowest-direct --editable '.[test]'
	$(LOWEST)/python -m pytest -n 2 --dist worksteal

# The examples inside other people's trainers, which want a newer Python than ours.
CLIENTS := .venv-clients
CLIENTS_PYTHON ?= python3.13
test-clients:
	test -x $(CLIENTS)/bin/python || $(CLIENTS_PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet uv
	$(CLIENTS)/bin/uv pip install --quiet --python $(CLIENTS)/bin/python --editable '.[clients]'
	$(CLIENTS)/bin/python -m pytest -W default -s tests/compat/test_examples.py

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The short form of docs/evidence.md, beside what is recorded there.
evidence: $(VENV)/.installed-demo
	$(HUGE_PAGES) $(BIN)/python -m benchmarks.robustness --quick

bench: $(VENV)/.installed-test
	$(BIN)/python -m benchmarks.step_time

docs: $(VENV)/.installed-docs
	$(BIN)/sphinx-build -W -b html docs docs/_build/html

clean:
	rm -rf .venv-* docs/_build demo_results evidence_results
