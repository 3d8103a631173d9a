"""DisTorch2: split a model's weights over several devices. Importing the pack changes nothing in ComfyUI."""

from . import drop_in_nodes, routes
from .nodes import NODES

_drop_ins = drop_in_nodes.available()
# The checkpoint loader has the name of one of ComfyUI-MultiGPU's too.
_own = {node.__name__: node for node in NODES if _drop_ins or "MultiGPU" not in node.__name__}
NODE_CLASS_MAPPINGS = _own | _drop_ins
NODE_DISPLAY_NAME_MAPPINGS = {name: node.TITLE for name, node in NODE_CLASS_MAPPINGS.items()}
if _drop_ins:
    drop_in_nodes.add_later_ones()

routes.add_routes()

WEB_DIRECTORY = "./web"

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
