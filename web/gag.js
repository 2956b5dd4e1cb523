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
import { say, speak } from "./texts.js";

const GUIDANCE = ["GAGuidance", "GAGuidanceAdvanced", "GAGAnderson"];
const WIDGET = "gag_panel";
const REFRESH_MS = 250;
const ROW = 24;
const MUTED = 2;
const BYPASSED = 4;
const MOST_REMEMBERED = 500;

/**
 * What is remembered of a node. It outlives the node's object, which undo and changing between workflows make anew.
 * @typedef {{
 *   chartOpen?: boolean,
 *   pickerOpen?: boolean,
 *   report?: {guided: number, of: number, text: string, why: import("./texts.js").Name, start: string, end: string},
 *   series?: import("./chart.js").Series,
 *   model?: import("./picker.js").Model,
 * }} Memory
 */

/** @type {Map<string, Memory>} by workflow and the id that the server knows the node by */
const memories = new Map();
/** @type {WeakMap<object, Panel>} by node */
const panels = new WeakMap();
/** @type {import("./presets.js").Presets | undefined} */
let presets;
let askedForPresets = false;
/** What the server was last told of open charts; empty if of none. */
let told = "";
let telling = false;

const rootGraph = () => app.rootGraph ?? app.graph;
const connected = () => api.socket?.readyState === WebSocket.OPEN && Boolean(api.clientId);

/**
 * @param {string} workflow
 * @param {string} id
 */
function memoryOf(workflow, id) {
  const key = `${workflow} ${id}`;
  const memory = memories.get(key) ?? {};
  // The one that was looked at last stands last.
  memories.delete(key);
  memories.set(key, memory);
  if (memories.size > MOST_REMEMBERED) memories.delete(/** @type {string} */ (memories.keys().next().value));
  return memory;
}

/**
 * Every node of the open workflow with the id that the server knows it by, which begins with those of the subgraphs
 * that it is in. A subgraph that is used twice has nodes with two ids.
 * @returns {Generator<[string, any]>}
 */
function* everyNode(graph = rootGraph(), within = "") {
  for (const node of graph?.nodes ?? []) {
    yield [`${within}${node.id}`, node];
    if (node.subgraph) yield* everyNode(node.subgraph, `${within}${node.id}:`);
  }
}

/**
 * The panels of the open workflow, each with all ids of its node.
 * @returns {Map<Panel, string[]>}
 */
function openPanels() {
  const open = new Map();
  for (const [id, node] of everyNode()) {
    const panel = panels.get(node);
    if (panel) open.set(panel, [...(open.get(panel) ?? []), id]);
  }
  return open;
}

/** The panel of a node, at the foot of it. */
class Panel {
  /** @param {any} node */
  constructor(node) {
    this.node = node;
    /** @type {Memory} */
    this.memory = {};
    this.badge = element("span", { className: "gag-badge" });
    this.chart = new Chart();
    this.picker = new Picker((blocks) => this.write({ blocks }));
    this.buttons = element("div", { className: "gag-row" }, this.badge);
    this.content = element("div", {}, this.buttons);
    this.element = element("div", { className: "gag-panel" }, this.content);
    this.chartButton = this.button(say("chart"), say("chart_tip"), "chartOpen");
    if (node.comfyClass === "GAGuidanceAdvanced") {
      this.pickerButton = this.button(say("blocks"), say("blocks_tip"), "pickerOpen");
      this.presetRow = element("div", { className: "gag-row" });
      this.content.append(this.presetRow);
    }
    this.height = ROW * this.content.children.length;
    const height = () => this.height;
    // Shown alone: in neither the workflow nor the prompt, and behind all widgets that are.
    const options = { serialize: false, hideOnZoom: false, margin: 0, getMinHeight: height, getMaxHeight: height };
    node.addDOMWidget(WIDGET, "gag", this.element, options).serialize = false;
    // Drawn by Vue, the node itself hands the wheel on.
    this.element.onwheel = (event) => {
      if (!vueNodes()) app.canvas.processMouseWheel(event);
    };
  }

  /**
   * @param {string} text
   * @param {string} title
   * @param {"chartOpen" | "pickerOpen"} key
   */
  button(text, title, key) {
    const button = element("button", { textContent: text, title });
    button.onclick = () => {
      // Nothing is remembered yet of a node that was added just now.
      refresh();
      this.memory[key] = !this.memory[key];
      if (this.memory.pickerOpen && !this.memory.model) void askForBlocks();
      refresh();
    };
    this.buttons.append(button);
    return button;
  }

  /** @param {string} name */
  field(name) {
    return this.node.widgets?.find((/** @type {any} */ widget) => widget.name === name);
  }

  /** @param {Record<string, unknown>} values of fields; one step for undo */
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
    const { chartOpen = false, pickerOpen = false } = this.memory;
    // A node that undo or another workflow makes anew gets the page's elements of the one that had its id, if Vue draws
    // it, and with them a panel that nobody draws any more.
    if (vueNodes() && !this.element.isConnected && this.node.graph === app.canvas.graph) {
      document.querySelector(`[data-node-id="${this.node.id}"] .gag-panel`)?.replaceWith(this.element);
    }
    this.drawBadge();
    show(this.chartButton, this.chart.element, chartOpen, this.content);
    if (chartOpen) this.chart.draw(this.memory.series);
    if (this.pickerButton) {
      show(this.pickerButton, this.picker.element, pickerOpen, this.content);
      if (pickerOpen) this.picker.draw(this.memory.model, String(this.field("blocks")?.value ?? ""));
    }
    if (this.presetRow && presets && !this.chooser) {
      this.chooser = new PresetChooser(presets, this.field.bind(this), this.write.bind(this));
      this.presetRow.append(this.chooser.element);
    }
    this.chooser?.draw();
    this.resize();
  }

  drawBadge() {
    const { report } = this.memory;
    const { mode } = this.node;
    let text = "";
    if (mode === BYPASSED) text = say("bypassed");
    else if (mode === MUTED) text = say("muted");
    else if (report) text = report.guided ? say("guiding", report) : say("nothing", { why: say(report.why, report) });
    const title = mode === 0 && report ? `${text}\n${report.text}` : text;
    if (this.badge.title === title) return;
    this.badge.textContent = text;
    this.badge.title = title;
    this.badge.classList.toggle("gag-none", mode === 0 && report?.guided === 0);
  }

  /** Keep the node as high as its panel needs; how high that is, the page knows once it shows the panel. */
  resize() {
    const height = this.content.offsetHeight;
    if (!height || height === this.height) return;
    const grown = height - this.height;
    this.height = height;
    const [width, now] = this.node.size;
    this.node.setSize([width, Math.max(this.node.computeSize()[1], now + Math.min(0, grown))]);
    this.node.graph?.setDirtyCanvas?.(true, true);
  }
}

const vueNodes = () => Boolean(/** @type {any} */ (globalThis).LiteGraph?.vueNodesMode);

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

async function askForPresets() {
  try {
    presets = await ask("/gag/presets");
  } catch {
    // Files of another version of the pack than the server still runs: the nodes do without.
  }
}

/** What the server knows of the models that came into the nodes of this workflow, from before the page was loaded. */
async function askForBlocks() {
  const workflow = rootGraph().id;
  if (!connected()) return;
  try {
    const known = await ask(`/gag/blocks?workflow=${encodeURIComponent(workflow)}`);
    for (const [id, model] of Object.entries(known)) memoryOf(workflow, firstId(workflow, id)).model ??= model;
  } catch {
    // The next run tells.
  }
}

/**
 * Tell the server which charts are open, if that changed, so that it measures for these and no others.
 * @param {string[]} nodes
 */
async function tell(nodes) {
  if (telling || !connected()) return;
  const body = JSON.stringify({ client: api.clientId, workflow: rootGraph().id, nodes });
  const now = nodes.length ? body : "";
  if (now === told) return;
  telling = true;
  told = now;
  try {
    const headers = { "Content-Type": "application/json" };
    const answer = await api.fetchApi("/gag/listen", { method: "POST", headers, body });
    // The connection is so new that the server does not know it: told again.
    if (answer.status === 409) told = "";
  } catch {
    // The server is gone; once it is back it is told anew.
  } finally {
    telling = false;
  }
}

function refresh() {
  const workflow = rootGraph()?.id;
  if (!workflow) return;
  const open = openPanels();
  const charts = [];
  for (const [panel, ids] of open) {
    panel.memory = memoryOf(workflow, ids[0]);
    panel.draw();
    if (panel.memory.chartOpen) charts.push(...ids);
  }
  if (open.size && !askedForPresets && connected()) {
    askedForPresets = true;
    void askForPresets();
  }
  void tell(charts);
}

/**
 * The id under which a node is remembered: of a subgraph that is used twice the first one's.
 * @param {string} workflow
 * @param {string} id
 */
function firstId(workflow, id) {
  if (workflow !== rootGraph().id) return id;
  return [...openPanels().values()].find((ids) => ids.includes(id))?.[0] ?? id;
}

/**
 * Do something with each message of a kind. What comes for a workflow that is not open is kept for when it is.
 * @param {string} kind
 * @param {(data: any, find: (id: string) => Memory) => void} act
 */
function on(kind, act) {
  api.addEventListener(kind, (/** @type {CustomEvent} */ { detail }) => {
    const workflow = detail.workflow ?? rootGraph().id;
    act(detail, (id) => memoryOf(workflow, firstId(workflow, id)));
  });
}

on("gag.report", ({ node, ...report }, find) => {
  find(node).report = report;
});

on("gag.blocks", ({ node, parts, default: chosen }, find) => {
  find(node).model = { parts, default: chosen };
});

on("gag.chart", ({ run, steps, points }, find) => {
  for (const [id, values] of Object.entries(points)) {
    const memory = find(id);
    const known = memory.series && memory.series.run === run ? memory.series.points : [];
    const news = values.map((/** @type {number[]} */ [step, ...numbers]) => [step, numbers]);
    memory.series = { run, steps, points: new Map([...known, ...news]) };
  }
});

// A new connection has told the server nothing yet.
api.addEventListener("reconnected", () => {
  told = "";
  askedForPresets = Boolean(presets);
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
        // English, then.
      }
    }
    setInterval(refresh, REFRESH_MS);
  },
  /** @param {any} node */
  nodeCreated(node) {
    if (GUIDANCE.includes(node.comfyClass)) panels.set(node, new Panel(node));
  },
});
