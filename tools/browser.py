"""ComfyUI's front end in a headless Chromium, used with mouse and keyboard as a person would. Needs playwright."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from comfy_server import ComfyServer
from host import find_browser
from playwright.sync_api import Browser, Locator, Page, TimeoutError, sync_playwright

# A container has no sandbox of its own and no GPU; the rest keeps the browser from calling home.
_ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
_TIMEOUT_MS = 30_000
# No tutorial over the canvas, and nothing in front of the nodes in a picture.
_SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False, "Comfy.Graph.CanvasInfo": False}
# While the front end starts or opens a dropped file it puts a mask over the page, which swallows clicks. A mask that is
# taken away while it still fades in stays for good.
_NO_ANIMATION = ".p-blockui-mask { animation: none !important; }"
# The last thing that the front end does when it starts is to open a workflow.
_READY = """() => window.app?.extensionManager?.workflow?.activeWorkflow && !app.extensionManager.spinner
    && !document.querySelector(".p-blockui-mask")"""


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless Chromium."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=list(_ARGUMENTS))
        yield browser
        browser.close()


class FrontEnd:
    """A page with the front end of a running server, in the classic renderer or in Nodes 2.0.

    `page` is playwright's. `complaints` are the errors in the console and the requests to the server that failed.
    """

    def __init__(
        self,
        browser: Browser,
        server: ComfyServer,
        nodes_2: bool = False,
        width: int = 1500,
        height: int = 900,
        pixels_per_point: float = 1,
    ) -> None:
        for name, value in (_SETTINGS | {"Comfy.VueNodes.Enabled": nodes_2}).items():
            server.post(f"/api/settings/{name}", value)
        self.url = server.url
        self.nodes_2 = nodes_2
        self.complaints: list[str] = []
        size = {"width": width, "height": height}
        self.page: Page = browser.new_page(viewport=size, device_scale_factor=pixels_per_point)
        self.page.set_default_timeout(_TIMEOUT_MS)
        self.page.on("console", lambda message: message.type == "error" and self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(f"{error}\n{error.stack}"))
        self.page.on("requestfailed", lambda request: self._complain_about(request.url, "failed"))
        self.page.on(
            "response", lambda answer: answer.ok or self._complain_about(answer.url, f"status {answer.status}")
        )
        self.page.goto(self.url)
        self.page.add_style_tag(content=_NO_ANIMATION)
        self.page.wait_for_function(_READY)

    def load(self, workflow: dict[str, Any], name: str) -> None:
        """Open a workflow in UI format in a tab of its own."""
        self._run("([graph, name]) => app.loadGraphData(graph, true, true, name)", [workflow, name])
        self.settle()

    def load_api(self, prompt: dict[str, Any], name: str) -> None:
        """Open a workflow in API format."""
        self._run("([prompt, name]) => app.loadApiJson(prompt, name)", [prompt, name])
        self.settle()

    def drop_file(self, name: str, text: str) -> None:
        """Drop a workflow file on the canvas, and wait for it."""
        self.page.evaluate(
            """([name, text]) => {
                const dataTransfer = new DataTransfer();
                dataTransfer.items.add(new File([text], name, {type: "application/json"}));
                const [clientX, clientY] = [innerWidth / 2, innerHeight / 2];
                app.canvas.canvas.dispatchEvent(
                    new DragEvent("drop", {dataTransfer, clientX, clientY, bubbles: true, cancelable: true}));
            }""",
            [name, text],
        )
        # Its name is that of the open workflow once its graph is on the canvas.
        opened = "(name) => app.extensionManager.workflow.activeWorkflow?.fullFilename === name"
        self.page.wait_for_function(opened, arg=name)
        self.settle()

    def export(self) -> dict[str, Any]:
        """What File > Export (API) saves."""
        return self._run("async () => (await app.graphToPrompt()).output")

    def save(self) -> dict[str, Any]:
        """What File > Save saves."""
        # Through JSON, which drops what is undefined.
        return self._run("async () => JSON.parse(JSON.stringify((await app.graphToPrompt()).workflow))")

    def queue(self) -> tuple[int, dict[str, Any]]:
        """Queue what is on the canvas; the HTTP status and the JSON of the server's answer."""
        with self.page.expect_response(lambda answer: answer.url.endswith("/prompt")) as answered:
            self.page.evaluate("() => void app.queuePrompt(0)")
        return answered.value.status, answered.value.json()

    def open_error(self, input_name: str) -> Locator:
        """Open the panel of errors, and in it what is said about an input; the element with that text."""
        self.page.get_by_test_id("error-overlay-see-errors").click()
        panel = self.page.get_by_test_id("properties-panel")
        button = panel.get_by_role("button", name=re.compile(f"^Info .*{input_name}"))
        shown_at_once = panel.get_by_text(f"{input_name}: ").first  # by older front ends (1.44)
        button.or_(shown_at_once).first.wait_for()
        if not button.count():
            return shown_at_once
        button.click()
        return panel.locator(f"[id='{button.get_attribute('aria-controls')}']")

    def open_help(self, node_id: str) -> Locator:
        """Open the help of a node from its toolbox; the element with the page."""
        self.show(node_id)
        x, y = self.title_position(node_id)
        self.page.mouse.click(x, y)
        self.page.get_by_test_id("info-button").click()
        return self.page.locator(".node-help-content")

    def search(self, text: str) -> Locator:
        """The results of the search for nodes that a double click on the empty canvas opens."""
        box = self.page.get_by_placeholder("Add a node")
        for _ in range(5):  # on a busy machine the canvas may see two single clicks
            everything = self.rectangle()
            self.page.mouse.dblclick(everything["x"] + 30, everything["y"] + everything["height"] + 60)
            with suppress(TimeoutError):
                box.wait_for(timeout=3000)
                break
        box.fill(text)
        return self.page.get_by_test_id("result-item")

    @property
    def tooltips(self) -> Locator:
        """The tooltips on the page."""
        # That of the classic renderer has no role.
        return self.page.get_by_role("tooltip") if self.nodes_2 else self.page.locator(".node-tooltip")

    def hover_widget(self, node_id: str, name: str) -> None:
        """Move the mouse over a widget."""
        if self.nodes_2:
            self._show_advanced(node_id)
            self.dom_node(node_id).get_by_test_id("widget-layout-field-label").get_by_text(name).hover()
        else:
            self._hover(*self.widget_position(node_id, name))

    def hover_output(self, node_id: str, index: int) -> None:
        """Move the mouse over an output."""
        if self.nodes_2:
            self.dom_node(node_id).locator(".lg-slot--output").nth(index).hover()
            return
        position = """([id, index]) => {
            const {left, top} = app.canvas.canvas.getBoundingClientRect();
            const [x, y] = app.canvas.ds.convertOffsetToCanvas(app.graph.getNodeById(id).getOutputPos(index));
            return [x + left, y + top];
        }"""
        self._hover(*self.page.evaluate(position, [node_id, index]))

    def settle(self) -> None:
        """Wait until what was changed is drawn."""
        self._run("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def show(self, node_id: str, x: float = 120, y: float = 160, scale: float = 1) -> None:
        """Move the canvas until the node's body starts at this place of the page."""
        self.page.evaluate(
            """([id, x, y, scale]) => {
                const {left, top} = app.canvas.canvas.getBoundingClientRect();
                const {ds, graph} = app.canvas;
                const {pos} = graph.getNodeById(id);
                ds.scale = scale;
                ds.offset = [(x - left) / scale - pos[0], (y - top) / scale - pos[1]];
                app.canvas.setDirty(true, true);
            }""",
            [node_id, x, y, scale],
        )
        self.settle()

    def rectangle(self, node_ids: list[str] | None = None) -> dict[str, float]:
        """The part of the page that these nodes (or all) cover with their titles, as playwright's `clip` takes it."""
        return self.page.evaluate(
            """(ids) => {
                const {left, top} = app.canvas.canvas.getBoundingClientRect();
                const {ds, graph} = app.canvas;
                const boxes = graph.nodes.filter((node) => !ids || ids.includes(String(node.id)))
                    .map((node) => node.getBounding());
                const x = Math.min(...boxes.map((box) => box[0]));
                const y = Math.min(...boxes.map((box) => box[1]));
                const right = Math.max(...boxes.map((box) => box[0] + box[2]));
                const bottom = Math.max(...boxes.map((box) => box[1] + box[3]));
                const [cornerX, cornerY] = ds.convertOffsetToCanvas([x, y]);
                const [width, height] = [(right - x) * ds.scale, (bottom - y) * ds.scale];
                return {x: cornerX + left, y: cornerY + top, width, height};
            }""",
            node_ids,
        )

    def dom_node(self, node_id: str) -> Locator:
        """The element of a node (Nodes 2.0)."""
        return self.page.locator(f'[data-node-id="{node_id}"]')

    def widget_names(self, node_id: str) -> list[str]:
        """Names of the widgets that a person sees on the node, those of its advanced inputs too."""
        if not self.nodes_2:
            return self.page.evaluate(
                """(id) => {
                    const node = app.graph.getNodeById(id);
                    return node.widgets.filter((widget) => node.isWidgetVisible(widget)).map(({name}) => name);
                }""",
                node_id,
            )
        self._show_advanced(node_id)
        return self.dom_node(node_id).get_by_test_id("widget-layout-field-label").all_inner_texts()

    def set_widget(self, node_id: str, name: str, value: str | float) -> None:
        """Give a widget a value by mouse and keyboard."""
        self.show(node_id)
        if self.nodes_2:
            self._set_dom_widget(node_id, name, value)
        else:
            self._set_canvas_widget(node_id, name, value)
        self.settle()

    def title_position(self, node_id: str) -> tuple[float, float]:
        """A place on a node's title."""
        box = self.rectangle([node_id])
        return box["x"] + box["width"] / 2, box["y"] + 15

    def widget_position(self, node_id: str, name: str) -> tuple[float, float]:
        """The middle of a widget on the page (classic)."""
        return tuple(
            self.page.evaluate(
                """([id, name]) => {
                    const {left, top} = app.canvas.canvas.getBoundingClientRect();
                    const node = app.graph.getNodeById(id);
                    const widget = node.widgets.find((candidate) => candidate.name === name);
                    const middle = [node.pos[0] + node.size[0] / 2, node.pos[1] + widget.y + 10];
                    const [x, y] = app.canvas.ds.convertOffsetToCanvas(middle);
                    return [x + left, y + top];
                }""",
                [node_id, name],
            )
        )

    def _run(self, function: str, argument: Any = None) -> Any:
        """What an asynchronous function of the page gives. playwright would wait for it without end."""
        late = f"new Promise((_, fail) => setTimeout(() => fail(new Error('not done in time')), {_TIMEOUT_MS}))"
        return self.page.evaluate(f"(argument) => Promise.race([({function})(argument), {late}])", argument)

    def _complain_about(self, url: str, problem: str) -> None:
        if url.startswith(self.url):
            self.complaints.append(f"{problem}: {url}")

    def _set_canvas_widget(self, node_id: str, name: str, value: str | float) -> None:
        self.page.mouse.click(*self.widget_position(node_id, name))
        menu, dialog = self.page.locator(".litecontextmenu"), self.page.locator(".graphdialog input")
        menu.or_(dialog).first.wait_for()
        if menu.count():
            menu.get_by_text(str(value), exact=True).click()
        else:
            dialog.fill(str(value))
            dialog.press("Enter")

    def _set_dom_widget(self, node_id: str, name: str, value: str | float) -> None:
        self._show_advanced(node_id)
        row = self.dom_node(node_id).get_by_test_id("node-widget").filter(has_text=name)
        if row.get_by_role("combobox").count():
            row.get_by_role("combobox").click()
            self.page.get_by_role("option", name=str(value), exact=True).click()
        else:
            row.locator("input").fill(str(value))
            row.locator("input").press("Enter")

    def _show_advanced(self, node_id: str) -> None:
        self.dom_node(node_id).get_by_test_id("node-widget").first.wait_for()
        button = self.dom_node(node_id).get_by_text("Show advanced")
        if button.count():
            button.click()
            self.settle()

    def _hover(self, x: float, y: float) -> None:
        # The canvas shows a tooltip once the mouse has moved on the same thing.
        self.page.mouse.move(x - 2, y)
        self.page.mouse.move(x, y)
