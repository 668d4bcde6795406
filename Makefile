# Two commands do everything: `make demo` and `make test`. Both set up what they need in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PROCESSES ?= 2
export OMP_WAIT_POLICY := PASSIVE
export GOMP_SPINCOUNT := 0

.PHONY: demo test check browser etcd setup-dynamo docs bench bench-serve bench-text clean

demo: $(VENV)/.run
	$(BIN)/stepwell generate --prompt "a small red circle on a white background" --seed 1
	$(BIN)/stepwell generate --prompt "two green triangles on a black background" --seed 1
	$(BIN)/stepwell generate --prompt "a purple star at the top" --seed 2
	$(BIN)/stepwell generate --model-path stepwell/tiny-wan --prompt "a large red circle moving right on a white background" --seed 1
	$(BIN)/stepwell generate --model-path stepwell/tiny-llada --prompt "Hello! How are you?"
	$(BIN)/stepwell generate --model-path stepwell/tiny-llada --prompt "Describe: purple star, medium, white background, top"

test: $(VENV)/.dev browser etcd
	@$(MAKE) --no-print-directory setup-dynamo || echo "Dynamo can't be installed here; its tests are skipped"
	$(BIN)/python -m pytest -n $(PROCESSES) --dist loadfile --timeout 300 -m 'not long and not clock'
	$(BIN)/python -m pytest --timeout 300 -m 'clock and not long'

# Debian's Chromium plays the videos that a server serves; without it those tests are skipped
browser:
	@command -v chromium >/dev/null || { test "$$(id -u)" = 0 && apt-get update -qq && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium >/dev/null; } || \
	  echo "chromium can't be installed here (it takes root and apt); tests that need a browser are skipped"

# Debian's etcd, by which workers for Dynamo find one another across hosts; without it that test is skipped
etcd:
	@command -v etcd >/dev/null || { test "$$(id -u)" = 0 && apt-get update -qq && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends etcd-server >/dev/null; } || \
	  echo "etcd can't be installed here (it takes root and apt); tests that need it are skipped"

# NVIDIA Dynamo's frontend and runtime, for stepwell worker
setup-dynamo: $(VENV)/.dynamo

# --no-deps: its other dependencies are those of planners and profilers, and one is fetched from beyond the package index
$(VENV)/.dynamo: $(VENV)/.run
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps ai-dynamo==1.6.1 ai-dynamo-runtime==1.6.1
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt 'uvloop>=0.21' 'zstandard<1' packaging typing-extensions
	touch $@

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m stepwell.config.render --check

docs: $(VENV)/.dev
	$(BIN)/python -m stepwell.config.render

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks.run

bench-serve: $(VENV)/.dev
	$(BIN)/python -m benchmarks.serve

bench-text: $(VENV)/.dev
	$(BIN)/python -m benchmarks.text

clean:
	rm -rf $(VENV) build dist outputs

# torch first and pinned: an open range would bring a build with gigabytes of GPU libraries
$(VENV)/.run: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.dev: $(VENV)/.run
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
