# make serve   set everything up and serve the embedded model on 127.0.0.1:8000
# make test    set everything up and run the tests
# make check   lint, types, tests
VENV  ?= .venv
HOST  ?= 127.0.0.1
PORT  ?= 8000
MODEL ?=
ARGS  ?=
TESTS ?=

.PHONY: setup serve test lint types check benchmark clean
.DEFAULT_GOAL := serve

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml deploy/install.sh
	deploy/install.sh $(VENV)
	@touch $@

serve: setup
	@exec $(VENV)/bin/saccade serve $(MODEL) --host $(HOST) --port $(PORT) $(ARGS)

test: setup
	$(VENV)/bin/python -m pytest $(TESTS)

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: setup
	$(VENV)/bin/mypy

check: lint types test

benchmark: setup
	$(VENV)/bin/python -m benchmarks.serve --stub-encoder $(ARGS)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
