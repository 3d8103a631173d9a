"""DisTorch2: split a model's weights over several devices. Importing the pack changes nothing in ComfyUI."""

from . import drop_in_nodes
from .nodes import NODES

NODE_CLASS_MAPPINGS = {node.__name__: node for node in NODES}
NODE_DISPLAY_NAME_MAPPINGS = {node.__name__: node.TITLE for node in NODES}
drop_in_nodes.register(NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS)

WEB_DIRECTORY = "./web"

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
