# COMFYUI_PATH (and COMFYUI_PYTHON) name a ComfyUI of yours; without them a pinned one is fetched into .host/.
PYTHON ?= python3

.PHONY: demo test
demo:
	@$(PYTHON) tools/host.py run tools/demo.py

test:
	@$(PYTHON) tools/host.py run -m pytest -c tests/pytest.ini --rootdir=tests tests
