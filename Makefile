# `make demo` and `make test` do all the set-up themselves: Python 3.11 or later is all they need.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The CPU build of torch suffices for both; on a machine with a GPU install your own torch first and pass TORCH=torch.
TORCH ?= torch==2.13.0

.PHONY: demo test check gpu bench clean

$(BIN)/activate:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.installed: $(BIN)/activate pyproject.toml
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

demo: $(VENV)/.installed  ## Quantize the embedded demo at 2 bits, say what it cost, and let it speak
	$(BIN)/quantkit quantize demo --method slim --bits 2 -o out/demo-slim-2b --overwrite
	$(BIN)/quantkit eval out/demo-slim-2b --reference demo --limit 16
	$(BIN)/quantkit generate out/demo-slim-2b --prompt "Return the" --max-new-tokens 24

test: $(VENV)/.installed-dev  ## The whole CPU suite
	$(BIN)/python -m pytest

check: $(VENV)/.installed-dev  ## Format, lint, types, import contract, then the suite
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest

# Most of its time goes to compiling kernels, one after the other: `make gpu JOBS=16` shares it (with pytest-xdist).
gpu:  ## The GPU suite, with the Python that has a CUDA torch
	$(PYTHON) -m pytest -m gpu $(if $(JOBS),-p no:benchmark -n $(JOBS) --dist worksteal) $$(grep -rlE "mark\.gpu" tests --include="test_*.py")

bench:  ## Timings of kernels and of decoding, against what else is installed; needs a GPU
	$(PYTHON) -m quantkit bench kernels
	$(PYTHON) -m quantkit bench decode

clean:
	rm -rf $(VENV) out build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
