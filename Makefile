# make run / make test need python3 (3.11 or newer), pip and make; everything else is installed into .venv.
PYTHON ?= python3
VENV := .venv
LEGACY := .legacy
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
ARGS ?=
EXTRAS ?= nf4,gptq,exl2
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)

.PHONY: run test services fuzz soak sanitize lint ui bench legacy clean

run: $(VENV)/run.stamp  ## measure: make run ARGS="-m quant=none,nf4"
	@$(BIN)/python runner.py $(ARGS)

test: $(VENV)/dev.stamp  ## the whole CPU test suite, a file of it in one process
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile $(ARGS)

services: $(VENV)/dev.stamp  ## many writers at once: SQLite, and an MLflow server on PostgreSQL, which this installs
	@ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || \
		{ $(SUDO) apt-get -qq update && $(SUDO) apt-get -qq install -y postgresql; }
	$(BIN)/python -m pytest -m services $(ARGS)

fuzz: $(VENV)/dev.stamp  ## ten thousand strange calls and damaged files; some minutes
	$(BIN)/python -m pytest tests/test_fuzz.py --hypothesis-profile=fuzz --hypothesis-show-statistics $(ARGS)

soak: $(VENV)/dev.stamp  ## a sweep of 500 cells, or of RFLOOR_SOAK_CELLS: an hour
	$(BIN)/python -m pytest tests/test_soak.py -m soak $(ARGS)

# Each kernel and each ending, mostly on small shapes; nothing that is captured, which takes the allocator's cache.
SANITIZED := full_forward or multiplies or ending or four_bits or other_shapes or not_written or stranger or \
	every_part or choice

# Without that cache each tensor is an allocation of its own: past its end there is nothing that could be read unseen.
# Races are looked for with all four streams: with fewer, warps read zeros that each of them writes to one place.
sanitize: $(VENV)/dev.stamp  ## compute-sanitizer over the kernels of fused and int4, on a GPU
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 \
		$(BIN)/python -m pytest tests/test_int4.py tests/test_fused.py -k "$(SANITIZED)" $(ARGS)
	compute-sanitizer --tool racecheck --error-exitcode 9 --kernel-name kernel_substring=int4_product \
		$(BIN)/python -m pytest tests/test_int4.py -k "ending and streams4" $(ARGS)

lint: $(VENV)/dev.stamp  ## ruff, and mypy strict on registry and backends
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

ui: $(VENV)/run.stamp  ## the MLflow UI over mlflow.db, on loopback
	$(BIN)/mlflow ui --backend-store-uri sqlite:///mlflow.db --host 127.0.0.1 $(ARGS)

bench: $(VENV)/dev.stamp  ## what rfloor itself costs: start-up, planning, records, tracking
	$(BIN)/python -m pytest bench -o addopts="" --benchmark-only $(ARGS)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip

$(VENV)/run.stamp: $(BIN)/python pyproject.toml constraints.txt
	@echo "Installing rfloor into $(VENV); the first time takes some minutes."
	rm -rf rfloor.egg-info  # an old one would hide new plugins from whoever runs in this folder
	$(INSTALL) --editable ".[$(EXTRAS)]"
	@touch $@

$(VENV)/dev.stamp: $(VENV)/run.stamp
	$(INSTALL) --editable ".[dev]"
	@touch $@

legacy: $(LEGACY)/stamp  ## autoawq and auto-gptq, abandoned upstream, in an environment of their own

$(LEGACY)/stamp: legacy.txt
	@echo "Installing transformers 4.51, autoawq and auto-gptq into $(LEGACY)."
	$(PYTHON) -m venv $(LEGACY)
	$(LEGACY)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(LEGACY)/bin/python -m pip install --quiet --disable-pip-version-check --requirement legacy.txt
	$(LEGACY)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps autoawq==0.2.9
	BUILD_CUDA_EXT=0 $(LEGACY)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--no-build-isolation --no-binary auto-gptq auto-gptq==0.7.1
	@touch $@

clean:
	rm -rf $(VENV) $(LEGACY) .pytest_cache .mypy_cache .ruff_cache
