.PHONY: install hooks test slow gpu lint type format bench docs check-site

install:
	python3 -m venv .venv
	.venv/bin/pip install -c constraints.txt -e ".[dev]"

hooks:
	.venv/bin/pip install pre-commit
	.venv/bin/pre-commit install

test:
	.venv/bin/pytest

slow:
	.venv/bin/pytest -m slow

gpu:
	.venv/bin/pytest -n 0 -m gpu tests/gpu
	.venv/bin/python -m experiments.gpu --save docs/experiments

lint:
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

type:
	.venv/bin/mypy

format:
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

bench:
	.venv/bin/python -m experiments.evaluation_speed
	.venv/bin/python -m experiments.hardware_speed
	.venv/bin/python -m experiments.quantizer_speed
	.venv/bin/python -m experiments.kernel_speed
	.venv/bin/python -m experiments.cpu_speed

docs:
	.venv/bin/python docs/build.py
	.venv/bin/codespell README.md CONTRIBUTING.md CHANGELOG.md docs haq envs hw_models quantizers experiments

check-site:
	HAQ_SITE=1 .venv/bin/pytest -n 2 tests/site
