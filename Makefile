# Needs make, and Python 3.11 or 3.12 with a shared libpython; everything else is installed into .venv.
# To choose a Python: make PYTHON=/opt/python/bin/python3.12 demo

VENV := .venv
BIN := $(VENV)/bin
PYTHONS := $(or $(PYTHON),python3.11 python3.12 python3 python)
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable
PACKAGING := pyproject.toml demo/pyproject.toml constraints.txt

.PHONY: demo test check docs bench fuzz faults fleet mutants clean

demo: $(VENV)/.installed  ## export a small bundle, serve it, and make imprompt-demo.png
	$(BIN)/imprompt demo

test: $(VENV)/.installed-dev  ## all tests, in two processes; options in TEST="..."
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(TEST)

check: $(VENV)/.installed-dev  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed-docs  ## build the documentation into site/; fails on broken links
	$(BIN)/zensical build --clean --strict

bench: $(VENV)/.installed-dev  ## latency and throughput; options in BENCH="..."
	$(BIN)/imprompt bench $(BENCH)

fuzz: $(VENV)/.installed-dev  ## 10,000 hostile requests, 3,000 refusals, 1,000 cancellations; options in FUZZ="--seed 1"
	PYTHONPATH=tests $(BIN)/python -m fuzz $(FUZZ)

faults: $(VENV)/.installed-dev  ## kills and stops processes of a server under load, and more; options in FAULTS="--only kill"
	PYTHONPATH=tests $(BIN)/python -m faults $(FAULTS)

fleet: $(VENV)/.installed-fleet  ## several servers behind Envoy, the Helm chart, and a batch on a Ray cluster
	$(BIN)/python -m pytest tests/fleet tests/serving/test_batch_command.py

mutants: $(VENV)/.installed-dev  ## small changes of the code that the fast tests do not notice; options in MUTANTS="--seed 1"
	$(BIN)/python tools/mutants.py $(MUTANTS)

clean:  ## remove the virtual environment, and the output of `make demo` and `make docs`
	rm -rf $(VENV) .demo .cache site

$(VENV)/pyvenv.cfg: | tools/suitable_python.py
	@for python in $(PYTHONS); do \
		command -v $$python >/dev/null || continue; \
		if "$$python" $|; then echo "creating $(VENV) with $$(command -v $$python)"; exec "$$python" -m venv $(VENV); fi; \
	done; \
	echo "No suitable Python (3.11 or 3.12 with a shared libpython) among: $(PYTHONS)." >&2; \
	echo "Name one: make PYTHON=/path/to/python3.11 ..." >&2; \
	exit 1

# .installed has what the demo needs; .installed-dev adds what contributors need.
$(VENV)/.installed: $(PACKAGING) | $(VENV)/pyvenv.cfg
	$(INSTALL) ".[cpu,export,server,gateway]" --editable ./demo
	@touch $@

$(VENV)/.installed-dev: $(PACKAGING) | $(VENV)/pyvenv.cfg
	$(INSTALL) ".[cpu,export,server,gateway,openvino,int8,face,rtx,cache,bench,otel,dev]" --editable ./demo
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-fleet: $(PACKAGING) | $(VENV)/.installed-dev
	$(INSTALL) ".[fleet]"
	@touch $@

$(VENV)/.installed-docs: $(PACKAGING) | $(VENV)/pyvenv.cfg
	$(INSTALL) ".[docs]"
	@touch $@
