# Everything a newcomer needs: `make demo` and `make test`. Both set up their own virtual environment first.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PYTEST_FLAGS ?= -n 2

.PHONY: demo test test-lowest lint docs dist clean

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

# A selection of the tests with the lowest versions that pyproject.toml allows; torch is the one that $(TORCH) names.
test-lowest: .venv-lowest/ready
	.venv-lowest/bin/python -m pytest $(PYTEST_FLAGS) $(LOWEST_TESTS)

LOWEST_TESTS = $(LOWEST:%=tests/test_%)
LOWEST = packaging.py registry.py configuration.py numerics.py optimisation.py tokenizer.py data.py compare.py \
	parity.py::test_both_draw_the_same_tokens parity.py::test_both_evaluate_alike

.venv-lowest/ready: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/pip install --quiet --disable-pip-version-check --no-deps $(TORCH)
	.venv-lowest/bin/pip install --quiet --disable-pip-version-check --no-deps --requirement constraints-lowest.txt
	.venv-lowest/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

docs: .venv-docs/ready
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --clean
	@echo "Open site/index.html; for its search: $(PYTHON) -m http.server --bind 127.0.0.1 --directory site"

.venv-docs/ready: docs/requirements.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install --quiet --disable-pip-version-check --no-deps --requirement docs/requirements.txt
	touch $@

dist: $(VENV)/ready
	$(BIN)/python -m hatchling build --directory dist

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[all]'
	touch $@

# Installed on its own first: on Linux a range would take a build with several GB of CUDA libraries.
TORCH ?= torch==2.13.0

clean:
	rm -rf $(VENV) .venv-docs .venv-lowest runs report site dist
