# The front door: `make repro` and `make test` set everything up themselves, on any machine with Python 3.11 or newer.

VENV := .venv
STAMP := $(VENV)/.installed
ANOMALIB := .venv-anomalib
ANOMALIB_VERSION := 2.7.0
# The first Python that really runs and is new enough (a pyenv shim may exist and yet not run). Override: make PYTHON=...
PYTHON ?= $(shell for p in python3.11 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
ARGS ?=
# What `make repro` looks at first, since DVC deletes a stage's outputs before the stage can refuse: the categories of
# the targets in ARGS (stage@category), else all.
CHECKED = $(sort $(foreach target,$(ARGS),$(if $(findstring @,$(target)),$(lastword $(subst @, ,$(target))))))

export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: help install repro quick up down nightly test test-all stack-test lint types fmt ui bench-synthesis bench-anomalib bench-gpu bench-serve bench-latency clean
.NOTPARALLEL:
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' Makefile

repro: install ## run the pipeline (what is up to date is skipped); ARGS='distill@brushed_metal' for a part of it
	flawsmith check $(CHECKED)
	dvc repro $(ARGS)
	@flawsmith result

quick: install ## a first look at the demo's images in minutes: no training; ARGS='FOLDER --out DIR' for your own
	@[ -n "$(ARGS)" ] || [ -d data/brushed_metal/train ] || flawsmith demo-data --surface brushed_metal
	flawsmith quick $(if $(ARGS),$(ARGS),data/brushed_metal)

up: install ## Prefect, MLflow and a worker on this machine; ARGS='--workers 2 --checkout . --checkout ../second' for two
	python -m flows.stack up $(ARGS)

down: install ## stop just those; their data stay in .stack/
	python -m flows.stack down $(ARGS)

nightly: install ## retrain every category now, on the stack's workers, and follow it
	@[ -f .stack/env ] || { echo "No stack runs here; start it first: make up" >&2; exit 2; }; \
	set -a; . ./.stack/env; set +a; python -m flows.nightly $(ARGS)

test: install ## lint, types and the tests, on all cores; ARGS='-k settings' for some
	pytest --numprocesses logical --maxprocesses 4 --dist worksteal $(ARGS)

test-all: install ## the slow tests too (nightly), with 200 examples a property
	HYPOTHESIS_PROFILE=thorough pytest -m 'not stack' --numprocesses logical --maxprocesses 4 --dist worksteal $(ARGS)

stack-test: install ## the tests that need real servers and workers, two files at a time, each side with a stack of its own
	pytest -m stack tests/stack --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: install ## ruff (rules and formatting), and the size budget
	ruff check .
	ruff format --check .
	python .ci/budget.py

types: install ## mypy, strict
	mypy

fmt: install ## let ruff fix and format
	ruff check --fix .
	ruff format .

ui: install ## MLflow's pages on http://127.0.0.1:5000, over the local store
	DO_NOT_TRACK=1 mlflow ui --backend-store-uri $${MLFLOW_TRACKING_URI:-sqlite:///mlflow.db} --host 127.0.0.1 --port 5000

bench-synthesis: install ## triplets a second, training speed over matmul speed; ARGS='--category C --data DIR'
	python -m flawsmith_lab.bench.synthesis $(ARGS)

bench-gpu: install ## one category from normals to ONNX on one GPU, preset docs/gpu-params.yaml; ARGS='--category C --data DIR'
	python -m flawsmith_lab.bench.gpu $(ARGS)

bench-serve: install ## 30 clients on the web service for a minute; ARGS='MODEL IMAGE...'
	python -m flawsmith_lab.bench.serve $(ARGS)

bench-anomalib: install $(ANOMALIB)/.installed ## anomalib's PatchCore and STFPM beside ours; ARGS='--category C --data DIR'
	python -m flawsmith_lab.bench.anomalib_side --python $(ANOMALIB)/bin/python $(ARGS)

# Without anomalib its environment is not needed either.
bench-latency: install $(if $(findstring --without-anomalib,$(ARGS)),,$(ANOMALIB)/.installed) ## ONNX latency beside anomalib's EfficientAD and PatchCore; ARGS='--model FILE'
	python -m flawsmith_lab.bench.latency --python $(ANOMALIB)/bin/python $(ARGS)

# An environment of its own, with the same pins wherever both need a package: the same torch is compared.
$(ANOMALIB)/.installed: constraints.txt
	rm -rf $(ANOMALIB)
	$(VENV)/bin/python -m venv $(ANOMALIB)
	@echo "Installing anomalib $(ANOMALIB_VERSION) into $(ANOMALIB): some 6 GB, a few minutes."
	$(ANOMALIB)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		anomalib==$(ANOMALIB_VERSION) torch torchvision timm safetensors onnx onnxruntime onnxscript
	@$(ANOMALIB)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt openvino || \
		echo "openvino does not install here; bench-latency leaves its rows out." >&2
	touch $@

clean: ## remove the environments and the tools' caches (data, artifacts and runs stay)
	rm -rf $(VENV) $(ANOMALIB) .mypy_cache .ruff_cache .pytest_cache .hypothesis src/*.egg-info dvc_plots

# The stamp holds what was installed (place, pyproject.toml, constraints.txt) and is written last. No stamp: an install
# never finished, and what a killed pip leaves cannot be trusted, so the environment is made anew.
install: ## set up .venv with the pinned versions (the other targets do it by themselves)
	@set -e; python="$(PYTHON)"; \
	wanted() { echo $(CURDIR); cat pyproject.toml constraints.txt; }; \
	if [ -x $(VENV)/bin/python ] && wanted | cmp -s - $(STAMP); then exit 0; fi; \
	if ! { [ -f $(STAMP) ] && [ "$$(head -n 1 $(STAMP))" = "$(CURDIR)" ] && $(VENV)/bin/python -m pip --version; } >/dev/null 2>&1; then \
		[ -n "$$python" ] && $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
			echo "flawsmith needs Python 3.11 or newer; install it, or name it: make PYTHON=/path/to/python3.11" >&2; exit 2; }; \
		rm -rf $(VENV); \
		$$python -m venv $(VENV) || { \
			echo "$$python cannot make a virtual environment; install its venv module (Debian: python3-venv)." >&2; exit 2; }; \
	fi; \
	rm -f $(STAMP); \
	echo "Installing the pinned versions into $(VENV): some 6 GB, a few minutes the first time."; \
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,pipeline,serve,video,mqtt,dev]'; \
	wanted > $(STAMP).tmp; mv $(STAMP).tmp $(STAMP)
