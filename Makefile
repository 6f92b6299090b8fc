# Two commands: `make results` regenerates every table, figure and the report; `make test` runs the
# linters and the tests. Both set everything up first.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
DATA ?= auto
MODEL ?=
WIDTHS ?=
NOTEBOOKS ?=
WORKERS ?=
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: results rivals test test-long lint lab sync setup clean
results: setup  ## of one network on one data set: make results MODEL=resnet50 DATA=PATH
	$(BIN)/python -m quantlab run $(NOTEBOOKS) --data "$(DATA)" $(if $(MODEL),-p model $(MODEL)) $(if $(WORKERS),--workers $(WORKERS))

rivals: setup .venv-rivals/ready  ## other tools beside ours: make rivals MODEL=resnet20 DATA=PATH WIDTHS=4/4,3/3
	$(BIN)/python -m quantlab rivals --data "$(DATA)" $(if $(MODEL),--model $(MODEL)) $(if $(WIDTHS),--widths $(WIDTHS))

test: lint  ## at most ten minutes on two quiet cores
	$(BIN)/python -m pytest

test-long: lint  ## with 20 times as many drawn examples, what takes long, and Chromium where there is one
	$(BIN)/python -m pytest --hypothesis-profile=long

lint: setup
	$(BIN)/ruff check quantlab tests notebooks
	$(BIN)/lint-imports

lab: setup  ## open the workbook in JupyterLab
	$(BIN)/jupyter lab notebooks

sync: setup  ## bring .ipynb, .py and badges into step, without outputs
	$(BIN)/python -m quantlab sync

setup: .venv/ready

# pip compiles one file after the other, also the tests that packages bring; here all cores do it.
.venv/ready: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; name one with: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(PIP) --no-compile -r requirements.txt
	$(PIP) --no-deps -e .
	$(BIN)/python -m compileall -q -j 0 -x '/tests?/' .venv/lib >/dev/null || true  # templates fail
	touch $@

# Brevitas has an environment of its own: nothing of it is in the workbook's.
.venv-rivals/ready: requirements-rivals.txt
	$(PYTHON) -m venv .venv-rivals
	.venv-rivals/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-rivals.txt
	touch $@

clean:  ## remove what was generated here, keep what is committed
	rm -rf .venv .venv-rivals results/runs results/report.html results/results.csv data/cache
