# make demo: stream a real Llama from disk.   make test: the suite that needs no GPU.
# Both set up all they need in .venv; `make help` lists the rest.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
READY := $(VENV)/.ready
NATIVE_SOURCES := $(wildcard csrc/*)

.PHONY: help demo test test-full test-oldest test-tritons test-triton-oldest test-triton-newest canary check bench bench-gpu soak
.PHONY: clean install system csrc-test csrc-sanitize
.DEFAULT_GOAL := help

help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo: install ## pack SmolLM2 and stream it from disk, none of its layers resident
	$(BIN)/mhaffn demo

test: install csrc-test ## everything that needs no GPU, in minutes
	$(BIN)/python -m pytest

test-full: install csrc-test csrc-sanitize test-oldest test-tritons ## long matrices, sanitizers, soaks, old and new libraries
	$(BIN)/python -m pytest -m "slow and not gpu" --timeout 900

TRANSFORMERS_TESTS := $(addprefix tests/test_,$(addsuffix .py,hf stream stream_memory stream_ends replace replace_left \
  replace_restore attention_interface integrations streamed meta cache))

OLDEST := .venv-oldest
test-oldest: install
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install -q torch==$$(sed -n 's/^torch==//p' constraints.txt)
	grep -vE '^(transformers|tokenizers|huggingface_hub)==' constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install -q -e '.[test]' transformers==5.17.0 -c $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pytest $(TRANSFORMERS_TESTS) -p no:cacheprovider

CANARY := .venv-canary
canary: install ## the newest transformers, supported or not: tells, and fails nothing
	$(PYTHON) -m venv $(CANARY)
	$(CANARY)/bin/python -m pip install -q torch==$$(sed -n 's/^torch==//p' constraints.txt)
	grep -vE '^(transformers|tokenizers|huggingface_hub)==' constraints.txt > $(CANARY)/constraints.txt
	$(CANARY)/bin/python -m pip install -q -e '.[test]' -c $(CANARY)/constraints.txt
	-$(CANARY)/bin/python -m pip install -q --upgrade transformers
	-$(CANARY)/bin/python -m pytest $(TRANSFORMERS_TESTS) -p no:cacheprovider

# Every shipped tile for every architecture, compiled by the oldest supported Triton and by the newest, which only have
# to be found before the installed one: 4 minutes on two cores. float16 has bfloat16's tiles.
test-tritons: install
	$(MAKE) -j2 test-triton-oldest test-triton-newest

test-triton-oldest: TRITON := triton==3.6.0
test-triton-newest: TRITON := triton
test-triton-oldest test-triton-newest: test-triton-%: install
	$(PIP) install -q --no-deps --upgrade --target build/triton-$* $(TRITON)
	PYTHONPATH=build/triton-$* $(BIN)/python -c 'import triton; print(triton.__version__, triton.__file__)'
	PYTHONPATH=build/triton-$* $(BIN)/python -m pytest tests/kernels/test_compile.py -k "shipped and (bfloat16 or float32)" -m "slow or not slow"

soak: install ## ten minutes of reads, watching memory and descriptors
	$(BIN)/python tests/soak_reader.py --seconds 600

check: install ## ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror csrc/*.h csrc/*.cpp tests/csrc/*.h tests/csrc/*.cpp

# One file of results a machine, in which a run's rows take the places of earlier ones. ONLY names files, MORE takes
# options, say MORE=--basetemp=/mnt/nvme/bench for another disk. After Ctrl-C what was measured is kept too.
ONLY ?= bench
define BENCH
@mkdir -p build && rm -f build/bench.json; trap : INT; \
$(BIN)/python -m pytest $(ONLY) --benchmark-only $(MORE) -m $(1) --benchmark-json=build/bench.json; code=$$?; \
$(BIN)/python bench/merge_results.py build/bench.json \
  bench/results/$$($(BIN)/python -c 'from mhaffn.machine import file_name; print(file_name("$(2)"))').json; exit $$code
endef

bench: install ## pytest-benchmark on this machine's processor and disk
	$(call BENCH,"not gpu",cpu)

bench-gpu: install ## pytest-benchmark on its GPU, beside other kernels and tools
	$(call BENCH,gpu,cuda)

csrc-test: install
	$(MAKE) -C tests/csrc test

csrc-sanitize: install
	$(MAKE) -C tests/csrc asan tsan

install: $(READY)

$(READY): pyproject.toml setup.py constraints.txt $(NATIVE_SOURCES) | system
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q torch==$$(sed -n 's/^torch==//p' constraints.txt)
	$(PIP) install -v --config-settings editable_mode=compat -e '.[test,bench,demo,check]' -c constraints.txt > $(VENV)/install.log 2>&1 || (tail -40 $(VENV)/install.log; false)
	@grep -h '^ *mhaffn: building' $(VENV)/install.log
	@touch $@

# Headers and venv support come through apt when root; otherwise the one command is shown, and what can do
# without goes on (without liburing: the preadv engine alone).
system:
	@missing=""; \
	$(PYTHON) -c 'import ensurepip' 2>/dev/null || missing="$$missing python3-venv"; \
	$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_paths()["include"] + "/Python.h"))' \
	  || missing="$$missing python3-dev"; \
	echo '#include <liburing.h>' | $${CXX:-c++} -E -x c++ - >/dev/null 2>&1 || missing="$$missing liburing-dev"; \
	if [ -z "$$missing" ] || [ -e $(READY) ]; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "installing$$missing"; apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $$missing >/dev/null; \
	else echo "missing:$$missing. As root: apt-get install$$missing"; \
	  case "$$missing" in *python3*) exit 1;; *) echo "going on without io_uring";; esac; fi

clean: ## remove what installs and builds made
	rm -rf $(VENV) $(OLDEST) $(CANARY) build dist *.egg-info mhaffn/*.so
