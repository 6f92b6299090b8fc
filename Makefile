# Two commands: `make results` regenerates every table, figure and the report; `make test` runs the tests. Both set everything up first.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
DATA ?= auto
NOTEBOOKS ?=

.PHONY: results test setup lab sync publish clean
results: setup
	$(BIN)/python -m quantlab run $(NOTEBOOKS) --data "$(DATA)"

test: setup
	$(BIN)/python -m pytest

lab: setup  ## open the workbook in JupyterLab
	$(BIN)/jupyter lab notebooks

sync: setup  ## bring .ipynb, .py and badges into step, without outputs
	$(BIN)/python -m quantlab sync

setup: .venv/ready

.venv/ready: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; name one with: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

clean:  ## remove what was generated here, keep what is committed
	rm -rf .venv results/runs results/report.html results/results.csv data/cache
