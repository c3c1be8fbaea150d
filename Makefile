# Everything from a fresh clone: `make help` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
WORK_DIR ?= work_dirs/demo
PYTEST_ARGS ?=
# Files of tests that run side by side, each with one thread
WORKERS ?= 2
# The longest first, so that no worker is left alone with one of them
LONG := tests/test_tools tests/test_detectors tests/test_kinds.py tests/test_benchmarks.py
TESTS := $(LONG) $(filter-out $(LONG),$(wildcard tests/test_*))

BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip
# -qq: errors alone. Most files of torch are never imported: no need to compile them all
INSTALL := $(PIP) install -qq --no-compile
CACHE := $${MMBRECQ_CACHE:-$$HOME/.cache/mmbrecq}
MMCV := $(shell sed -n 's/^mmcv==//p' requirements/constraints.txt)

# Stamps: an environment that is up to date costs nothing
PACKAGES := $(VENV)/.packages
LITE := $(VENV)/.mmcv-lite
FULL := $(VENV)/.mmcv-full

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
# INSTALL leaves it to the first import to compile a file: without the result every tool needs 10 s more to start
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo demo-detection test lint env env-full clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: env  ## Quantize a small ResNet to 2-bit weights and 4-bit activations (no compiler needed)
	@$(BIN)/python tools/ptq.py configs/demo/resnet_digits_w2a4.py --work-dir $(WORK_DIR)

demo-detection: env-full  ## Quantize a small RetinaNet and a small Faster R-CNN, heads included (builds mmcv the first time)
	@$(BIN)/python tools/make_digit_scenes.py --out work_dirs/digit_scenes
	@for name in retinanet_scenes_w4a8 retinanet_scenes_w2a8 faster_rcnn_scenes_w4a8 faster_rcnn_scenes_w2a8; do \
		$(BIN)/python tools/ptq.py configs/demo/$$name.py --work-dir work_dirs/demo-detection/$$name; \
	done

test: env-full  ## Run the tests (the first time builds mmcv with its ops, about 15 minutes)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS) $(TESTS)

lint: env  ## Check the code with ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/mypy

env: $(LITE)  ## Set up .venv with mmcv-lite, or keep the full mmcv that is there

env-full: $(FULL)  ## Set up .venv with the full mmcv

$(PACKAGES): $(wildcard requirements/*.txt) setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"expected Python >= 3.11, but $(PYTHON) is {sys.version.split()[0]}: make PYTHON=python3.11")'
	@echo "Installing the pinned packages into $(VENV): about two minutes"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(INSTALL) -r requirements/env.txt
	@$(INSTALL) --no-deps --no-build-isolation -e .
	@touch $@

$(LITE): $(PACKAGES)
	@$(PIP) show -q mmcv 2>/dev/null || $(INSTALL) -c requirements/constraints.txt mmcv-lite
	@touch $@

# mmcv and mmcv-lite fill the same folder: only one may be installed
$(FULL): $(PACKAGES)
	@wheels="$(CACHE)/wheels/$$($(BIN)/python -c 'import sys; from importlib.metadata import version; print("py%d%d-torch%s" % (*sys.version_info[:2], version("torch").split("+")[0]))')"; \
	PATH="$(BIN):$$PATH" tools/build_mmcv.sh "$(MMCV)" "$$wheels"; \
	rm -f $(LITE); \
	$(PIP) uninstall -q -y mmcv-lite 2>/dev/null; \
	$(INSTALL) --no-index --no-deps --force-reinstall "$$wheels"/mmcv-$(MMCV)-*.whl
	@touch $(LITE) $@

clean:  ## Remove the environment and the caches in the checkout; results stay
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache mmbrecq/.mim
	find mmbrecq tools tests configs benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
