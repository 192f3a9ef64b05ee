.DEFAULT_GOAL := help
.PHONY: help install format lint types imports test build docs all

help: ## List the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "%-10s %s\n", $$1, $$2}'

install: ## Install every package and the pre-commit hooks
	uv sync
	uv run --with pre-commit pre-commit install

format: ## Format and fix what ruff can fix
	uv run ruff format .
	uv run ruff check --fix .

lint: ## Formatting, lint, spelling
	uv run ruff format --check .
	uv run ruff check .
	uv run codespell

types: ## Type check
	uv run pyright

imports: ## Which package may import which
	uv run lint-imports

test: ## Every test that needs no GPU and no network
	uv run pytest

build: ## A wheel of each package, in dist/
	uv build --all-packages --wheel

docs: ## Build the documentation into site/
	uv run --group docs mkdocs build --strict

all: lint types imports test build ## What CI runs
