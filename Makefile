# Two commands do everything on a fresh machine with Python 3.11: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test test-cluster test-kill test-recipes check bench bench-loop bench-boxes bench-regions bench-graphs bench-prepare site study bench-shards clean
.DEFAULT_GOAL := help

help:
	@echo "make demo        set up, train an adapter on two cores, evaluate it, end with a page of pictures"
	@echo "make test        set up and run the tests"
	@echo "make test-cluster  SLURM on this machine: two nodes train, are signalled, requeued, and end as if unbroken (root, Debian)"
	@echo "make test-kill   20 kills at random moments: every resume from the newest checkpoint, the end as if unbroken"
	@echo "make test-recipes  every recipe by the commands of its header, at tiny size: trained, resumed, evaluated, exported"
	@echo "make check       format, lint, docstrings, types"
	@echo "make site        the documentation with the API, in site/"
	@echo "make study       the methods and their combinations on one budget (docs/study.md): 80 minutes on two cores"
	@echo "make bench       every benchmark (bench-loop: training speed against a bare loop; bench-boxes, bench-regions, bench-graphs: what grounding costs; bench-prepare: preparation against a bare loop, and how often it reads its input; bench-shards: loading)"

setup: .venv/installed

.venv/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is %s: make PYTHON=python3.11" % sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements.txt
	touch $@

demo: setup
	$(BIN)/python train.py run=runs/demo
	$(BIN)/python evaluate.py run=runs/demo
	$(BIN)/python sample.py run=runs/demo scene=examples/four_shapes.json out=runs/demo/four_shapes.png
	@echo
	@echo "Open runs/demo/evaluation/shapes/report.html and runs/demo/four_shapes.png"

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder tests/rehearsals tests/commands tests  # a file's tests share what they build; the longest files first

test-cluster: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -s tests/cluster/check_slurm.py

test-recipes: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile tests/rehearsals

test-kill: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -s tests/cluster/check_kills.py

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pydoclint --quiet scenes models datamodules metrics lightning_modules callbacks sampling evaluation runtime preparation labelling web files
	$(BIN)/pyright

bench: bench-loop bench-boxes bench-regions bench-graphs bench-prepare bench-shards

bench-loop: setup
	$(BIN)/python -m benchmarks.loop

bench-boxes: setup
	$(BIN)/python -m benchmarks.boxes

bench-regions: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.regions

bench-graphs: setup
	$(BIN)/python -m benchmarks.graphs

bench-prepare: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.prepare
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.reads

site: setup  # the documentation with the API, site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

study: setup  # docs/study.md; about 80 minutes on two cores, goes on where it was stopped
	OMP_NUM_THREADS=1 $(BIN)/python -m scripts.study

bench-shards: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.shards

clean:
	rm -rf runs data .pytest_cache .ruff_cache
