.PHONY: demo steady library test diff prove chaos scorecard bench site pictures wheel dist release lint

# The demo needs less than the tests, but takes what they have.
DEMO := $(firstword $(wildcard .venv) .venv-demo)

demo: $(DEMO)  ## bake a project, start it, run its tasks: make demo ARGS="durable_jobs=yes"
	@PYTHONPATH=tests $(DEMO)/bin/python -m harness.demo $(ARGS)

steady: .venv  ## test the library celery-steady: make steady ARGS="-k redis"
	.venv/bin/python -m pytest -n auto celery-steady/tests -c celery-steady/pyproject.toml $(ARGS)

library: .venv  ## test the library durable-jobs: make library ARGS="-k retry"
	.venv/bin/python -m pytest durable-jobs/tests -c durable-jobs/pyproject.toml $(ARGS)

PYTEST := .venv/bin/python -m pytest -n auto --dist loadgroup --no-loadscope-reorder --durations 10

test: .venv  ## all quick tests: make test ARGS="-k hook"
	$(PYTEST) --ignore tests/integration $(ARGS)

diff: $(DEMO)  ## how three outputs differ from those of the branch main, or: make diff FROM=COMMIT
	@PATH="$(DEMO)/bin:$$PATH" .ci/diff $(or $(FROM),main)

prove: TESTS := tests/integration
prove: .venv  ## the slow tests, such as faults and containers: make prove ARGS="-k redis-gevent"
	$(PYTEST) --maxfail 5 $(TESTS) $(ARGS)

chaos: .venv  ## two minutes of random faults on each broker; longer: make chaos ARGS="redis --seconds 600 --jobs 5000 --seed 1"
	@PYTHONPATH=tests .venv/bin/python -m harness.chaos $(ARGS)

scorecard: .venv  ## what faults lose with celery-steady and with stock Celery, into its docs: make scorecard ARGS="redis --kills 20"
	.venv/bin/python celery-steady/bench/scorecard.py $(or $(ARGS),redis) --write

bench: .venv  ## measure and write docs/speed.md and docs/performance.md of the libraries; a trial: make bench ARGS="--scale 0.1"
	.venv/bin/python celery-steady/bench/speed.py $(ARGS)
	PYTHONPATH=tests .venv/bin/python durable-jobs/bench/run.py $(ARGS)

SITE := site
site: .venv  ## build the pages as a site, in site/
	.venv/bin/sphinx-build -q -W -c docs . $(SITE)

pictures: .venv  ## retake the pictures in README.md
	.venv/bin/uv pip install --quiet --python .venv/bin/python pillow
	PYTHONPATH=tests .venv/bin/python -m harness.pictures

wheel: .venv  ## build the libraries whose source has changed into the output, as a test requires
	@.venv/bin/python .ci/wheel.py celery-steady durable-jobs

dist: .venv  ## build both libraries into dist/, and run their tests from there
	.ci/dist

release: .venv  ## test, commit and tag each product whose changelog has an unreleased version
	@.venv/bin/python .ci/release.py

# The output's plain Python. The output's pyproject.toml is not TOML before it is rendered.
WHOLE := $(shell grep -rLE '\{[{%#]' templates/durable_jobs --include=*.py)
FIRST_PARTY := --config 'lint.isort.known-first-party = ["api", "config", "orders", "users"]'
AS_OUTPUT := --force-exclude --config durable-jobs/pyproject.toml $(WHOLE)

lint: .venv  ## format all plain Python; CHECK=1 only reports problems
	.venv/bin/ruff check $(if $(CHECK),,--fix) . celery-steady durable-jobs
	.venv/bin/ruff format $(if $(CHECK),--check) . celery-steady durable-jobs
	.venv/bin/ruff check $(if $(CHECK),,--fix) $(FIRST_PARTY) $(AS_OUTPUT)
	.venv/bin/ruff format $(if $(CHECK),--check) $(AS_OUTPUT)

PYTHON := python3
GROUPS := -e celery-steady --group celery-steady/pyproject.toml:test -r durable-jobs/pyproject.toml \
	--all-extras --group durable-jobs/pyproject.toml:test --group test
# Packages of the day of the last commit, so that a clone has in a year what was tested.
AS_OF ?= $(shell git log -1 --format=%cI 2>/dev/null)

# --clear, because an older one may be of another Python. A pip in it would take four seconds. If this
# Python has none, it needs its own.
define create
	$(PYTHON) -m venv --clear --without-pip $@
	$(PYTHON) -m pip --python $@/bin/python install --quiet uv || \
		{ $(PYTHON) -m venv $@ && $@/bin/pip install --quiet uv; }
endef

# Some mirrors of PyPI don't know the date of a package: take the newest.
install = $@/bin/uv pip install --quiet --python $@/bin/python $1 --exclude-newer '$(AS_OF)' 2>/dev/null || \
	$@/bin/uv pip install --quiet --python $@/bin/python $1

.venv: pyproject.toml celery-steady/pyproject.toml durable-jobs/pyproject.toml
	$(create)
	$(call install,$(GROUPS))
	@touch $@

.venv-demo: pyproject.toml
	$(create)
	$(call install,--group demo)
	@touch $@
