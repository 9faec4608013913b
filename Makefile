# Everything here needs Python >= 3.11 and make, nothing else: `make demo` and `make test` set up by themselves.
PYTHON ?= python3
EXTRA ?= cpu
VENV ?= .venv
BIN := $(VENV)/bin
STORE ?= .tandem
READY := $(VENV)/.ready-$(EXTRA)
JOBS ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup demo test check lock clean

help: ## Show what can be made.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

setup: $(READY) ## Make the virtual environment .venv with the pinned packages (EXTRA=gpu for the GPU build of FAISS).

$(READY): pyproject.toml constraints.txt $(BIN)/uv
	@$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraints constraints.txt --editable ".[$(EXTRA),dev]"
	@touch $@
	@echo "setup: done; the command is $(BIN)/tandem"

$(BIN)/uv:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "Tandem needs Python 3.11 or newer; %s is %d.%d. Try: make PYTHON=python3.12 setup" % (sys.executable, v[0], v[1]))'
	@echo "setup: virtual environment $(VENV), packages as pinned in constraints.txt (about 6 GB, most of it torch)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@awk '/^uv==/ {on = 1} on {print} on && !/\\$$/ {exit}' constraints.txt > $(VENV)/uv.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement $(VENV)/uv.txt

demo: setup ## Run the whole two-stage pipeline on the demo catalogue; again, and it reuses every stage.
	@echo "demo: results are kept in $(STORE)"
	@$(BIN)/tandem demo --store $(STORE)

test: setup ## Run the checks and all tests, with coverage.
	@$(MAKE) --no-print-directory check
	@echo "test: pytest with $(JOBS) workers"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadgroup --cov --cov-report=term:skip-covered --cov-fail-under=90

check: setup ## Run the linter, the formatter's check, the type checker and the import contract.
	@echo "check: ruff, mypy, import contract"
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

lock: $(BIN)/uv ## Pin the newest versions that pyproject.toml allows into constraints.txt.
	@$(BIN)/uv pip compile pyproject.toml --extra cpu --extra gpu --extra dev --extra s3 --extra gcs --extra distributed --universal \
		--python-version 3.11 --generate-hashes --no-emit-index-url --no-header --no-annotate --quiet --output-file constraints.txt

clean: ## Remove the virtual environment and caches; the store stays.
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .coverage .coverage.* build *.egg-info
