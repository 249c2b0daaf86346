# The two commands: `make demo`, `make test`. Everything lands in .venv; another Python: `make PYTHON=python3.13 demo`.
PYTHON ?= python3
VENV ?= .venv
# The versions to install: constraints.txt, .ci/lowest.txt or .ci/newest.txt.
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
BENCHMARKS := scoring memory loop rolling generation growth overhead record export accelerator

# Many processes are started here: what they import is compiled once.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test coverage bench check clean
.DELETE_ON_ERROR:

demo: $(VENV)/installed
	$(BIN)/lm-eval-steering sweep "$$($(BIN)/lm-eval-steering where demo-plan)" --out demo-results/sweep
	$(BIN)/lm-eval-steering report demo-results/sweep --out demo-results/report

# In the order of the files: those with the fewest tests, which would come last, take the longest.
test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Every process that a test starts is measured too. The page is coverage/index.html.
coverage: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --cov --cov-report term \
		--cov-report html:coverage --cov-report xml:coverage/coverage.xml

bench: $(VENV)/installed
	for name in $(BENCHMARKS); do OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.$$name --quick || exit 1; done

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

clean:
	rm -rf $(VENV) demo-results coverage

# Not compiled ahead: most of the 18,000 files are never imported.
$(VENV)/installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c $(CONSTRAINTS) -e ".[dev]"
	touch $@
