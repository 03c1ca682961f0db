# make setup   build .venv from pinned dependencies
# make run     set up and train the digits example to its bundle
# make test    lint, types, tests
# make slow    the tests that take minutes; FILES=tests/flows for some of them
# make docs    the site, into build/docs
# make wheel   build the wheel, and try it in a fresh environment of ENVIRONMENT's Python
# make bench   the benchmarks that take minutes; DATA=folder with real data
# make chaos KILLS=1000   kill training that many times and compare bytes; PROCESSES=3 for several,
#                         STRATEGY=fsdp in slices, EXPERIMENT=language_model for that one
# make chaos-store KILLS=200   the same, of the process that keeps a bucket up to date
# make digests   the bytes that small runs of every experiment end with

PYTHON ?= python3
KILLS ?= 50
PROCESSES ?= 1
STRATEGY ?= ddp
FILES ?= tests
# A third of the time tests wait: for leases, servers, and processes that start.
WORKERS ?= $(shell echo $$(( $$(getconf _NPROCESSORS_ONLN) * 3 / 2 )))
ENVIRONMENT ?= .venv
BIN := .venv/bin
READY := .venv/.ready

.PHONY: setup run test slow lint docs wheel bench chaos chaos-store digests clean
setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Holdfast needs Python 3.11 or later: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,translation]'
	touch $@

run: setup
	$(BIN)/holdfast run digits --store runs

test: lint
	$(BIN)/pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder --durations 10 -r s

slow: setup
	$(BIN)/pytest -m slow --numprocesses $(WORKERS) --dist loadfile --durations 10 -r s $(FILES)

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: setup
	$(BIN)/python -P -m sphinx --fail-on-warning --keep-going --quiet -c docs/site docs build/docs
	@echo build/docs/index.html

wheel: setup
	$(BIN)/python -m tests.packaging.wheel --python $(ENVIRONMENT)/bin/python

bench: setup
	$(BIN)/python -m benchmarks $(if $(DATA),--data $(DATA))

chaos: setup
	$(BIN)/python -m tests.faults.chaos --kills $(KILLS) --processes $(PROCESSES) --strategy $(STRATEGY) $(if $(EXPERIMENT),--experiment $(EXPERIMENT))

chaos-store: setup
	$(BIN)/python -m tests.faults.store_chaos --kills $(KILLS)

digests: setup
	@$(BIN)/python -m tests.compatibility.digests

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache
