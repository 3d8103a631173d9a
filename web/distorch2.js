// On each node of the pack that places a model: what its settings will do, while they are edited, in both renderers; and
// the table of what was placed, after a run.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const NODES = /(DisTorch2|MultiGPU)$/; // those of others have no such output
const TABLE = "distorch2_placement";
const PREVIEW = "distorch2_preview";
const LOOK_AGAIN_MS = 300;
const COLUMNS = 64; // the table has fewer; its title and notes may have more, and are wrapped
const LEAST_COLUMNS = 24; // of the preview, which is as wide as the node
const FONT_PX = 10;
const CHARACTER_PX = 6.2; // a little more than in the usual monospaced fonts
const LINE_PX = 14;
const BAR_PX = 10;
const MARGIN_PX = 10; // around the text in the classic renderer
const MOST_LINKS = 50; // that are followed to the node that loads a file

// --- what is asked

const COMPONENTS = { DistributeModelDisTorch2: "diffusion model", DistributeCLIPDisTorch2: "text encoder" };
const FILE_INPUTS = /^(ckpt_name|unet_name|clip_name[1-4]?)$/;
const READ_AS = /^(type|weight_dtype)$/; // what else decides how it is read
const LOADERS =
  /^(CheckpointLoader(Simple|Advanced)|UNETLoader|UnetLoaderGGUF(Advanced)?|(Dual|Triple|Quadruple)?CLIPLoader)(DisTorch2?)?(MultiGPU)?$/;
const ALWAYS = 0; // the mode of a node that is neither muted nor bypassed

// Values of widgets by name; undefined for one that is linked, which is not known before it runs.
function valuesOf(node) {
  const linked = new Set((node.inputs ?? []).filter((input) => input.link != null).map((input) => input.widget?.name));
  const widgets = (node.widgets ?? []).filter((widget) => ![TABLE, PREVIEW].includes(widget.name));
  return Object.fromEntries(widgets.map((widget) => [widget.name, linked.has(widget.name) ? undefined : widget.value]));
}

function isListed(node, name, value) {
  const listed = node.widgets.find((widget) => widget.name === name).options?.values;
  return !Array.isArray(listed) || listed.includes(value);
}

const moduleOf = (nodeType) => nodeType?.nodeData?.python_module;

// Another pack has nodes by the same names.
const isOurs = (node) => moduleOf(node.constructor) === moduleOf(LiteGraph.registered_node_types.DistributeModelDisTorch2);

// The inputs that say what a loader reads, and as what: {ckpt_name: ...}, say. Null where that cannot be told before.
function sourceOf(node) {
  if (!LOADERS.test(node.comfyClass ?? "")) return null;
  const inputs = Object.entries(valuesOf(node));
  const files = inputs.filter(([name]) => FILE_INPUTS.test(name));
  const readable = /GGUF/.test(node.comfyClass) ? /\.gguf$/i : /\.(safetensors|sft)$/i;
  const isKnown = ([name, value]) => readable.test(value ?? "") && isListed(node, name, value);
  if (!files.length || !files.every(isKnown)) return null;
  return Object.fromEntries(inputs.filter(([name]) => FILE_INPUTS.test(name) || READ_AS.test(name)));
}

// The same of the loader that the node's model comes from, by way of nodes that pass it on.
function sourceBefore(node, type) {
  for (let links = 0; links < MOST_LINKS; links++) {
    const slot = (node.inputs ?? []).findIndex((input) => input.type === type);
    node = slot < 0 ? null : node.getInputNode(slot);
    if (!node) return null;
    if (LOADERS.test(node.comfyClass ?? "")) return node.mode === ALWAYS ? sourceOf(node) : null;
  }
  return null;
}

// What the server is asked for; null where nothing can be told before the node runs.
function questionOf(node) {
  const component = COMPONENTS[node.comfyClass];
  const values = valuesOf(node);
  const source = component ? sourceBefore(node, component === "text encoder" ? "CLIP" : "MODEL") : sourceOf(node);
  if (!source || values.use_other_vram) return null;
  const question = { ...values, ...source };
  if (component) question.component = component;
  if (!("unet_compute_device" in values)) {
    question.compute_device = values.compute_device ?? values.device;
    if (!("donor_device" in values)) question.donor_device = "cpu";
  }
  return Object.values(question).includes(undefined) ? null : new URLSearchParams(question).toString();
}

// --- how it looks

// Paler: moved before use.
const opacityOf = (served) => (/^(resident|relayed)/.test(served) ? 1 : /^packed/.test(served) ? 0.8 : 0.45);

function colorOf(device) {
  const [kind, index] = device.split(":");
  const hues = { cpu: 35, cuda: 130 };
  return kind === "disk" ? "hsl(0 0% 55%)" : `hsl(${((hues[kind] ?? 280) + 75 * Number(index ?? 0)) % 360} 55% 48%)`;
}

const sizeText = (bytes) => (bytes >= 2 ** 30 / 10 ? `${(bytes / 2 ** 30).toFixed(2)} GiB` : `${(bytes / 2 ** 20).toFixed(1)} MiB`);

function line(text, style = {}, title = text) {
  const element = document.createElement("div");
  Object.assign(element.style, { whiteSpace: "pre", overflow: "hidden", textOverflow: "ellipsis", ...style });
  element.textContent = text;
  element.title = title;
  return element;
}

function barOf(parts, bytes) {
  const bar = document.createElement("div");
  bar.className = "distorch2-bar";
  Object.assign(bar.style, { display: "flex", height: `${BAR_PX}px`, margin: "2px 0", borderRadius: "3px", overflow: "hidden" });
  for (const part of parts) {
    const segment = document.createElement("span");
    const style = { flex: `${part.bytes} 0 0`, background: colorOf(part.device), opacity: opacityOf(part.served) };
    Object.assign(segment.style, style);
    segment.title = describe(part, bytes);
    bar.append(segment);
  }
  return bar;
}

const describe = (part, bytes) =>
  `${part.device}  ${sizeText(part.bytes)}  ${((100 * part.bytes) / Math.max(1, bytes)).toFixed(0)}%  ${part.served}`;

function partLine(part, bytes) {
  const element = line("", {}, describe(part, bytes));
  const mark = document.createElement("span");
  mark.textContent = "■ ";
  Object.assign(mark.style, { color: colorOf(part.device), opacity: opacityOf(part.served) });
  element.append(mark, describe(part, bytes));
  return element;
}

const seconds = (number) => `${number.toPrecision(2)} s`;

// What the copies of a run cost, as far as it is known.
function costOf({ copying_s, computing_s, hidden }) {
  if (copying_s === null) return "";
  if (hidden === null) return `, ${seconds(copying_s)}, hidden behind computing if that takes longer`;
  const took = `${seconds(copying_s)}; computing took ${seconds(computing_s)}, which hides up to ${sizeText(hidden)}`;
  return copying_s <= computing_s
    ? `, ${took}: hidden`
    : `, ${took}: a step takes about ${(copying_s / computing_s).toFixed(1)} times as long as without`;
}

function componentLines(component, columns) {
  const { name, bytes, parts, now, copied, read } = component;
  const lines = [line(`${name}  ${sizeText(bytes)}`, { fontWeight: "bold" }), barOf(parts, bytes)];
  lines.push(...parts.map((part) => partLine(part, bytes)));
  if (copied) {
    const text = `each step copies ${sizeText(copied)}${costOf(component)}`;
    lines.push(...wrapped(text, columns - 2).map((part) => line(`  ${part}`, {}, text)));
  }
  if (read) lines.push(line(`  each step reads ${sizeText(read)} from the disk`));
  if (now && JSON.stringify(now) !== JSON.stringify(parts)) {
    lines.push(line("  as it lies now:"), barOf(now, bytes), ...now.map((part) => partLine(part, bytes)));
  }
  return lines;
}

function deviceText({ name, total, free, planned }) {
  const of = total === null ? "" : ` of ${sizeText(total)}`;
  return `${name}: ${sizeText(planned)}${of}${free === null ? "" : `, ${sizeText(free)} free now`}`;
}

// A long text, in lines of whole words; a word that is longer than a line, a path say, is cut up.
function wrapped(text, columns) {
  const lines = [""];
  const words = text.split(" ").flatMap((word) => word.match(new RegExp(`.{1,${columns - 2}}`, "gu")) ?? [""]);
  for (const word of words) {
    if (lines.at(-1).trim() && lines.at(-1).length + 1 + word.length > columns) lines.push("  ");
    lines[lines.length - 1] += lines.at(-1).trim() ? ` ${word}` : word;
  }
  return lines;
}

function linesOf({ components, devices, warnings, error, input }, columns) {
  const textLines = (text, style) => wrapped(text, columns).map((part) => line(part, style, text));
  if (error) {
    const style = { color: "var(--error-text, #e5484d)" };
    const named = input ? `${input}:\n${error}` : error;
    // What is indented has a mark below it.
    return named.split("\n").flatMap((text) => (text.startsWith(" ") ? [line(text, style)] : textLines(text, style)));
  }
  return [
    ...components.filter(({ bytes }) => bytes).flatMap((component) => componentLines(component, columns)),
    ...devices.flatMap((device) => textLines(deviceText(device), { opacity: 0.75 })),
    ...warnings.flatMap((text) => textLines(`! ${text}`, { color: "var(--warning-text, #d68910)" })),
  ];
}

// --- where it is shown

function addDomWidget(node, name, element, height) {
  const widget = node.addDOMWidget(name, name, element, {
    serialize: false,
    getMinHeight: height,
    getMaxHeight: height,
    margin: MARGIN_PX,
  });
  widget.serialize = false; // the option keeps it out of prompts, this out of saved workflows
  return widget;
}

const added = new WeakMap(); // node -> [width, height] that it was given for what is shown on it

// Make room for what is shown. What is saved, and what undo compares, is the size without it.
function grow(node, width = 0) {
  const [addedWidth, addedHeight] = added.get(node) ?? [0, 0];
  const own = [node.size[0] - addedWidth, node.size[1] - addedHeight];
  const needed = [Math.max(own[0], width, node.size[0]), Math.max(own[1], node.computeSize()[1])];
  added.set(node, [needed[0] - own[0], needed[1] - own[1]]);
  node.setSize(needed);
  node.setDirtyCanvas?.(true, true);
}

function numRows(text) {
  const columnsFilled = COLUMNS - 12; // the word that comes next may be as long as that
  return text.length <= COLUMNS ? 1 : Math.ceil(text.length / columnsFilled);
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
    element.textContent.split("\n").reduce((rows, text) => rows + numRows(text), 0) * LINE_PX + 2 * MARGIN_PX;
  return addDomWidget(node, TABLE, element, height);
}

function showTable(node, text) {
  const widget = node.widgets.find((candidate) => candidate.name === TABLE) ?? addTable(node);
  widget.element.textContent = text;
  const columns = Math.min(COLUMNS, Math.max(...text.split("\n").map((each) => each.length)));
  grow(node, columns * CHARACTER_PX + 2 * MARGIN_PX);
}

function addPreview(node) {
  const element = document.createElement("div");
  element.className = "distorch2-preview";
  Object.assign(element.style, {
    font: `${FONT_PX}px/${LINE_PX}px monospace`,
    color: "var(--input-text, inherit)",
    overflow: "hidden",
    userSelect: "text",
  });
  const height = () => {
    const numBars = element.querySelectorAll(".distorch2-bar").length;
    const numLines = element.children.length - numBars;
    return element.children.length ? numLines * LINE_PX + numBars * (BAR_PX + 4) + 2 * MARGIN_PX : 0;
  };
  return addDomWidget(node, PREVIEW, element, height);
}

function showPreview(node, found) {
  const present = node.widgets.find((candidate) => candidate.name === PREVIEW);
  if (!present && !found) return;
  const widget = present ?? addPreview(node);
  const columns = Math.max(LEAST_COLUMNS, Math.floor((node.size[0] - 2 * MARGIN_PX) / CHARACTER_PX));
  widget.element.replaceChildren(...(found ? linesOf(found, columns) : []));
  grow(node);
}

// --- when it is asked

// Looked at again and again: no event says in both renderers that a value has changed, by undo or by another pack, say.
const previews = new Map(); // node -> question seen at the last look, question asked last, whether an answer is awaited

async function lookAgain(node, state) {
  const question = questionOf(node);
  if (question !== state.seen) {
    state.seen = question; // still being edited, perhaps
    return;
  }
  if (state.isAsking || question === state.asked) return;
  state.asked = question;
  if (question === null) {
    showPreview(node, null);
    return;
  }
  state.isAsking = true;
  try {
    const answer = await api.fetchApi(`/distorch2/preview?${question}`);
    if (answer.status === 429) state.asked = undefined;
    else showPreview(node, answer.ok || answer.status === 400 ? await answer.json() : null);
  } catch {
    showPreview(node, null); // no JSON, or the server is gone, which the front end says
  } finally {
    state.isAsking = false;
  }
}

function lookAtAll() {
  for (const [node, state] of previews) {
    if (node.graph) lookAgain(node, state);
  }
}

app.registerExtension({
  name: "DisTorch2.Placement",
  setup() {
    setInterval(lookAtAll, LOOK_AGAIN_MS);
    for (const event of ["execution_success", "execution_error", "execution_interrupted"]) {
      api.addEventListener(event, () => previews.forEach((state) => (state.asked = undefined))); // what lies where now
    }
  },
  nodeCreated(node) {
    if (!NODES.test(node.comfyClass ?? "") || !isOurs(node)) return;
    const { onAdded, onExecuted, onRemoved, onSerialize } = node;
    node.onExecuted = function (output) {
      onExecuted?.apply(this, arguments);
      if (output?.[TABLE]) showTable(this, output[TABLE].join("\n"));
    };
    node.onSerialize = function (saved) {
      onSerialize?.apply(this, arguments);
      const [width, height] = added.get(this) ?? [0, 0];
      if (saved.size) saved.size = [saved.size[0] - width, saved.size[1] - height];
    };
    if (!node.widgets?.some((widget) => /virtual_vram_gb$/.test(widget.name))) return; // everything is whole there
    node.onAdded = function () {
      onAdded?.apply(this, arguments);
      previews.set(this, { seen: undefined, asked: undefined, isAsking: false });
    };
    node.onRemoved = function () {
      previews.delete(this);
      onRemoved?.apply(this, arguments);
    };
  },
});
