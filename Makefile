# COMFYUI_PATH (and COMFYUI_PYTHON) name a ComfyUI of yours; without them a pinned one is fetched into .host/.
PYTHON ?= python3

.PHONY: demo test test-quick soak comfyui-tests help-pages lint
demo:
	@$(PYTHON) tools/host.py run tools/demo.py

PYTEST = $(PYTHON) tools/host.py run -m pytest -c tests/pytest.ini --rootdir=tests tests
test:
	@$(PYTEST)

# Within two minutes: what is pure, and one test of each capability.
test-quick:
	@$(PYTEST) -m quick

# For how many minutes, and which random choices.
MINUTES ?= 5
SEED ?= 0
soak:
	@$(PYTHON) tools/host.py run tools/soak.py --minutes $(MINUTES) --seed $(SEED)

# ComfyUI's own tests, without and with the pack.
comfyui-tests:
	@$(PYTHON) tools/host.py run tools/comfyui_tests.py

# The help pages of the nodes that are made of a table.
help-pages:
	@$(PYTHON) tools/host.py run tools/make_help.py

lint: .host/lint/installed
	@.host/lint/bin/ruff format --check --quiet .
	@.host/lint/bin/ruff check --quiet .
	@.host/lint/bin/mypy

.host/lint/installed: Makefile
	@$(PYTHON) -m venv .host/lint
	@.host/lint/bin/python -m pip install --quiet --disable-pip-version-check "ruff==0.17.*" "mypy==2.*"
	@touch $@
