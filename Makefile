# `make help` lists what there is. A second run does nothing that is done.
STACK  ?= openmmlab
PYTHON ?= python3
VENV   ?= $(if $(filter onedl,$(STACK)),.venv-onedl,.venv)
JOBS   ?= $(shell nproc)
TORCH  ?=
QUICK  ?=
TESTS  ?=

ifeq ($(filter $(STACK),openmmlab onedl),)
$(error STACK=$(STACK) is not known: say STACK=openmmlab (the default) or STACK=onedl)
endif

BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed-$(STACK)

.PHONY: always help install demo demo-all test lint docs clean

help:
	@echo 'make install    set up $(VENV): PyTorch, mmcv with its compiled ops, mmdet, mmseg, pvt_mm'
	@echo 'make demo       train and evaluate a detector on generated data; report in work_dirs/demo'
	@echo 'make demo-all   the same for detection, instance and semantic segmentation'
	@echo 'make test       run the tests'
	@echo 'make lint       run ruff, mypy and the rules of imports'
	@echo 'make docs       build the documentation as a site that reads offline: site/index.html'
	@echo 'make clean      remove caches, build products and what the demo wrote; the venv stays'
	@echo
	@echo 'Variables: STACK=openmmlab|onedl  PYTHON=$(PYTHON)  VENV=$(VENV) (yours, and its PyTorch, are kept)'
	@echo '           TORCH=2.14.1 (another PyTorch)  JOBS=$(JOBS)  QUICK=1 (demo)'
	@echo '           TESTS="tests/tools/test_tools.py ..." (test; all by default)'

install: $(STAMP)

# Where a PyTorch or CUDA is asked for, install.sh looks whether it is there.
$(STAMP): tools/install.sh tools/build_mmcv.py setup.py pyproject.toml $(wildcard requirements/*.txt) \
    $(if $(TORCH)$(filter 1,$(FORCE_CUDA)),always)
	@STACK='$(STACK)' PYTHON='$(PYTHON)' VENV='$(VENV)' JOBS='$(JOBS)' TORCH='$(TORCH)' bash tools/install.sh
	@touch '$@'

demo: install
	$(BIN)/python tools/demo/demo.py --task det $(if $(QUICK),--quick)

demo-all: install
	$(BIN)/python tools/demo/demo.py --task all $(if $(QUICK),--quick)

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile $(TESTS)

# Demo and benchmark scripts import their neighbours by name.
lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check pvt_mm tests tools setup.py
	MYPYPATH=tools/demo:tools/benchmark $(BIN)/mypy pvt_mm setup.py tools/*.py tools/*/*.py tests/stress/*.py
	$(BIN)/lint-imports --no-cache

# Without the variable, Material prints that it will be succeeded by another tool.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis data/demo work_dirs/demo
	find configs pvt_mm tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
