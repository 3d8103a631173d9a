"""A custom node pack for tests: a route that says which files the server has opened for reading since it was asked."""

import sys

from aiohttp import web
from server import PromptServer

_opened = []


def _note(event, arguments):
    if event == "open" and isinstance(arguments[0], str):
        _opened.append(arguments[0])


sys.addaudithook(_note)


@PromptServer.instance.routes.get("/opened_files")
async def opened_files(request):
    found = sorted({*_opened})
    _opened.clear()
    return web.json_response(found)


NODE_CLASS_MAPPINGS = {}
