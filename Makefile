# Everything a newcomer needs: `make demo` and `make test`. Both set up their own virtual environment first.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PYTEST_FLAGS ?= -n 2 --dist worksteal

# Some containers set it. Python then compiles the libraries anew in every process: 7 s each, and tests start many.
unexport PYTHONDONTWRITEBYTECODE

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
	parity.py::test_both_draw_the_same_tokens parity.py::test_both_evaluate_alike api.py::test_the_listings_of_the_page_run

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

# constraints.txt is complete for CPython 3.11 on Linux x86-64: installed there as it is, since pip's resolver takes minutes to
# arrive at the same list. Elsewhere pip resolves within it.
LOCKED_FOR = cpython 3.11 linux x86_64
THIS_PYTHON = import platform as p, sys; print(sys.implementation.name, "%d.%d" % sys.version_info[:2], sys.platform, p.machine())
PIP = $(BIN)/python -m pip --quiet --disable-pip-version-check
LOCK = $(VENV)/lock.txt

# Installed on its own first: on Linux a range would take a build with several GB of CUDA libraries.
TORCH ?= torch==2.13.0

# uv installs the list in a sixth of pip's time, but does not read pip's configuration: where it finds no packages, pip does it.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	grep -v '^torch==' constraints.txt > $(LOCK)
	$(PIP) install --no-compile --constraint $(LOCK) $(TORCH)
	set -e; if [ "$$($(BIN)/python -c '$(THIS_PYTHON)')" = "$(LOCKED_FOR)" ]; then \
		{ $(PIP) install --constraint $(LOCK) uv && \
		  $(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --requirement $(LOCK); } || \
			$(PIP) install --no-compile --no-deps --requirement $(LOCK); \
		$(PIP) install --no-deps --no-build-isolation --editable .; \
		$(BIN)/python -m pip check; \
	else \
		echo "constraints.txt was made for $(LOCKED_FOR): here pip resolves the dependencies, which takes minutes."; \
		$(PIP) install --no-compile --constraint $(LOCK) --editable '.[all]'; \
	fi
	touch $@

clean:
	rm -rf $(VENV) .venv-docs .venv-lowest runs report site dist
