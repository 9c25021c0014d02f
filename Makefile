# Everything a newcomer needs: `make demo` and `make test`. Both set up their own virtual environment first.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PYTEST_FLAGS ?= -n 2

.PHONY: demo test lint clean

demo: $(VENV)/ready
	$(BIN)/lockstep run -m experiment=demo backend=torch,jax hydra.launcher.parallel=2
	$(BIN)/lockstep compare runs/demo --output report
	@echo "Open report/report.html"

test: $(VENV)/ready lint
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

lint: $(VENV)/ready
	$(BIN)/ruff check framework plugins tests benchmarks docs/examples
	$(BIN)/ruff format --check framework plugins tests benchmarks docs/examples
	$(BIN)/python tests/typing_budget.py

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[all]'
	touch $@

# Installed on its own first: on Linux a range would take a build with several GB of CUDA libraries.
TORCH ?= torch==2.13.0

clean:
	rm -rf $(VENV) runs report
