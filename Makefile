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

# What test-cross compiles with besides the installed Triton.
OLD_TRITON ?= 3.6.0

# $(call run,EXTRA,ARGUMENTS): python ARGUMENTS on this checkout, where EXTRA's requirements are installed, and those of
# the CPU kernels if they can be.
define run
python="$$($(PYTHON) scripts/bootstrap.py $(1) --wish cpu $(if $(TORCH),--torch '$(TORCH)'))" && \
export PYTHONPATH="$(CURDIR)/src$${PYTHONPATH:+:$$PYTHONPATH}" && set -x && "$$python" $(2)
endef

.PHONY: help bench test test-interpreter test-gpu test-perf test-cross lint format clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 24
	@printf '%s\n' '' "  ARGS='...' goes to the command, for instance:" \
		"  make bench ARGS='--formats int4_sym --mode full'" "  make test ARGS='-k packaging'"

bench: ## measure a prefill of the recorded workload on this machine
	@$(call run,bench,-m qexperts bench prefill $(ARGS))

# $(interpreter): pytest on the tests that run the kernels in Triton's interpreter, which needs a process of its own.
define interpreter
export OMP_NUM_THREADS=$(THREADS) TRITON_INTERPRET=1; \
$(call run,test,-m pytest -n $(WORKERS) --dist worksteal tests/interpreter $(ARGS))
endef

# ARGS may select no test of the second command: pytest exits with 5.
test: ## run the tests, those in Triton's interpreter too
	@export OMP_NUM_THREADS=$(THREADS); $(call run,test,-m pytest -n $(WORKERS) --dist worksteal $(ARGS))
	@$(interpreter) || [ $$? -eq 5 ]

test-interpreter: ## run the tests in Triton's interpreter alone
	@$(interpreter)

test-gpu: ## run the tests that need a GPU
	@$(call run,test,-m pytest -m gpu $(ARGS))

test-perf: ## time a tiny model against transformers' own experts; QEXPERTS_PERF_MODEL=DIRECTORY times another
	@$(call run,test,-m pytest -m perf $(ARGS))

test-cross: ## compile every kernel for every target with two releases of Triton; takes half an hour
	@$(call run,test,tests/cross.py --jobs $(WORKERS) --triton installed $(OLD_TRITON) $(ARGS))

lint: ## check style, format and types
	@$(call run,dev,-m ruff check .)
	@$(call run,dev,-m ruff format --check .)
	@$(call run,dev,-m basedpyright --pythonpath "$$python")

format: ## format the code and mend what ruff can
	@$(call run,dev,-m ruff check --fix .)
	@$(call run,dev,-m ruff format .)

clean: ## remove build products and caches; .venv stays
	rm -rf build dist src/*.egg-info .pytest_cache .ruff_cache .hypothesis
	find src tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
