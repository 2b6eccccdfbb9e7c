# make demo and make test do all the set-up on a fresh machine, in .venv.
PYTHON ?= python3
VENV ?= .venv
# Which torch: on a machine without a GPU, point pip at a CPU build to save the CUDA download, for example with
# PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS.
TORCH ?= torch==2.13.0
# Two workers: interpreted kernels keep one core each busy, and two cores are what small machines have.
PYTEST_ARGS ?= -n 2 --dist loadfile
# A fine-tuned adapter to show in place of the profile fast: make demo ADAPTER=sla-0.1
ADAPTER ?=
PROMPT ?= a green dragon flying left over the sea at night
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -qq -c constraints.txt

.PHONY: demo check test test-gpu lint clean

# On a GPU the model at real length, 832 x 480 and 81 frames, so that there is something to gain; compiled, both sides.
# Adapters are of the small one. The weights of both lie in the checkout.
LONG = $(shell $(BIN)/python -c "import torch; print('embedded-long --compile' * torch.cuda.is_available())")
# Several frames at once where the decoder waits for the host.
GROUPS = $(if $(LONG),$(comma)frames=4)
comma := ,

demo: $(VENV)/.package
	$(BIN)/dit-accel generate $(if $(ADAPTER),--adapter $(ADAPTER),$(LONG) --recipe fast --steps 30 --vae channels_last,bf16$(GROUPS)) \
	  --prompt "$(PROMPT)" --compare-dense --out outputs/demo.mp4

# Before each commit: lint, types, and the tests that are not marked slow, all in about a minute and a half.
check: lint
	HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu and not slow" -x -q $(PYTEST_ARGS)

test: $(VENV)/.dev
	HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu" $(PYTEST_ARGS)

test-gpu: $(VENV)/.dev
	$(BIN)/python -m pytest -m gpu

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist models*/build models*/dist models*/*.egg-info outputs *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.torch: constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'dit-accel needs Python 3.10 or newer.')"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -qq --upgrade pip
	# torch first and alone, so that nothing else decides which build is taken.
	$(INSTALL) $(TORCH)
	touch $@

$(VENV)/.package: $(VENV)/.torch pyproject.toml
	$(INSTALL) -e ".[cli]"
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(INSTALL) -e ".[dev]"
	touch $@ $(VENV)/.package
