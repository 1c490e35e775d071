# make quickstart   install and train the embedded example; table and plot at the end
# make test         install and run the tests
# make help         the rest

PYTHON ?= python3
JOBS ?= $(shell env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 2)
BIN = .venv/bin

.PHONY: help quickstart test test-slow bench lint format clean

help:
	@echo "make quickstart  train a small ResNet and ViT on handwritten digits, with and without TrAct"
	@echo "make test        run the tests (PYTEST_ARGS='-k resume' selects)"
	@echo "make test-slow   run the slow tests: what can happen to a job, on a real Slurm; large networks"
	@echo "make bench       measure what TrAct costs on the CPU of this machine (6 minutes)"
	@echo "make lint        check style"
	@echo "make format      apply style"
	@echo "make clean       remove the virtual environment and caches; run folders stay"

quickstart: .venv/installed
	$(BIN)/python experiments/quickstart.py --local jobs=$(JOBS)
	$(BIN)/python analysis/tables.py --experiment quickstart
	$(BIN)/python analysis/figures.py --experiment quickstart --out tables

test: .venv/installed-test
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(PYTEST_ARGS)

# Mostly waiting for Slurm: more processes than cores.
test-slow: .venv/installed-test
	$(BIN)/python -m pytest -m slow -n 6 --dist worksteal $(PYTEST_ARGS)

# Tables in Markdown; cells say which bars hold. With nothing else running.
bench: .venv/installed-test
	$(BIN)/python benchmarks/layer.py
	$(BIN)/python benchmarks/step.py

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: expected Python 3.11 or newer, got $$($(PYTHON) --version); give make PYTHON=python3.11."; exit 2; }
	$(PYTHON) -m venv .venv
	touch $@

.venv/installed: .venv/created requirements.txt constraints.txt
	$(BIN)/python -m pip install --quiet --requirement requirements.txt --constraint constraints.txt
	touch $@

.venv/installed-test: .venv/installed requirements-test.txt
	$(BIN)/python -m pip install --quiet --requirement requirements-test.txt --constraint constraints.txt
	touch $@
