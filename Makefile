# Targets for newcomers and for CI. `make` alone lists them.
MODEL ?= qwen2.5-coder-1.5b
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python -m
STAMP := $(VENV)/.installed
# These are read from make's command line only: a variable of the environment may mean something else.
given = $(if $(filter command,$(firstword $(origin $1))),$($1))
K_ := $(call given,K)
TARGET_ := $(call given,TARGET)
DRAFTER_ := $(call given,DRAFTER)
HF_ := $(call given,HF)
HFD_ := $(call given,HFD)
COUNTS_ := $(call given,COUNTS)
REQUANT_ := $(call given,REQUANT)
# One shell word, whatever is in it.
quote = '$(subst ','\'',$1)'
# TARGET and DRAFTER are paths, HF and HFD repositories of the Hub, as llama.cpp's -hf and -hfd name them.
TARGET_OPTION := $(if $(TARGET_),--target $(call quote,$(TARGET_))) $(if $(HF_),-hf $(call quote,$(HF_)))
DRAFTER_OPTION := $(if $(DRAFTER_),--draft $(call quote,$(DRAFTER_))) $(if $(HFD_),-hfd $(call quote,$(HFD_)))
ifneq ($(if $(strip $(TARGET_OPTION)),x),$(if $(strip $(DRAFTER_OPTION)),x))
$(error give both TARGET (or HF) and DRAFTER (or HFD))
endif
PAIR := $(if $(strip $(TARGET_OPTION)),$(TARGET_OPTION) $(DRAFTER_OPTION),--model $(call quote,$(MODEL)))

# What `make calibrate` makes: COUNTS=file, used by `make trim COUNTS=file`.
CALIBRATED := $(or $(COUNTS_),$(MODEL)-counts.npz)

# GCC's header for AMX names 8 of the 64 bytes that the processor reads, so GCC 12 leaves the others unwritten and llama.cpp
# built by it dies at its first batch of several tokens. Without AMX it runs on AVX-512.
ifneq ($(shell grep -sm1 amx_tile /proc/cpuinfo),)
export CFLAGS += -mno-amx-int8
export CXXFLAGS += -mno-amx-int8
endif

.PHONY: help install demo test test-all trim calibrate plan chat bench steps exact lint dist clean

help:  ## List the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  \1\t/' | expand -t 14

# pip keeps the llama.cpp that it has built, whatever CMAKE_ARGS say now.
BUILT_WITH := $(VENV)/.cmake_args
ifneq ($(CMAKE_ARGS),)
ifneq ($(CMAKE_ARGS),$(shell cat $(BUILT_WITH) 2>/dev/null))
.PHONY: $(STAMP)
BUILD = $(RUN) pip install --disable-pip-version-check -c constraints.txt --force-reinstall --no-deps --no-cache-dir \
	--no-binary llama-cpp-python llama-cpp-python && echo $(call quote,$(CMAKE_ARGS)) > $(BUILT_WITH)
endif
endif

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Error: Python 3.10 or later is needed")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing; llama-cpp-python is compiled the first time, which takes about ten minutes."
	$(BUILD)
	$(RUN) pip install --disable-pip-version-check -c constraints.txt -e '.[dev,corpus,plot,cluster]'
	@touch $@

install: $(STAMP)  ## Create .venv and install the project and its tools

demo: $(STAMP)  ## Fetch the default pair, trim and prove its drafter, see what the cut brings and whether drafting pays
	$(RUN) gguf_trim prepare --model $(call quote,$(MODEL))
	$(RUN) runner.bench demo --model $(call quote,$(MODEL))

# One process more than cores: a test that waits for a server or a child leaves its core idle. By default an idle OpenMP
# thread spins, and takes a core from the other processes.
test: $(STAMP) lint  ## Lint and the quick tests, on all cores (SmolLM2, 94 MB, is fetched once)
	OMP_WAIT_POLICY=passive $(RUN) pytest -n $$(($$(getconf _NPROCESSORS_ONLN) + 1)) --dist worksteal

test-all: test  ## Every test, also those on the default pair; slow ones measure time and run one at a time
	$(RUN) pytest -m slow

lint: $(STAMP)  ## ruff and mypy
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy

trim: $(STAMP)  ## Trim a drafter: MODEL=name, or TARGET=path DRAFTER=path, or HF=user/repo:quant HFD=user/repo; [K=] [COUNTS=] [REQUANT=]
	$(RUN) gguf_trim prepare $(PAIR) $(if $(K_),--k $(call quote,$(K_))) $(if $(COUNTS_),--counts $(call quote,$(COUNTS_))) \
	  $(if $(REQUANT_),--requant $(call quote,$(REQUANT_)))

calibrate: $(STAMP)  ## Count what the target itself says to the bundled prompts: MODEL=name [COUNTS=file]
	target=$$($(RUN) gguf_trim prepare $(PAIR) | head -n 1) && \
	$(RUN) corpus generate --target "$$target" --split calibrate -o $(call quote,$(CALIBRATED:.npz=.jsonl)) && \
	$(RUN) corpus count $(call quote,$(CALIBRATED:.npz=.jsonl)) --tokenizer "$$target" -o $(call quote,$(CALIBRATED))

plan: $(STAMP)  ## Find the fastest k and draft length for a pair on this machine: MODEL=name
	$(RUN) gguf_trim plan $(PAIR)

chat: $(STAMP)  ## Talk to a pair: MODEL=name, or TARGET=path DRAFTER=path, or HF=user/repo:quant HFD=user/repo
	$(RUN) runner.chat $(PAIR)

bench: $(STAMP)  ## Every way to decode, by turns, on all tasks of Spec-Bench (or bundled prompts); under 15 minutes
	$(RUN) runner.bench run $(PAIR) --limit 12 -n 48 \
	  -o $(call quote,$(MODEL)-bench.json) --plot $(call quote,$(MODEL)-bench.png)

steps: $(STAMP)  ## Time single steps: drafting by what is drafted from, verifying by batch size
	$(RUN) runner.bench steps $(PAIR)

exact: $(STAMP)  ## Check token by token that the output is the target's (20 prompts, about 10 minutes)
	$(RUN) runner.exact $(PAIR)

dist: $(STAMP)  ## Build sdist and wheel into dist/ and check their metadata
	$(RUN) pip install --disable-pip-version-check --quiet -c constraints.txt build twine
	rm -rf dist
	$(RUN) build --outdir dist
	$(RUN) twine check --strict dist/*

clean:  ## Remove .venv and caches of the tools (models stay in the cache folder)
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
