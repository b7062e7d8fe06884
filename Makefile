# The only commands to remember. Each one sets up what it needs.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

# XLA on CPU takes new memory for temporaries in every step; huge pages make that cheaper
# (benchmarks/README.md). Linux with glibc heeds this, others pass it over.
HUGE_PAGES := GLIBC_TUNABLES=glibc.malloc.hugetlb=1

# Compiling is most of the tests' time. XLA's older CPU code generator without LLVM's optimizations
# halves it; `make test-lowest` compiles as users do. The scheduler that orders for concurrency is off
# because with it programs of several virtual devices now and then stall for 10 to 60 s; without it
# none of 29,000 runs did.
TEST_FLAGS := XLA_FLAGS="$(XLA_FLAGS) --xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=0 --xla_cpu_enable_concurrency_optimized_scheduler=false"

.PHONY: demo test test-lowest lint bench docs clean

$(VENV)/.installed-%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@

demo: $(VENV)/.installed-demo
	$(HUGE_PAGES) $(BIN)/python -m examples.demo --out demo_results

test: $(VENV)/.installed-test
	$(TEST_FLAGS) $(BIN)/python -m pytest -n 2 --dist worksteal

# The oldest versions that pyproject.toml declares, in an environment of their own.
test-lowest:
	test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet uv
	.venv-lowest/bin/uv pip install --quiet --python .venv-lowest/bin/python --resolution lowest-direct --editable '.[test]'
	.venv-lowest/bin/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed-test
	$(BIN)/python -m benchmarks.step_time

docs: $(VENV)/.installed-docs
	$(BIN)/sphinx-build -W -b html docs docs/_build/html

clean:
	rm -rf $(VENV) .venv-lowest docs/_build demo_results
