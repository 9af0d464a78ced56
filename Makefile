# make demo   real videos from the bundled little model, in out/demo
# make test   the checks that every change must pass
# make machine   measurements that want a quiet machine, for a nightly run
# make docs-commands   every command of README.md and docs/, from an installed wheel
# All set up .venv by themselves; PYTHON=python3.12 picks another interpreter.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT := out/demo

.PHONY: demo test machine docs-commands clean

demo: $(VENV)/.installed
	$(BIN)/reelbatch generate --prompts examples/shapes.csv --out $(OUT)

# worksteal: each worker begins with a run of neighbouring files and takes from the other's end when it is done, so that
# few files are divided and have their fixtures made twice; whole files (loadfile) leave a core idle behind the last one
test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --dist worksteal --durations=20

machine: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/machine --durations=0

docs-commands: $(VENV)/.installed-dev
	$(BIN)/python -m pytest tests/installed -m '' --durations=0

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) out build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
