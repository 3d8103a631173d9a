"""Where the package meets ComfyUI."""
