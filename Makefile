# COMFYUI_PATH (and COMFYUI_PYTHON) name a ComfyUI of yours; without them a pinned one is fetched into .host/.
PYTHON ?= python3

.PHONY: demo test lint
demo:
	@$(PYTHON) tools/host.py run tools/demo.py

test:
	@$(PYTHON) tools/host.py run -m pytest -c tests/pytest.ini --rootdir=tests tests

lint: .host/lint/installed
	@.host/lint/bin/ruff format --check --quiet .
	@.host/lint/bin/ruff check --quiet .
	@.host/lint/bin/mypy

.host/lint/installed: Makefile
	@$(PYTHON) -m venv .host/lint
	@.host/lint/bin/python -m pip install --quiet --disable-pip-version-check "ruff==0.17.*" "mypy==2.*"
	@touch $@
