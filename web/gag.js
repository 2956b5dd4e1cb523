// SPDX-License-Identifier: GPL-3.0-or-later
/**
 * Panels of our nodes in the browser: on each node what its last run did; on guidance nodes a live chart, and on
 * GAG (advanced) a list of presets and a picker of blocks. The server's side is nodes/panel/.
 *
 * Messages only change the memory of a node. A timer draws it, so that panels follow every change of a field: by hand,
 * by undo, by another extension or by the Vue renderer.
 */
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { Chart } from "./chart.js";
import { element } from "./dom.js";
import { watchJobs } from "./jobs.js";
import { meaning } from "./meaning.js";
import { isObject, isString, readModel, readRuns, readSetup, readStatus } from "./messages.js";
import { Picker } from "./picker.js";
import { PresetChooser } from "./presets.js";
import { nearestRoom, TITLE } from "./room.js";
import { ask, askForToken, connected, postWithToken } from "./server.js";
import { isEdited, StatusLine } from "./status.js";
import { say, speak } from "./texts.js";

const GUIDANCE = ["GAGuidance", "GAGuidanceAdvanced", "GAGAnderson"];
/** Nodes with a line, and nodes with several lines. */
const LINE = ["GAGProbe", "GAGSweep"];
const TEXT = ["GAGReport", "GAGScore", "GAGCheck"];
const WIDGET = "gag_panel";
const TOP_WIDGET = "gag_presets";
const REFRESH_MS = 250;
const ROW = 24;
/** Height of a status of two lines. */
const STATUS_ROW = 36;
const TEXT_HEIGHT = 110;
/** Number of refreshes in which a node that has grown looks for room. */
const MOST_LOOKS = 4;
/** Properties of a node, saved with it, for the parts that are open. */
const CHART = "gag_chart";
const PICKER = "gag_blocks";
const MOST_REMEMBERED = 500;
/** Limits of a search for nodes. Subgraphs within each other can hold more nodes than fit anywhere. */
const MOST_NODES = 10_000;
const DEEPEST = 32;
/** Most charts that the server takes. */
const MOST_CHARTS = 1000;

/**
 * Memory of a node. It outlives the node's object: undo and a change of workflow make new objects.
 * @typedef {{
 *   status?: import("./status.js").Status,
 *   cached?: boolean,
 *   run?: import("./chart.js").Run,
 *   model?: import("./picker.js").Model,
 *   moved?: {from: [number, number], to: [number, number]},
 * }} Memory `cached`: true if ComfyUI ran nothing behind the node the last time; `moved`: the node's place before it
 *   moved to have room, and the place where it moved to.
 */

/** @type {Map<string, Memory>} by workflow and the server's id of the node */
const memories = new Map();
/** @type {WeakMap<object, Panel>} by node */
const panels = new WeakMap();
/** @type {import("./messages.js").Setup | undefined} */
let setup;
/** True if this connection has been asked for the setup and the token. */
let asked = false;
/** @type {import("./chart.js").Series[]} */
const NO_SERIES = [];
/** The message about this page's panels that was last sent to the server; empty if it has none of this connection. */
let sent = "";
let sending = false;

const rootGraph = () => app.rootGraph ?? app.graph;

/** Return the id of the open workflow; an empty text if its file has something else in that place. */
function openWorkflow() {
  const id = rootGraph()?.id;
  return isString(id) ? id : "";
}

/**
 * @param {string} workflow
 * @param {string} id
 */
function memoryOf(workflow, id) {
  const key = `${workflow} ${id}`;
  const memory = memories.get(key) ?? {};
  // The memory that was used last is the last entry of the map, and the first one is dropped.
  memories.delete(key);
  memories.set(key, memory);
  if (memories.size > MOST_REMEMBERED) memories.delete(/** @type {string} */ (memories.keys().next().value));
  return memory;
}

/**
 * Yield every node of the open workflow with the server's id of it. The id begins with the ids of the subgraphs that
 * contain the node, so a node of a subgraph that is used twice has two ids.
 * Nodes of outer graphs come first, because the search has an end.
 * @returns {Generator<[string, any]>}
 */
function* everyNode() {
  /** @type {{graph: any, prefix: string, depth: number}[]} */
  const graphs = [{ graph: rootGraph(), prefix: "", depth: 0 }];
  let left = MOST_NODES;
  for (const { graph, prefix, depth } of graphs) {
    for (const node of graph?.nodes ?? []) {
      if (left-- <= 0) return;
      yield [`${prefix}${node.id}`, node];
      if (node.subgraph && depth < DEEPEST) {
        graphs.push({ graph: node.subgraph, prefix: `${prefix}${node.id}:`, depth: depth + 1 });
      }
    }
  }
}

/**
 * Return the panels of the open workflow, each with all ids of its node.
 * @returns {Map<Panel, string[]>}
 */
function openPanels() {
  const open = new Map();
  for (const [id, node] of everyNode()) {
    const panel = panels.get(node);
    if (!panel) continue;
    const ids = open.get(panel);
    if (ids) ids.push(id);
    else open.set(panel, [id]);
  }
  return open;
}

/** Panel at the foot of a node; GAG (advanced) has the list of presets at its top. */
class Panel {
  /** @param {any} node */
  constructor(node) {
    this.node = node;
    /** @type {Memory} */
    this.memory = {};
    this.line = new StatusLine();
    /** @type {{from: [number, number], looks: number} | undefined} the size before the node grew a moment ago */
    this.grown = undefined;
    this.chart = new Chart();
    this.picker = new Picker((blocks) => this.write({ blocks }));
    const row = element("div", { className: "gag-row gag-line" }, this.line.element);
    this.content = element("div", {}, row);
    this.element = element("div", { className: "gag-panel gag-foot" }, this.content);
    this.height = STATUS_ROW;
    /** The row below which the chart opens. */
    this.buttons = row;
    if (TEXT.includes(node.comfyClass)) {
      row.className = "gag-text";
      this.height = TEXT_HEIGHT;
    }
    if (node.comfyClass === "GAGuidanceAdvanced") {
      this.top = element("div", { className: "gag-panel gag-top" });
      addOnTop(node, this.top);
      this.buttons = element("div", { className: "gag-row" });
      this.content.append(this.buttons);
      this.height += ROW;
    }
    if (GUIDANCE.includes(node.comfyClass)) this.chartButton = this.button(say("chart"), say("chart_tip"), CHART);
    if (this.top) this.pickerButton = this.button(say("blocks"), say("blocks_tip"), PICKER);
    addPart(node, WIDGET, this.element, () => this.height);
    // A node that Vue draws passes the wheel to the canvas by itself.
    for (const part of this.parts()) {
      part.onwheel = (event) => {
        if (!vueNodes()) app.canvas.processMouseWheel(event);
      };
    }
  }

  /** Return the elements that the node shows. */
  parts() {
    return this.top ? [this.top, this.element] : [this.element];
  }

  /**
   * @param {string} text
   * @param {string} title
   * @param {string} part the property of the node that says if the part is open
   */
  button(text, title, part) {
    const button = element("button", { textContent: text, title });
    button.onclick = () => {
      app.canvas.emitBeforeChange?.();
      // A node that was added just now has no memory yet.
      refresh();
      const { properties } = this.node;
      if (this.isOpen(part)) delete properties[part];
      else properties[part] = true;
      if (this.isOpen(PICKER) && !this.memory.model) void askForBlocks();
      refresh();
      app.canvas.emitAfterChange?.();
    };
    this.buttons.append(button);
    return button;
  }

  /** @param {string} part */
  isOpen(part) {
    return this.node.properties?.[part] === true;
  }

  /** @param {string} name */
  field(name) {
    return this.node.widgets?.find((/** @type {any} */ widget) => widget.name === name);
  }

  /**
   * Set fields, in one step for undo.
   * @param {Record<string, unknown>} values by the name of the field
   */
  write(values) {
    app.canvas.emitBeforeChange?.();
    try {
      for (const [name, value] of Object.entries(values)) {
        const widget = this.field(name);
        if (!widget || widget.value === value) continue;
        widget.value = value;
        widget.callback?.(value, app.canvas, this.node);
      }
    } finally {
      app.canvas.emitAfterChange?.();
    }
    this.node.graph?.setDirtyCanvas?.(true, true);
    refresh();
  }

  draw() {
    const { status, run, cached = false } = this.memory;
    // Undo and a change of workflow make new nodes. Vue reuses the page's elements of the old node with the same id,
    // among them the old panel, which nothing draws any more.
    if (vueNodes() && this.node.graph === app.canvas.graph) {
      for (const part of this.parts()) {
        if (part.isConnected) continue;
        vueNode(this.node)?.querySelector(`.${part.className.replace(" ", ".")}`)?.replaceWith(part);
      }
    }
    this.line.draw(this.node, status, cached);
    if (this.chartButton) {
      show(this.chartButton, this.chart.element, this.isOpen(CHART), this.buttons);
      const old = isEdited(this.node, status);
      if (this.isOpen(CHART)) this.chart.draw(run, setup?.series ?? NO_SERIES, this.note(), old);
    }
    if (this.pickerButton) {
      const above = this.isOpen(CHART) ? this.chart.element : this.buttons;
      show(this.pickerButton, this.picker.element, this.isOpen(PICKER), above);
      if (this.isOpen(PICKER)) this.picker.draw(this.memory.model, String(this.field("blocks")?.value ?? ""));
    }
    if (this.top && setup && !this.chooser) {
      this.chooser = new PresetChooser(setup.presets, this.field.bind(this), this.write.bind(this));
      this.top.append(element("div", { className: "gag-row" }, this.chooser.element));
    }
    this.chooser?.draw();
    this.makeRoom();
    this.resize();
  }

  /** Return the sentence below the chart: what its numbers mean, or why there are none. */
  note() {
    const { status, run, cached } = this.memory;
    if (cached && !isEdited(this.node, status)) return say("chart_cached");
    if (run?.points.size) return meaning(run, this.field("norm_threshold") ? "norm_threshold" : "strength");
    const start = Number(this.field("start_percent")?.value);
    if (run) return start > 0 ? say("chart_later", { start: Number((100 * start).toFixed(1)) }) : say("chart_soon");
    if (!status) return say("chart_empty");
    return say(status.guided === 0 ? "chart_nothing" : "chart_closed");
  }

  /** Keep the node as high as its panel needs. The page knows that height only once it shows the panel. */
  resize() {
    const height = this.content.offsetHeight;
    if (!height || height === this.height) return;
    const growth = height - this.height;
    this.height = height;
    const { node, memory } = this;
    const [width, oldHeight] = node.size;
    const size = /** @type {[number, number]} */ ([
      width,
      Math.max(node.computeSize()[1], oldHeight + Math.min(0, growth)),
    ]);
    const { from, to } = memory.moved ?? {};
    if (growth > 0 && size[1] > oldHeight) {
      this.grown = { from: [width, oldHeight], looks: MOST_LOOKS };
    } else if (from && !this.isOpen(CHART) && !this.isOpen(PICKER)) {
      // Back to where it was, if nobody has moved it since.
      if (isAt(node, to)) node.pos = from;
      memory.moved = undefined;
    }
    node.setSize(size);
    node.graph?.setDirtyCanvas?.(true, true);
  }

  /** Move the node, once it has grown, to where it covers no other. Vue takes a moment to draw it in its new height. */
  makeRoom() {
    const { node, memory, grown } = this;
    if (!grown) return;
    if (--grown.looks <= 0) this.grown = undefined;
    const [width, height] = node.size;
    const shown = vueNodes() && node.graph === app.canvas.graph ? vueNode(node)?.offsetHeight : undefined;
    const place = nearestRoom(node, grown.from, [width, Math.max(height, (shown ?? 0) - TITLE)]);
    if (isAt(node, place)) return;
    const { from, to } = memory.moved ?? {};
    memory.moved = { from: from && isAt(node, to) ? from : [node.pos[0], node.pos[1]], to: place };
    node.pos = place;
  }
}

/**
 * Add an element to a node, below its fields. It is not saved: it is in neither the workflow nor the prompt.
 * @param {any} node
 * @param {string} name
 * @param {HTMLElement} part
 * @param {() => number} height
 */
function addPart(node, name, part, height) {
  const options = { serialize: false, hideOnZoom: false, margin: 0, getMinHeight: height, getMaxHeight: height };
  node.addDOMWidget(name, "gag", part, options).serialize = false;
}

/**
 * Add an element of one row above all fields of a node. Front ends up to 1.49 at least save a gap in its place, and
 * would then load every value into the next field: the gap is taken out.
 * @param {any} node
 * @param {HTMLElement} part
 */
function addOnTop(node, part) {
  addPart(node, TOP_WIDGET, part, () => ROW);
  node.widgets.unshift(node.widgets.pop());
  const onSerialize = node.onSerialize;
  node.onSerialize = function (/** @type {any} */ saved, /** @type {any[]} */ ...rest) {
    onSerialize?.call(this, saved, ...rest);
    const values = saved.widgets_values;
    if (Array.isArray(values) && values.length && !(0 in values)) values.shift();
  };
}

/**
 * Return the element that Vue draws a node with.
 * @param {any} node
 * @returns {HTMLElement | null}
 */
const vueNode = (node) => document.querySelector(`[data-node-id="${CSS.escape(String(node.id))}"]`);

/**
 * @param {any} node
 * @param {[number, number] | undefined} place
 */
const isAt = (node, place) => node.pos[0] === place?.[0] && node.pos[1] === place?.[1];

const vueNodes = () => Boolean(/** @type {any} */ (globalThis).LiteGraph?.vueNodesMode);

/**
 * Add an element below another, or remove it, and mark its button accordingly.
 * @param {Element} button
 * @param {Element} part
 * @param {boolean} open
 * @param {Element | null | undefined} above
 */
function show(button, part, open, above) {
  button.setAttribute("aria-expanded", String(open));
  if (open && part.parentElement !== above?.parentElement) above?.after(part);
  if (!open) part.remove();
}

async function askForSetup() {
  try {
    setup = readSetup(await ask("/gag/setup"));
  } catch {
    // The server still runs another version of the pack than that of this file: the nodes have no presets to choose.
  }
}

/** Ask the server for the models that came into the nodes of this workflow before the page was loaded. */
async function askForBlocks() {
  const workflow = openWorkflow();
  if (!connected()) return;
  try {
    const answer = await postWithToken("/gag/blocks", { workflow });
    if (!answer?.ok) return;
    for (const [id, content] of Object.entries(await answer.json())) {
      const model = readModel(content);
      if (model) memoryOf(workflow, firstId(workflow, id)).model ??= model;
    }
  } catch {
    // The next run sends the blocks.
  }
}

/**
 * Tell the server that this page shows our panels, and which charts are open, if that changed. It measures for these
 * charts and no others, and writes no text of the host's on our nodes.
 * @param {string[]} nodes
 */
async function sendOpenCharts(nodes) {
  if (sending || !connected()) return;
  const content = { workflow: openWorkflow(), nodes };
  const message = JSON.stringify([api.clientId, content]);
  if (message === sent) return;
  sending = true;
  sent = message;
  try {
    const answer = await postWithToken("/gag/listen", content);
    // The server does not know this connection or its token yet: send again.
    if (!answer || answer.status === 409) sent = "";
  } catch {
    // The server is gone. The list is sent again once it is back.
  } finally {
    sending = false;
  }
}

function refresh() {
  if (!rootGraph()) return;
  const workflow = openWorkflow();
  const open = openPanels();
  const charts = [];
  for (const [panel, ids] of open) {
    panel.memory = memoryOf(workflow, ids[0]);
    panel.draw();
    if (panel.isOpen(CHART)) charts.push(...ids);
  }
  if (open.size && !asked && connected()) {
    asked = true;
    if (!setup) void askForSetup();
    // A chart that is opened later is measured from the next step on if the token is there by then.
    void askForToken();
    // A picker that was saved open shows the model that came in before the page was loaded.
    if ([...open.keys()].some((panel) => panel.isOpen(PICKER) && !panel.memory.model)) void askForBlocks();
  }
  if (open.size || sent) void sendOpenCharts(charts.slice(0, MOST_CHARTS));
}

/**
 * Return the id that the memory of a node has. A node with several ids, in a subgraph that is used more than once, has
 * its memory under the first of them.
 * @param {string} workflow
 * @param {string} id
 */
function firstId(workflow, id) {
  if (workflow !== openWorkflow()) return id;
  return [...openPanels().values()].find((ids) => ids.includes(id))?.[0] ?? id;
}

/**
 * Call `act` with each message of a kind. A message for a workflow that is not open waits in its nodes' memories.
 * @param {string} kind
 * @param {(data: import("./messages.js").Content, find: (id: string) => Memory) => void} act
 */
function on(kind, act) {
  api.addEventListener(kind, (/** @type {CustomEvent} */ { detail }) => {
    if (!isObject(detail)) return;
    const workflow = isString(detail.workflow) ? detail.workflow : openWorkflow();
    act(detail, (id) => memoryOf(workflow, firstId(workflow, id)));
  });
}

on("gag.status", (data, find) => {
  const status = readStatus(data);
  if (!status || !isString(data.node)) return;
  const memory = find(data.node);
  // The chart shows a run or nothing: a run that guided nothing or began while the chart was closed has no points.
  if (status.guided === 0 || !memory.run?.live || !memory.run.points.size) memory.run = undefined;
  else memory.run = { ...memory.run, live: false };
  memory.status = status;
  memory.cached = false;
});

on("gag.blocks", (data, find) => {
  const model = readModel(data);
  if (model && isString(data.node)) find(data.node).model = model;
});

on("gag.chart", (data, find) => {
  for (const [node, run] of readRuns(data) ?? []) {
    const memory = find(node);
    const earlier = memory.run?.id === run.id ? memory.run : undefined;
    const points = new Map([...(earlier?.points ?? []), ...run.points]);
    memory.run = { ...run, series: earlier?.series ?? run.series, points, live: true };
    memory.cached = false;
  }
});

watchJobs(
  () => [...openPanels().values()].flat(),
  (workflow, id) => {
    const known = isString(workflow) ? workflow : openWorkflow();
    memoryOf(known, firstId(known, id)).cached = true;
  },
);

// Nothing has been sent over a new connection yet.
api.addEventListener("reconnected", () => {
  sent = "";
  asked = false;
});

app.registerExtension({
  name: "GAG",
  async setup() {
    document.head.append(
      element("link", { rel: "stylesheet", href: new URL("./gag.css", import.meta.url).href }),
    );
    const language = app.extensionManager?.setting?.get("Comfy.Locale") ?? "en";
    if (language !== "en") {
      try {
        speak(await api.getCustomNodesI18n(), language);
      } catch {
        // The texts stay in English.
      }
    }
    setInterval(refresh, REFRESH_MS);
  },
  /** @param {any} node */
  nodeCreated(node) {
    if ([...GUIDANCE, ...LINE, ...TEXT].includes(node.comfyClass)) panels.set(node, new Panel(node));
  },
});
