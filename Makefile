# Two commands do everything: `make demo` and `make test`. Both create .venv when it is missing.
#
# TORCH names the torch to install, with pip's options where you need them, for example
#   make demo TORCH="torch --index-url https://download.pytorch.org/whl/cpu"
PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: demo test slow fuzz check bench reports clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

demo: $(VENV)/installed      ## train, kill, resume, and show what was kept and why
	$(BIN)/peakpoint demo

test: $(VENV)/installed      ## the fast tests
	$(BIN)/pytest --numprocesses=2 --dist=worksteal

# the packages that some slow tests compare with
$(VENV)/peers: $(VENV)/installed
	$(BIN)/pip install --quiet --editable '.[peers]'
	touch $@

slow: $(VENV)/peers          ## the tests that take minutes
	$(BIN)/pytest --numprocesses=2 --dist=worksteal -m slow

# SECONDS_EACH is for each target
SECONDS_EACH ?= 3600
fuzz: $(VENV)/peers          ## every parser in turn, for hours
	$(BIN)/pip install --quiet atheris
	$(BIN)/python -m tests.fuzz all --seconds $(SECONDS_EACH)

check: $(VENV)/installed     ## style, types, import layers, code lines and words by room
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python .ci/house.py

bench: $(VENV)/installed     ## the benchmarks, in minutes; writes docs/performance.md
	$(BIN)/pip install --quiet --editable '.[bench]'
	$(BIN)/python -m benchmarks --page

reports: $(VENV)/installed   ## trains in seconds what docs/reports.md shows, and draws it
	rm -rf build/reports && mkdir -p build/reports
	cd build/reports && ../../$(BIN)/python ../../examples/compare_optimizers.py runs
	cd build/reports && ../../$(BIN)/peakpoint report runs --n-eval val_accuracy=1197 --to report
	cp build/reports/report/*.png build/reports/report/report.md docs/report/

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis peakpoint-demo
