# `make demo` and `make test` work from a fresh clone with nothing but python3.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# constraints.txt pins what CI tests; CONSTRAINTS= installs the newest that pyproject.toml allows.
CONSTRAINTS ?= constraints.txt
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS))

.PHONY: help install demo test test-interpret test-tensorrt test-matrix engines test-slow test-gpu check lint types kernels kernels-sm90 lint-ptx bench clean

help:
	@echo "make demo   train a small model, export it to ONNX, verify it, generate from the exported graph"
	@echo "make test   the tests (make test-slow, test-gpu, kernels: the rest)"
	@echo "make check  lint and types"
	@echo "make bench  benchmarks"

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -e '.[onnx,train,dev]'
	@touch $@

install: $(STAMP)

demo: $(STAMP)
	$(BIN)/mom-compile demo $(DEMO_ARGS)

PYTEST := $(BIN)/python -m pytest
# One process per core (the tests themselves use one thread), a file in one process: its fixtures are shared. The files
# in conftest's order.
PARALLEL := -n auto --dist loadfile --no-loadscope-reorder

test: $(STAMP)
	$(PYTEST) $(PARALLEL) -m "not slow and not gpu and not kernels and not tensorrt"
	$(MAKE) test-interpret

# The operators' own tests once more, through the Triton kernels, interpreted on the CPU.
test-interpret: $(STAMP)
	TRITON_INTERPRET=1 $(PYTEST) $(PARALLEL) -m "not slow and not gpu and not kernels and not tensorrt" $(INTERPRETED)

INTERPRETED := tests/test_route.py tests/test_dispatch.py tests/test_row_ops.py tests/test_memory_rule.py \
	tests/test_decode_step.py tests/test_decode_linear.py tests/test_linear_cross_entropy.py \
	tests/test_guard_bands.py tests/test_conv_qkv.py tests/test_small_linear.py tests/test_kernel_prefill.py \
	tests/test_kernel_graphs.py

# TensorRT for RTX (95 MB) and engines built with no GPU; `make engines`: of the demonstration's model.
TENSORRT := $(VENV)/.tensorrt

$(TENSORRT): $(STAMP)
	$(INSTALL) -e '.[tensorrt-rtx]'
	@touch $@

test-tensorrt: $(TENSORRT)
	$(PYTEST) -n auto --dist loadgroup -m "tensorrt and not slow"

engines: $(TENSORRT)
	test -d runs/demo || $(MAKE) demo
	for precision in float32 float16; do \
		$(BIN)/mom-compile export runs/demo runs/demo-tensorrt-$$precision --to tensorrt --precision $$precision || exit 1; \
	done

# Every combination of the layer's settings through the export targets; goes on where it was interrupted.
test-matrix: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/export_matrix.py --jobs 2

test-slow: $(STAMP)
	$(PYTEST) $(PARALLEL) -m "slow and not kernels"
	TRITON_INTERPRET=1 $(PYTEST) $(PARALLEL) -m "slow and not gpu" $(INTERPRETED)

# The operators' and the model's own tests with every tensor on the GPU, and those that only a GPU can run.
test-gpu: $(STAMP)
	MOM_TEST_DEVICE=cuda $(PYTEST) $(INTERPRETED) tests/test_opcheck.py tests/test_model.py tests/test_compile.py \
		tests/test_decode.py tests/test_state_ops.py
	$(PYTEST) -m gpu

# Every kernel configuration: for sm_90 (of float32 what differs, see the test), and all for every architecture.
kernels-sm90: $(STAMP)
	$(PYTEST) -n auto --dist worksteal -m "kernels and not slow" -k sm90

# The same for another Triton, laid over the environment: make lint-ptx TRITON=3.6.0
TRITON ?= 3.6.0
OVER := $(VENV)/triton-$(TRITON)
lint-ptx: $(STAMP)
	$(PYTHON) -m venv $(OVER)
	$(OVER)/bin/python -m pip install --disable-pip-version-check --no-deps triton==$(TRITON)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_paths()["purelib"])' \
		> $$($(OVER)/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/environment.pth
	$(OVER)/bin/python -m pytest -n auto --dist worksteal -k "sm90 and bfloat16" tests/test_kernels_compile.py
	$(OVER)/bin/python -m pytest tests/test_ptx_lint.py

kernels: $(STAMP)
	$(PYTEST) -n auto --dist worksteal -m kernels

check: lint types

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/mom-compile bench operators $(BENCH_ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
