# What to do with a checkout. Each target sets up what it needs; the second run finds it there.
#
# Which Python: PYTHON=... if given, else an active environment (virtualenv, conda), where that has torch: it is used as
# it is, and never changed. Otherwise .venv, made here from PYTHON or python3.

VENV := .venv
ACTIVE := $(filter-out $(abspath $(VENV)),$(or $(VIRTUAL_ENV),$(CONDA_PREFIX)))
GIVEN := $(or $(PYTHON),$(if $(ACTIVE),python))
FIND_TORCH := import importlib.util as util; print("found" if util.find_spec("torch") else "")
STAMP := $(VENV)/.ready$(if $(PYTHON),-$(notdir $(PYTHON)))

ifneq ($(if $(GIVEN),$(shell $(GIVEN) -c '$(FIND_TORCH)' 2>/dev/null)),)
PY := $(GIVEN)
SETUP :=
need = @$(PY) .ci/need.py $(1)
else
PY := $(VENV)/bin/python
SETUP := $(STAMP)
need =
endif

export PYTHONPATH := $(CURDIR)/src$(if $(PYTHONPATH),:$(PYTHONPATH))
RUN_TIME := torch yaml rich
TESTS := $(RUN_TIME) filelock pytest xdist hypothesis numpy
RESULTS := benchmarks/results

.PHONY: help demo test lint generate bench prove gpu-test python

help:
	@echo "make demo      see it work: on the GPU if there is one, else on the CPU"
	@echo "make test      everything that a machine without a GPU can check"
	@echo "make lint      generated/ against its templates, ruff, mypy"
	@echo "make generate  render templates/ into generated/"
	@echo "make bench     time it beside the alternatives; ARGS='--list' and others choose what"
	@echo "make prove     compile every variant for every GPU we know, and draw plans for each, without one"
	@echo "make gpu-test  every kernel against the oracle, on this machine's GPU"
	@echo "With PYTHON=... or in an active environment that has torch, that one is used; else .venv is made."

demo: $(SETUP)
	$(call need,$(RUN_TIME) numpy)
	$(PY) -m benchmarks.demo

# Triton's interpreter and its compiler cannot share a process. As many processes as cores, of one thread each.
test: export OMP_NUM_THREADS := 1
test: lint
	$(call need,$(TESTS) build hatchling matplotlib transformers)
	$(PY) -m pytest -q -n auto
	TRITON_INTERPRET=1 $(PY) -m pytest -q -n auto -m interpreter
	$(PY) -m pytest -q -n auto -m compile

lint: $(SETUP)
	$(call need,$(TESTS) jinja2 ruff mypy)
	$(PY) -m codegen --check
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

generate: $(SETUP)
	$(call need,jinja2)
	$(PY) -m codegen

bench: ARGS ?= --tier 1
bench: $(SETUP)
	$(call need,$(RUN_TIME))
	$(PY) -m benchmarks $(ARGS)

# Shared memory is compared where the compiler is the one that the database was measured with.
prove: $(SETUP) .envs/triton-3.6.0 .envs/triton-3.7.1
	$(call need,$(TESTS) triton)
	PROVE=all $(PY) -m pytest -q -n auto -m compile
	PROVE=all $(PY) -m pytest -q -n auto tests/runtime/test_fallback.py
	PROVE=all PYTHONPATH=$(CURDIR)/.envs/triton-3.6.0:$(PYTHONPATH) $(PY) -m pytest -q -n auto -m compile tests/test_tune_db.py
	PYTHONPATH=$(CURDIR)/.envs/triton-3.7.1:$(PYTHONPATH) $(PY) -m pytest -q -n auto -m "compile and toolchain"

gpu-test: $(SETUP)
	$(call need,$(TESTS) triton)
	GPU_TEST_REPORT=$(RESULTS)/gpu_tests $(PY) -m pytest -q -n auto -m "gpu and not large" tests/gpu
	GPU_TEST_REPORT=$(RESULTS)/gpu_tests_large $(PY) -m pytest -q -m "gpu and large" tests/gpu

python:
	@echo $(PY)

# Another triton, to stand in front of the same torch.
.PRECIOUS: .envs/triton-%
.envs/triton-%: $(SETUP)
	@rm -rf $@.part
	$(PY) -m pip install --quiet --no-deps --target $@.part "triton==$*"
	@mv $@.part $@

$(STAMP): BASE := $(or $(PYTHON),python3)
$(STAMP): pyproject.toml constraints.txt hatch_build.py
	@$(BASE) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed, and $(BASE) is not: name another with PYTHON=..." >&2; exit 1; }
	@echo "Setting up $(VENV): some minutes the first time"
	$(BASE) -m venv $(if $(PYTHON),--clear) $(VENV)
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@
