# Two commands from an empty checkout: `make demo` and `make test`.
PYTHON ?= python3
TORCH ?= 2.13.0
VENV ?= .venv

python = $(VENV)/bin/python
# Nothing installed later may bring another torch. A CPU torch brings no Triton, which the interpreter and the
# ahead-of-time tests need; a CUDA torch brings the one that fits it.
pip = $(python) -m pip install --disable-pip-version-check --constraint $(VENV)/constraints.txt
TRITON = 3.6.0

.PHONY: demo test test-torches test-triton guard sanitize fuzz-generation fuzz-encoders build lint types docs wheel clean

demo: build $(VENV)/.demo
	$(VENV)/bin/bigkernels demo

# One worker a core; `make test PYTEST_ARGS="-n 0 tests/ops"` runs some of it in one process.
test: build $(VENV)/.test
	$(python) -m pytest -n auto --dist loadgroup $(PYTEST_ARGS)

# Random and hostile calls of every operator under an allocator that closes the pages around each tensor.
guard: build $(VENV)/.test
	$(python) tests/guard/run.py --calls 50000 $(GUARD_ARGS)

# The CPU library under AddressSanitizer and UndefinedBehaviorSanitizer: its tests, and 10,000 random and hostile calls.
sanitize: build $(VENV)/.test
	$(python) tools/sanitize.py $(SANITIZE_ARGS)

# Random small language models: what patched ones give against their modules.
fuzz-generation: build $(VENV)/.test
	PYTHONPATH=tests $(python) -W ignore tests/program/fuzz.py --count 500 $(FUZZ_ARGS)

fuzz-encoders: build $(VENV)/.test
	PYTHONPATH=tests $(python) -W ignore tests/program/fuzz_encoders.py --cases 300 $(FUZZ_ARGS)

# On the oldest torch that is supported, the pinned one and the newest, in environments of their own.
test-torches:
	$(PYTHON) tools/test_torches.py

# The ahead-of-time tests of the GPU kernels with another Triton, beside the environment's own: `make test-triton`.
OTHER_TRITON ?= 3.8.0
other = $(VENV)-triton-$(OTHER_TRITON)
test-triton: build $(VENV)/.test
	$(python) -m venv $(other)
	$(other)/bin/python -m pip install --disable-pip-version-check --no-deps triton==$(OTHER_TRITON)
	$(python) -c "import sysconfig; print(sysconfig.get_path('purelib'))" > $(other)/shared.pth
	mv $(other)/shared.pth "$$($(other)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")"
	PYTHONPATH=. $(other)/bin/python -m pytest -q -p no:xdist tests/test_triton_aot.py tests/test_hopper.py $(PYTEST_ARGS)

# Incremental: seconds after a change to one kernel.
build: $(VENV)/.install
	$(python) setup.py -q build_ext --inplace

wheel: $(VENV)/.torch
	$(python) -m pip wheel --no-deps --no-build-isolation --wheel-dir dist .

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs $(VENV)/bin/clang-format --dry-run --Werror

types: $(VENV)/.dev $(VENV)/.test
	$(VENV)/bin/mypy

# The site, in build/site. A broken link, an anchor that is not there or a page that nobody links to is an error.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

clean:
	rm -rf build dist *.egg-info bigkernels/*.so bigkernels/_*not_compiled.txt

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	echo "torch==$(TORCH)" > $(VENV)/constraints.txt
	$(pip) --upgrade pip "setuptools>=77" wheel cmake ninja pybind11
	$(pip) torch==$(TORCH)
	touch $@

# Installed once in development mode without isolation, so that `build` goes on with the same tools.
$(VENV)/.install: $(VENV)/.torch pyproject.toml setup.py
	$(pip) --no-build-isolation --editable .
	touch $@

$(VENV)/.demo: $(VENV)/.install
	$(pip) --no-build-isolation --editable .[demo]
	touch $@

$(VENV)/.test: $(VENV)/.install
	$(python) -c "import triton" 2> /dev/null || $(pip) triton==$(TRITON)
	$(pip) --no-build-isolation --editable .[test]
	touch $@

$(VENV)/.dev: $(VENV)/.install
	$(pip) --no-build-isolation --editable .[dev]
	touch $@

$(VENV)/.docs: $(VENV)/.install
	$(pip) --no-build-isolation --editable .[docs]
	touch $@
