# make demo   a virtual environment, the motion data, three small networks trained and tested, one table
# make test   the tests;  make test-slow   those of minutes;  make lint   ruff and mypy
# make test-slurm   those that need a SLURM: starts one here, and stops it (root; tests/slurm/cluster.sh check)
# make torture RUNS=200   interrupts training anywhere, resumes it, and compares everything with an undisturbed run
# make gpu    the GPU suite (docs/gpu.md): by PYTHON if it has torch, so without an installation, else by the environment
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO := c2d_tiny i3d_tiny oct_i3d_tiny
RUNS ?= 200

.PHONY: demo gpu test test-slow test-slurm torture lint format install clean

install: $(VENV)/installed

# torch goes first, by its pinned version alone: an unpinned torch may bring gigabytes of CUDA packages.
$(VENV)/installed: constraints.txt tests/peers.txt pyproject.toml setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,onnxruntime,openvino]'
	$(BIN)/python -m pip install --quiet --no-deps --requirement tests/peers.txt
	touch $@

demo: install
	$(BIN)/python datasets/motion.py --out data/motion
	for net in $(DEMO); do \
	  $(BIN)/python tools/run_net.py --cfg configs/motion/$$net.yaml TRAIN.RESUME auto || exit 1; \
	done
	$(BIN)/python tools/results.py $(addprefix runs/motion/,$(DEMO))

test: install
	$(BIN)/python -m pytest

test-slow: install
	$(BIN)/python -m pytest -m slow

test-slurm: install
	OMP_NUM_THREADS=1 tests/slurm/cluster.sh run $(BIN)/python -m pytest -n 0 tests/slurm

torture: install
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.torture --runs $(RUNS)

gpu:
	if $(PYTHON) -c 'import torch' 2>/dev/null; then python=$(PYTHON); \
	else $(MAKE) install && python=$(BIN)/python; fi && \
	PYTHONPATH="$(CURDIR):$$PYTHONPATH" $$python tools/benchmark.py gpu

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
