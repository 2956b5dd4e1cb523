// SPDX-License-Identifier: GPL-3.0-or-later
/**
 * What the pack adds to its guidance nodes in the browser: a badge that says what a run did, a live chart, and on
 * GAG (advanced) a list of presets and a picker of blocks. The server's side is nodes/live.py.
 *
 * Messages only change what is remembered of a node. A timer draws it, so that panels follow whatever changes a field:
 * a hand, undo, another extension or the Vue renderer.
 */
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { Chart } from "./chart.js";
import { element } from "./dom.js";
import { Picker } from "./picker.js";
import { PresetChooser } from "./presets.js";

const GUIDANCE = ["GAGuidance", "GAGuidanceAdvanced", "GAGAnderson"];
const WIDGET = "gag_panel";
const REFRESH_MS = 250;
const ROW = 22;
const CHART = 92;
const PICKER_ROW = 22;

/**
 * What is remembered of a node; it outlives the node's object, which undo and changing between workflows make anew.
 * @typedef {{
 *   chartOpen?: boolean,
 *   pickerOpen?: boolean,
 *   report?: {guided: number, of: number, why: string, text: string},
 *   series?: import("./chart.js").Series,
 *   model?: import("./picker.js").Model,
 * }} Memory
 */

/** @type {Map<string, Memory>} by graph and node */
const memories = new Map();
/** @type {Set<Panel>} */
const panels = new Set();
/** @type {Promise<import("./presets.js").Presets> | undefined} */
let presets;
/** The charts that the server was last told of. */
let told = "[]";

const rootGraph = () => app.rootGraph ?? app.graph;
const connected = () => api.socket?.readyState === WebSocket.OPEN;

/** @param {any} node */
function memoryOf(node) {
  const key = `${node.graph.id} ${node.id}`;
  const memory = memories.get(key) ?? {};
  memories.set(key, memory);
  return memory;
}

/**
 * Every node with the id that the server knows it by, which begins with those of the subgraphs that it is in.
 * @param {any} graph
 * @param {string} within
 * @returns {Generator<[string, any]>}
 */
function* everyNode(graph, within = "") {
  for (const node of graph?.nodes ?? []) {
    yield [`${within}${node.id}`, node];
    if (node.subgraph) yield* everyNode(node.subgraph, `${within}${node.id}:`);
  }
}

/** The panel of a node, at the foot of it. */
class Panel {
  /** @param {any} node */
  constructor(node) {
    this.node = node;
    this.badge = element("span", { className: "gag-badge" });
    this.chart = new Chart();
    this.picker = new Picker((text) => this.write("blocks", text));
    this.buttons = element("div", { className: "gag-row" }, this.badge);
    this.element = element("div", { className: "gag-panel" }, this.buttons);
    this.chartButton = this.button("chart", "Draw what guidance does, step by step, while a run goes on.", "chartOpen");
    this.advanced = node.comfyClass === "GAGuidanceAdvanced";
    if (this.advanced) {
      this.pickerButton = this.button("blocks", "Pick the blocks to guide.", "pickerOpen");
      this.presetRow = element("div", { className: "gag-row" });
      this.element.append(this.presetRow);
    }
    // Shown alone: in neither the workflow nor the prompt, and behind all widgets that are.
    const options = { serialize: false, hideOnZoom: false, margin: 0, getMinHeight: () => this.height, getMaxHeight: () => this.height };
    this.height = this.wantedHeight({});
    this.widget = node.addDOMWidget(WIDGET, "gag", this.element, options);
    this.widget.serialize = false;
    const removed = node.onRemoved;
    node.onRemoved = (/** @type {any[]} */ ...args) => {
      panels.delete(this);
      return removed?.apply(node, args);
    };
    const added = node.onAdded;
    node.onAdded = (/** @type {any[]} */ ...args) => {
      panels.add(this);
      return added?.apply(node, args);
    };
    panels.add(this);
  }

  /**
   * @param {string} text
   * @param {string} title
   * @param {"chartOpen" | "pickerOpen"} key
   */
  button(text, title, key) {
    const button = element("button", { textContent: text, title });
    button.onclick = () => {
      const memory = memoryOf(this.node);
      memory[key] = !memory[key];
      if (key === "pickerOpen" && memory[key] && !memory.model) void askForBlocks();
      refresh();
    };
    this.buttons.append(button);
    return button;
  }

  /** @param {string} name */
  field(name) {
    return this.node.widgets?.find((/** @type {any} */ widget) => widget.name === name);
  }

  /**
   * @param {string} name
   * @param {unknown} value
   */
  write(name, value) {
    const widget = this.field(name);
    if (!widget || widget.value === value) return;
    widget.value = value;
    widget.callback?.(value, app.canvas, this.node);
    this.node.graph?.setDirtyCanvas?.(true, true);
    refresh();
  }

  /** @param {Memory} memory */
  wantedHeight(memory) {
    const rows = this.advanced ? 2 : 1;
    return rows * ROW + (memory.chartOpen ? CHART : 0) + (memory.pickerOpen ? this.picker.rows * PICKER_ROW : 0);
  }

  draw() {
    if (!this.node.graph) return;
    const memory = memoryOf(this.node);
    this.drawBadge(memory.report);
    show(this.chartButton, this.chart.element, Boolean(memory.chartOpen), this.element);
    if (memory.chartOpen) this.chart.draw(memory.series);
    if (this.pickerButton) {
      show(this.pickerButton, this.picker.element, Boolean(memory.pickerOpen), this.element);
      if (memory.pickerOpen) this.picker.draw(memory.model, String(this.field("blocks")?.value ?? ""));
    }
    if (this.presetRow && !this.asked && connected()) {
      this.asked = true;
      void this.addPresets(this.presetRow);
    }
    this.chooser?.draw();
    this.resize(memory);
  }

  /** @param {Memory["report"]} report */
  drawBadge(report) {
    let text = "";
    if (report) text = report.guided ? `guiding ${report.guided} of ${report.of} layers` : `not guiding: ${report.why}`;
    if (this.badge.textContent === text) return;
    this.badge.textContent = text;
    this.badge.title = report?.text ?? "";
    this.badge.classList.toggle("gag-none", Boolean(report && !report.guided));
  }

  /** @param {Element} row */
  async addPresets(row) {
    presets ??= ask("/gag/presets");
    try {
      const field = this.field.bind(this);
      this.chooser = new PresetChooser(await presets, field, this.write.bind(this));
      row.replaceChildren(this.chooser.element);
    } catch {
      // Files of another version of the pack than the server still runs: the node does without.
    }
  }

  /** @param {Memory} memory */
  resize(memory) {
    const height = this.wantedHeight(memory);
    if (height === this.height) return;
    const shrunk = Math.max(0, this.height - height);
    this.height = height;
    const [width, now] = this.node.size;
    this.node.setSize([width, Math.max(this.node.computeSize()[1], now - shrunk)]);
    this.node.graph.setDirtyCanvas?.(true, true);
  }
}

/**
 * @param {Element} button
 * @param {Element} what
 * @param {boolean} open
 * @param {Element} within
 */
function show(button, what, open, within) {
  button.setAttribute("aria-expanded", String(open));
  if (open && what.parentElement !== within) within.append(what);
  if (!open) what.remove();
}

/** @param {string} route */
async function ask(route) {
  const answer = await api.fetchApi(route);
  if (!answer.ok) throw new Error(`${route}: ${answer.status}`);
  return answer.json();
}

/** What the server knows of the models that came into the nodes of this workflow, from before the page was loaded. */
async function askForBlocks() {
  if (!connected()) return;
  try {
    const known = await ask(`/gag/blocks?workflow=${encodeURIComponent(rootGraph().id)}`);
    for (const [id, node] of everyNode(rootGraph())) {
      if (id in known) memoryOf(node).model ??= known[id];
    }
  } catch {
    // The next run tells.
  }
}

/** Tell the server which charts are open, if that changed, so that it measures for these and no others. */
async function tell() {
  const open = new Set([...panels].filter(({ node }) => node.graph && memoryOf(node).chartOpen).map(({ node }) => node));
  if ((!open.size && told === "[]") || !connected()) return;
  const nodes = [...everyNode(rootGraph())].filter(([, node]) => open.has(node)).map(([id]) => id);
  const now = JSON.stringify(nodes);
  if (now === told) return;
  told = now;
  try {
    const body = JSON.stringify({ client: api.clientId, nodes });
    const headers = { "Content-Type": "application/json" };
    await api.fetchApi("/gag/listen", { method: "POST", headers, body });
  } catch {
    // The server is gone; once it is back it is told anew.
  }
}

function refresh() {
  for (const panel of panels) panel.draw();
  void tell();
}

/**
 * Do something with the node of each message of a kind.
 * @param {string} kind
 * @param {(data: any, find: (id: string) => Memory | undefined) => void} act
 */
function on(kind, act) {
  api.addEventListener(kind, (/** @type {CustomEvent} */ { detail }) => {
    if (detail.workflow && detail.workflow !== rootGraph().id) return;
    const nodes = new Map(everyNode(rootGraph()));
    act(detail, (id) => nodes.has(id) ? memoryOf(nodes.get(id)) : undefined);
  });
}

on("gag.report", ({ node, guided, of, why, text }, find) => {
  const memory = find(node);
  if (memory) memory.report = { guided, of, why, text };
});

on("gag.blocks", ({ node, parts, default: chosen }, find) => {
  const memory = find(node);
  if (memory) memory.model = { parts, default: chosen };
});

on("gag.chart", ({ run, steps, points }, find) => {
  for (const [id, values] of Object.entries(points)) {
    const memory = find(id);
    if (!memory) continue;
    const known = memory.series;
    const series = known && known.run === run ? known : { run, steps, points: new Map() };
    for (const [step, ...numbers] of values) series.points.set(step, numbers);
    memory.series = series;
  }
});

// A new connection has told the server nothing yet.
api.addEventListener("reconnected", () => {
  told = "[]";
});

app.registerExtension({
  name: "GAG",
  setup() {
    document.head.append(
      element("link", { rel: "stylesheet", href: new URL("./gag.css", import.meta.url).href }),
    );
    setInterval(refresh, REFRESH_MS);
  },
  /** @param {any} node */
  nodeCreated(node) {
    if (GUIDANCE.includes(node.comfyClass)) new Panel(node);
  },
});
