# make serve   set everything up and serve the demo model on 127.0.0.1:8000
# make test    set everything up and run all tests; SERVICES=required fails instead of skipping
# make test-fast   run only the tests that start no servers and no workers
# make test-nightly   run the tests that take minutes each, which `make test` leaves out
# make check   run linters, type checker, audit and all tests
# make audit   look up known vulnerabilities of what the images install; AUDIT=required fails offline
# make vllm-next   report what the newest vLLM would break; never fails
# make docs    build the documentation into site/
# make examples   install what clients/examples needs, in .venv/examples
# make routers   install the routers that the tests start, in .venv/routers
# make lock    pin what the container images, the examples and the routers install
# make sbom    write what the container images install to build/sbom-*.json, in CycloneDX format
# make image-check   build the Dockerfile's cpu target without Docker and run it; needs root and Debian
VENV  ?= .venv
HOST  ?= 127.0.0.1
PORT  ?= 8000
MODEL ?=
ARGS  ?=
TESTS ?=
ROOTS ?= build/image

# Without bytecode kept, each process that starts compiles the server anew, and pytest the tests.
unexport PYTHONDONTWRITEBYTECODE
PYTEST = $(VENV)/bin/python -m pytest
PARALLEL = --numprocesses logical --maxprocesses 4 --dist loadfile
# Side by side, so that only one process spends the 10 s that imports of vLLM and torch take.
UNIT = @$(MAKE) --no-print-directory --jobs 2 --keep-going --output-sync=target without-vllm with-vllm
FOLDERS = tests/unit
# Two processes: most of a server's start needs one core, and a running server takes 3 GiB.
# A process takes the next group of tests when it is free; see tests/conftest.py.
GROUPS = --numprocesses 2 --dist loadgroup --no-loadscope-reorder

.PHONY: setup serve examples routers test test-fast test-nightly without-vllm with-vllm lint types audit check benchmark vllm-next docs lock sbom image-check clean
.DEFAULT_GOAL := serve

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml clients/python/pyproject.toml deploy/install.sh
	deploy/install.sh $(VENV)
	@touch $@

serve: setup
	@exec $(VENV)/bin/saccade serve $(MODEL) --host $(HOST) --port $(PORT) $(ARGS)

# Their SDKs need other versions of packages than vLLM does.
examples: $(VENV)/examples/.installed

$(VENV)/examples/.installed: clients/examples/requirements.txt | setup
	$(VENV)/bin/uv venv --quiet --allow-existing --python $(VENV)/bin/python $(VENV)/examples
	$(VENV)/bin/uv pip sync --quiet --python $(VENV)/examples/bin/python $<
	@touch $@

# They need other versions of packages than vLLM does, too.
routers: $(VENV)/routers/.installed

$(VENV)/routers/.installed: deploy/routers/requirements.txt | setup
	$(VENV)/bin/uv venv --quiet --allow-existing --python $(VENV)/bin/python $(VENV)/routers
	$(VENV)/bin/uv pip sync --quiet --python $(VENV)/routers/bin/python $<
	@touch $@

test: setup examples routers
	@deploy/test_services.sh $(VENV)/services
	@$(VENV)/bin/python -m tests.kubernetes_tools $(VENV)/services/bin
	@$(VENV)/bin/python -m tests.node
ifeq ($(TESTS),)
	$(UNIT) FOLDERS="tests/unit tests/processes"
	$(PYTEST) $(GROUPS) tests/server tests/deploy
else
	$(PYTEST) $(TESTS)
endif

test-fast: setup
	$(UNIT)

test-nightly: setup
	$(PYTEST) -m nightly tests

without-vllm:
	$(PYTEST) $(PARALLEL) $(FOLDERS) $(FOLDERS:%=--ignore %/vllm)

with-vllm:
	$(PYTEST) $(FOLDERS:%=%/vllm)

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: setup
	$(VENV)/bin/mypy

audit: setup
	@$(VENV)/bin/python -m deploy.audit

check: lint types audit test

benchmark: setup
	$(VENV)/bin/python -m benchmarks.serve --stub-encoder $(ARGS)

vllm-next: setup
	@$(VENV)/bin/python -m tests.contracts_next || echo "the newest vLLM could not be checked"

docs: setup
	$(VENV)/bin/mkdocs build --strict

lock: setup
	UV=$(VENV)/bin/uv deploy/lock.sh

sbom: setup
	@mkdir -p build
	for target in cpu gpu; do $(VENV)/bin/cyclonedx-py requirements --pyproject pyproject.toml \
		--output-file build/sbom-$$target.json deploy/requirements-$$target.txt || exit; done

image-check: setup
	$(VENV)/bin/python -m deploy.replay $(ROOTS) $(ARGS)

clean:
	rm -rf $(VENV) build site clients/node_modules clients/typescript/dist .pytest_cache .mypy_cache .ruff_cache
