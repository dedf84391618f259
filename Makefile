# make demo   the whole pipeline on the embedded model: trace, train, export, offloaded generation
# make test   format, lint, types, tests, notebook; says which tests were skipped and why
# make exhaustive   the widest parametrisations, of which `make test` runs one representative each, and
#              five times as many examples of hypothesis
# make compatibility   every MoE architecture of the installed transformers; docs/compatibility.md
# make clients   stock clients (openai, LangChain, litellm, lm-eval, guidellm, npm) against the server
# make fuzz   2,000 damaged artefacts and 5,000 requests
# make test-gpu   the tests that need a CUDA device, with the python3 of that machine as it is
#
# The first two need python3 (3.11 to 3.13, with venv) only, and install the rest into .venv on first
# use, a few minutes.
# Another interpreter: make PYTHON=python3.12 demo. Arguments of the demo: make demo DEMO_ARGS=--quick

PYTHON ?= python3
DEMO_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
NOTEBOOKS := $(wildcard notebooks/*.ipynb)

.PHONY: demo test test-gpu exhaustive clients fuzz lint types tests notebooks compatibility clean

demo: $(INSTALLED)
	$(BIN)/python -m exports.demo $(DEMO_ARGS)

test: lint types tests notebooks

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(INSTALLED)
	$(BIN)/mypy

# One process a core and one thread a process: threads of two processes on one core starve each other.
tests: $(INSTALLED)
	@echo "running the tests"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -rs --durations=10

exhaustive: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "exhaustive or hypothesis" --hypothesis-profile thorough -n 2

test-gpu:
	CUDA_VISIBLE_DEVICES=0 TRITON_INTERPRET=0 $(PYTHON) -m pytest tests/gpu -q

# The clients live in an environment of their own: some pin other versions than this project.
clients: $(INSTALLED)
	$(PYTHON) -m venv build/clients
	build/clients/bin/pip install torch transformers openai langchain-openai litellm lm_eval guidellm
	npm install --prefix build/clients openai
	$(BIN)/python -m tests.clients --python build/clients/bin/python --node_modules build/clients/node_modules

fuzz: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --artefacts 2000 --requests 5000

notebooks: $(INSTALLED)
ifneq ($(NOTEBOOKS),)
	$(BIN)/python -m pytest --nbmake --nbmake-timeout=900 notebooks/
endif

compatibility: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.helpers.compatibility_table

$(INSTALLED): pyproject.toml constraints.txt hatch_build.py expertflow.py expertflow.pth expertflow.start
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[cpu,notebooks,ray,serve,dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
