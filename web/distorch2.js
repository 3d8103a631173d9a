// The placement table on each node of the pack that has one, in both renderers, after each run.
import { app } from "../../scripts/app.js";

const NODES = /(DisTorch2|MultiGPU)$/; // those of others have no such output
const WIDGET = "distorch2_placement";
const COLUMNS = 64; // the table has fewer; its title and notes may have more, and are wrapped
const FONT_PX = 10;
const CHARACTER_PX = 6.2; // a little more than in the usual monospaced fonts
const LINE_PX = 14;
const MARGIN_PX = 10; // around the text in the classic renderer

function numRows(line) {
  const columnsFilled = COLUMNS - 12; // the word that comes next may be as long as that
  return line.length <= COLUMNS ? 1 : Math.ceil(line.length / columnsFilled);
}

function addTable(node) {
  const element = document.createElement("pre");
  Object.assign(element.style, {
    margin: 0,
    font: `${FONT_PX}px/${LINE_PX}px monospace`,
    whiteSpace: "pre-wrap",
    overflowWrap: "anywhere",
    overflow: "auto",
    userSelect: "text",
  });
  const height = () =>
    element.textContent.split("\n").reduce((rows, line) => rows + numRows(line), 0) * LINE_PX + 2 * MARGIN_PX;
  const widget = node.addDOMWidget(WIDGET, WIDGET, element, {
    serialize: false,
    getMinHeight: height,
    getMaxHeight: height,
    margin: MARGIN_PX,
  });
  widget.serialize = false; // the option keeps it out of prompts, this out of saved workflows
  return widget;
}

function show(node, text) {
  const widget = node.widgets.find((candidate) => candidate.name === WIDGET) ?? addTable(node);
  widget.element.textContent = text;
  const columns = Math.min(COLUMNS, Math.max(...text.split("\n").map((line) => line.length)));
  const width = columns * CHARACTER_PX + 2 * MARGIN_PX;
  node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], node.computeSize()[1])]);
}

app.registerExtension({
  name: "DisTorch2.Placement",
  nodeCreated(node) {
    if (!NODES.test(node.comfyClass ?? "")) return;
    const onExecuted = node.onExecuted;
    node.onExecuted = function (output) {
      onExecuted?.apply(this, arguments);
      if (output?.[WIDGET]) show(this, output[WIDGET].join("\n"));
    };
  },
});
