# Every target that needs packages makes the virtual environment first.
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: help setup demo serve test test-all attacks fuzz conformance lint types protos protos-check docs build audit train bench benchmarks clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-14s %s\n", $$1, $$2}'

setup: $(READY) ## Make .venv with everything in it

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade 'pip>=25.1' # which knows dependency groups
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[server,demo,triton]' --group dev
	touch $@

demo: setup ## Replay four weeks of demand through a server and score its live forecasts
	$(BIN)/python models/electricity/demo.py

serve: setup ## Serve the shipped models on 127.0.0.1:50051
	$(BIN)/stepstate serve --models models

test: setup ## Run the tests that a change is made with (4 minutes; three processes, as many tests wait)
	$(BIN)/pytest --numprocesses 3 -m 'not long and not attacks' --hypothesis-profile quick

test-all: setup ## Run all tests: storms, outages, benchmarks and perf_analyzer too
	$(BIN)/pytest --numprocesses 3 -m 'not (attacks and long)'

attacks: setup ## Attack servers at full size and print the tables of SECURITY.md (20 minutes)
	$(BIN)/python -m tests.attacks && $(BIN)/python -m tests.attacks.tenants

conformance: export H2SPEC ?= ../shared/conformance/h2spec
conformance: export GRPC_INTEROP_CLIENT ?= ../shared/conformance/grpc-go-interop-client
conformance: setup ## Run h2spec and grpc-go's interoperability client (tests/README.md)
	$(BIN)/pytest tests/conformance

FUZZ_SECONDS ?= 3600
fuzz: setup ## Fuzz all that decodes bytes from outside for an hour, or FUZZ_SECONDS
	$(BIN)/python -m tests.fuzz $(FUZZ_SECONDS)

lint: setup ## Check style, formatting and the layers of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: setup ## Check types
	$(BIN)/mypy

protos: setup ## Compile the contract into the package
	$(BIN)/python protos/generate.py

protos-check: setup ## Fail if the committed stubs differ from the contract
	$(BIN)/python protos/generate.py build/protos
	for made in $$(cd build/protos && find stepstate -type f); do cmp build/protos/$$made service/$$made || exit 1; done

build: setup ## Make wheel and sdist in dist/, check them, and list what they bring along (SBOM)
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(BIN)/python .ci/sbom.py dist/stepstate.cdx.json

audit: setup ## Fail if what the package brings along has a known vulnerability
	$(BIN)/python .ci/sbom.py --audit

docs: setup ## Build the documentation site in build/site; a broken link fails it
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

train: setup ## Train the shipped model again (two minutes)
	$(BIN)/python models/electricity/train.py

bench: setup ## Measure steps on each transport, beside echoes (one in C++) and an older commit (6 minutes)
	$(BIN)/python -m benchmarks transports

benchmarks: setup ## Measure all of docs/benchmarks.md again (25 minutes)
	$(BIN)/python -m benchmarks.page measure

clean: ## Remove what was built, .venv too
	rm -rf .venv build dist out .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
