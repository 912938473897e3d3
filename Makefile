.PHONY: demo test bench lint

demo: .venv  ## bake a project, start it, run a job: make demo ARGS="include_example=false"
	@.venv/bin/python tests/demo.py $(ARGS)

test: .venv  ## the template's own tests: make test ARGS="-k hook"
	.venv/bin/python -m pytest -n auto --dist loadgroup --durations 10 $(ARGS)

bench: .venv  ## measure, write docs/performance.md; a trial: make bench ARGS="--scale 0.1"
	.venv/bin/python bench/run.py $(ARGS)

lint: .venv
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

.venv: pyproject.toml
	python3 -m venv .venv
	.venv/bin/pip install --quiet uv
	.venv/bin/uv pip install --quiet --python .venv/bin/python --group test
	@touch .venv
