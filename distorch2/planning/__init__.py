"""What is to lie where, and when it is to be there: neither torch nor ComfyUI."""
