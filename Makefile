# Every target takes its Python from scripts/bootstrap.py: the active virtual environment, else .venv, made at first
# use. pip is called only for what is missing, so an environment that has everything needs no network.

# The interpreter that .venv is made with.
PYTHON ?= python3
# What to install where there is no torch yet, instead of the release that scripts/bootstrap.py pins:
# make bench TORCH='torch>=2.9'
TORCH ?=
# Test processes, and torch's threads in each.
WORKERS ?= 2
THREADS ?= 1
# Passed on to the command of the target.
ARGS ?=

# $(call run,EXTRA,MODULE ARGUMENTS): python -m MODULE on this checkout, where EXTRA's requirements are installed.
define run
python="$$($(PYTHON) scripts/bootstrap.py $(1) $(if $(TORCH),--torch '$(TORCH)'))" && \
export PYTHONPATH="$(CURDIR)/src$${PYTHONPATH:+:$$PYTHONPATH}" && set -x && "$$python" -m $(2)
endef

.PHONY: help bench test lint format clean

help: ## show this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' Makefile
	@printf '%s\n' '' "  ARGS='...' goes to the command, for instance:" \
		"  make bench ARGS='--formats int4_sym --mode full'" "  make test ARGS='-k packaging'"

bench: ## measure a prefill of the recorded workload on this machine
	@$(call run,bench,qexperts bench prefill $(ARGS))

test: ## run the tests
	@export OMP_NUM_THREADS=$(THREADS); $(call run,test,pytest -n $(WORKERS) --dist worksteal $(ARGS))

lint: ## check style, format and types
	@$(call run,dev,ruff check .)
	@$(call run,dev,ruff format --check .)
	@$(call run,dev,basedpyright --pythonpath "$$python")

format: ## format the code and mend what ruff can
	@$(call run,dev,ruff check --fix .)
	@$(call run,dev,ruff format .)

clean: ## remove build products and caches; .venv stays
	rm -rf build dist src/*.egg-info .pytest_cache .ruff_cache .hypothesis
	find src tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
