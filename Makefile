PYTHON ?= python3
SEED ?= 0
BIN := .venv/bin
# A process a core; each has one thread (tests/conftest.py). One that is done takes tests over from the others.
WORKERS := -n logical --maxprocesses 8 --dist worksteal

.PHONY: setup demo test test-slow test-newest-trl test-oldest check

# Built again when a dependency changes.
setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than Python 3.11; run make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

# Sample data, a tiny base, SFT, reward model, PPO and a table, in outputs/demo. No network.
demo: setup
	$(BIN)/python scripts/demo.py --seed $(SEED)

test: setup
	$(BIN)/python -m pytest $(WORKERS) -m "not slow"

# The demo, and what its table must show.
test-slow: setup
	$(BIN)/python -m pytest $(WORKERS) -m slow

# The recipes on the newest TRL, which has no PPOTrainer of its own, and RLOO and GRPO against its trainers.
test-newest-trl: setup
	rm -rf .venv/newest-trl
	$(BIN)/pip install --quiet --no-deps --target .venv/newest-trl trl
	PYTHONPATH=$(CURDIR)/.venv/newest-trl $(BIN)/python -m pytest -m smoke tests/recipes tests/ppo/test_group_parity.py

# The lower bounds of pyproject.toml, but torch's. The page in a browser asks nothing of them.
test-oldest: setup
	$(BIN)/python scripts/oldest.py .venv/oldest
	.venv/oldest/bin/python -m pytest $(WORKERS) -m "not slow" --ignore tests/desk/app/test_page.py

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
