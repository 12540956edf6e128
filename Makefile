# `make sample` and `make test` do all the set-up themselves, in .venv, with the versions in constraints.txt.

PYTHON ?= python3
BIN := .venv/bin
PROMPT ?= a small red circle above a big blue square on a white background

.PHONY: sample teach test test-slow test-scale test-browser test-teach lint clean

sample: .venv/installed
	$(BIN)/python -m minisdxl.sample "$(PROMPT)" --prune --compare

# The lessons of docs/walkthrough: this sets up what they run in, and `.venv/bin/jupyter lab docs/walkthrough` opens them.
teach: .venv/installed-teach

test: .venv/installed-test
	$(BIN)/python -m pytest -n auto --dist loadgroup

test-slow: .venv/installed-test
	$(BIN)/python -m pytest -m "slow and not gpu" -n auto --dist loadgroup

test-scale: .venv/installed-scale
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m scale

# Chromium comes from the system: taken where it is, installed from Debian's or Ubuntu's packages where that is allowed.
test-browser: .venv/installed-test
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[browser]"
	@command -v chromium >/dev/null || { apt-get update -qq && apt-get install -y -qq chromium >/dev/null; } \
		|| { echo "test-browser: there is no Chromium, and it could not be installed; the page was not tested"; exit 3; }
	$(BIN)/python -m pytest -m browser tests/browser

test-teach: .venv/installed-test .venv/installed-teach
	$(BIN)/python -m pytest -m teach tests/walkthrough

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	MYPYPATH=docs/walkthrough $(BIN)/mypy docs/walkthrough/checks docs/walkthrough/course.py docs/walkthrough/solutions

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/installed-test: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@ .venv/installed

.venv/installed-scale: .venv/installed-test
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test,scale]"
	touch $@

.venv/installed-teach: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[teach]"
	touch $@

clean:
	rm -rf .venv
