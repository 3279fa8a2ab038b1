# make train      install into .venv and train on this machine        make test        every check, as CI runs it
# make quick      lint, types and the quickest tests, two minutes    make test-long   the full product of shapes and layouts, 45 minutes
# make clean      remove .venv, .venv-peers and caches, not runs/
# make model-matrix   which language models of Transformers are exact on two ranks; writes docs/models.md and plans.md, about an hour
# make test-gpu PYTHON=python3   kernels, two ranks and waits on a GPU; make bench-gpu PYTHON=python3   GEMM, copy, attention
# make bench    longspan beside DeepSpeed, ringmaster and yunchang, an hour on a quiet machine; writes docs/peers.md. ARGS="--only c"
#               for a part; make bench-full   the larger sizes
# make bench-million   real steps on one sequence of 1,048,576 tokens, two ranks, about ten minutes a step on a CPU with AVX-512
# make bench-hosts   bytes of a layer between hosts (network namespaces), counted by the kernel; writes docs/wire.md; Linux, root, iproute2
# make test-versions V=2.11.0   make test with another PyTorch, in an environment that is removed afterwards; prints a row of
#                               docs/versions.md. TRANSFORMERS=5.24.0 TESTS=tests/hf for another Transformers, and for a part
# make plan-here   the plan beside this machine: step time and memory of 15 layouts, half an hour; ARGS=--memory for memory alone
# make validate-planner CSV=FILE   the planner beside published measurements, and docs/planner.md from them
#
# PyTorch's default wheel brings CUDA (gigabytes). For the CPU alone:
#     make train TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
TORCH_INDEX_URL ?=
ARGS ?=
DEVICE ?= cuda

BIN := .venv/bin
PIP_INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt \
	$(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL))

CSV ?=

.PHONY: train lint quick test test-long test-versions model-matrix test-gpu bench bench-full bench-gpu bench-million bench-hosts validate-planner plan-here clean

train: .venv/installed
	$(BIN)/longspan train $(ARGS)

lint: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Integers, and one file of each kind that runs ranks: all-to-all, ring, collectives, agreement, mesh, ZeRO, gradients, batch, loss.
# Files, not folders: a new one joins make test by itself, and this list only if two minutes allow.
QUICK := tests/masks tests/planner tests/data/test_packing.py tests/test_loss.py tests/test_surface.py \
	$(patsubst %,tests/distributed/test_%.py,layout traffic collectives consensus mesh fsdp grad_sync) \
	$(patsubst %,tests/batch/test_%.py,shard context padding) tests/attention/test_ulysses.py tests/attention/test_ring.py

quick: lint
	$(BIN)/pytest -n 2 --dist worksteal -m "not long" $(QUICK)

test: lint
	$(BIN)/pytest -n 2 --dist worksteal -m "not long"

test-long: .venv/installed-dev
	$(BIN)/pytest -n 2 --dist worksteal -m "long or examples" --hypothesis-profile many $(ARGS)

test-versions:
	.ci/versions "$(V)" "$(TRANSFORMERS)" $(TESTS)

model-matrix: .venv/installed-dev
	$(BIN)/python benchmarks/model_matrix.py $(ARGS)
	$(BIN)/python benchmarks/plan_matrix.py $(ARGS)

# The image's Python, from a plain checkout: it needs torch, jaxtyping, numpy and pytest, and installs nothing. Never run on a GPU yet.
test-gpu:
	LONGSPAN_TEST_DEVICE=$(DEVICE) PYTHONPATH=src:. $(PYTHON) -m pytest -q -c /dev/null --rootdir . --confcutdir tests/gpu \
		-p no:cacheprovider -W ignore::pytest.PytestUnknownMarkWarning tests/gpu $(ARGS)

bench-gpu:
	PYTHONPATH=src $(PYTHON) benchmarks/gpu.py --device $(DEVICE) $(ARGS)

bench: .venv-peers/installed
	.venv-peers/bin/python -m benchmarks.peers $(ARGS)

bench-full: .venv-peers/installed
	.venv-peers/bin/python -m benchmarks.peers --full $(ARGS)

bench-million: .venv/installed
	$(BIN)/python benchmarks/million.py $(ARGS)

bench-hosts: .venv/installed-dev
	PYTHONPATH=. $(BIN)/python -m benchmarks.hosts traffic --write

plan-here: .venv/installed
	$(BIN)/python benchmarks/plan_here.py $(ARGS)

validate-planner: .venv/installed-dev
	@test -n '$(CSV)' || { echo 'name the published measurements: make validate-planner CSV=FILE (columns: docs/planner.md)' >&2; exit 2; }
	$(BIN)/python benchmarks/validate_planner.py $(CSV) --write docs/planner.md $(ARGS)

clean:
	rm -rf .venv .venv-peers .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

.venv-peers/installed: benchmarks/peers/requirements.txt benchmarks/peers/install.sh
	@echo 'Installing the libraries to compare with into .venv-peers (the first time only) ...'
	benchmarks/peers/install.sh $(PYTHON) $(TORCH_INDEX_URL)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'longspan needs Python 3.11 or newer; name one: make PYTHON=python3.12 ...' >&2; exit 2; }
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo 'Installing into .venv (the first time only; PyTorch is large) ...'
	$(PIP_INSTALL) -e .
	@touch $@

.venv/installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo 'Installing into .venv with what the tests need (the first time only) ...'
	$(PIP_INSTALL) -e '.[dev]'
	@touch .venv/installed $@
