.PHONY: demo engine test prove chaos bench package release lint

demo: .venv  ## bake a project, start it, run its tasks: make demo ARGS="durable_jobs=yes"
	@PYTHONPATH=tests .venv/bin/python -m harness.demo $(ARGS)

engine: .venv  ## tests of the app `jobs`, in seconds: make engine ARGS="-k retry"
	.venv/bin/python -m pytest tests/engine -c tests/engine/pytest.ini $(ARGS)

PYTEST := .venv/bin/python -m pytest -n auto --dist loadgroup --no-loadscope-reorder --durations 10

test: .venv  ## all quick tests: make test ARGS="-k hook"
	$(PYTEST) --ignore tests/integration $(ARGS)

prove: TESTS := tests/integration
prove: .venv  ## the slow tests, such as faults and containers: make prove ARGS="-k redis-gevent"
	$(PYTEST) --maxfail 5 $(TESTS) $(ARGS)

chaos: .venv  ## two minutes of random faults on each broker; longer: make chaos ARGS="redis --seconds 600 --jobs 5000 --seed 1"
	@PYTHONPATH=tests .venv/bin/python -m harness.chaos $(ARGS)

bench: .venv  ## measure and write docs/performance.md; a trial: make bench ARGS="--scale 0.1"
	PYTHONPATH=tests .venv/bin/python bench/run.py $(ARGS)

package: .venv  ## build the engine as a wheel in dist/; elsewhere: make package ARGS="--out-dir /tmp"
	.venv/bin/uv build --wheel $(ARGS)

release: .venv  ## test, commit and tag this version, and start the next one
	@.venv/bin/python .ci/release.py

# The output's plain Python. The output's pyproject.toml is not TOML before it is rendered.
WHOLE := $(shell grep -rLE '\{[{%#]' templates/durable_jobs --include=*.py)
ENGINE := --force-exclude --config tests/engine/jobs_ruff.toml '{{cookiecutter.project_slug}}/jobs' $(WHOLE)

lint: .venv  ## format all plain Python; CHECK=1 changes nothing, and fails
	.venv/bin/ruff check $(if $(CHECK),,--fix) .
	.venv/bin/ruff format $(if $(CHECK),--check) .
	.venv/bin/ruff check $(if $(CHECK),,--fix) $(ENGINE)
	.venv/bin/ruff format $(if $(CHECK),--check) $(ENGINE)

.venv: pyproject.toml templates/requirements.txt
	# A pip in .venv would take four seconds. If python3 has none, .venv needs its own.
	python3 -m venv --without-pip .venv
	python3 -m pip --python .venv/bin/python install --quiet uv || \
		{ python3 -m venv .venv && .venv/bin/pip install --quiet uv; }
	.venv/bin/uv pip install --quiet --python .venv/bin/python -r templates/requirements.txt --group test
	@touch .venv
