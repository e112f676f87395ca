# Two commands for a newcomer: `make demo`, `make test`. Python 3.11 or newer is all they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# torch first and by its exact version: other spellings may pull a build with several gigabytes of CUDA.
TORCH := $(shell sed -n 's/^\(torch==.*\)/\1/p' constraints.txt)

.PHONY: demo test check lint types architecture unit wheel sweep clean

demo: $(VENV)/installed
	$(BIN)/kirsch compress

test check: lint types architecture unit wheel

$(VENV)/installed: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet -c constraints.txt -e ".[torch,tasks,zoo,dev]"
	touch $@

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

types: $(VENV)/installed
	$(BIN)/mypy

architecture: $(VENV)/installed
	$(BIN)/lint-imports

# Tests of one file share what they build, so a file goes to one process; small networks gain nothing from more threads.
unit: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n auto --dist loadfile

# The wheel is built and imported in an environment that has nothing but its core dependencies.
wheel: $(VENV)/installed
	rm -rf build/wheel && $(BIN)/python -m build --quiet --wheel --outdir build/wheel .
	$(PYTHON) -m venv --clear build/wheel/venv
	build/wheel/venv/bin/pip install --quiet -c constraints.txt build/wheel/*.whl
	build/wheel/venv/bin/python -c "import kirsch; assert kirsch.Goal(macs=0.5)"
	build/wheel/venv/bin/kirsch doctor

sweep: $(VENV)/installed
	$(BIN)/pytest -q -m sweep

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache
