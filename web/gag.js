// SPDX-License-Identifier: GPL-3.0-or-later
/**
 * Panel of the guidance nodes in the browser: a badge with the result of the last run, a live chart, and on
 * GAG (advanced) a list of presets and a picker of blocks. The server's side is nodes/panel/.
 *
 * Messages only change the memory of a node. A timer draws it, so that panels follow every change of a field: by hand,
 * by undo, by another extension or by the Vue renderer.
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
 * Memory of a node. It outlives the node's object: undo and a change of workflow make new objects.
 * @typedef {{
 *   chartOpen?: boolean,
 *   pickerOpen?: boolean,
 *   report?: {guided: number, of: number, text: string, why: import("./texts.js").Name, start: string, end: string},
 *   run?: import("./chart.js").Run,
 *   model?: import("./picker.js").Model,
 * }} Memory
 */

/**
 * Answer of the server to /gag/setup.
 * @typedef {{presets: import("./presets.js").Presets, series: import("./chart.js").Series[]}} Setup
 */

/** @type {Map<string, Memory>} by workflow and the server's id of the node */
const memories = new Map();
/** @type {WeakMap<object, Panel>} by node */
const panels = new WeakMap();
/** @type {Setup | undefined} */
let setup;
let askedForSetup = false;
/** @type {import("./chart.js").Series[]} */
const NO_SERIES = [];
/** The message about open charts that was last sent to the server; empty if no chart is open there. */
let sent = "";
let sending = false;
/** Token that the server sent over this tab's connection, and that requests repeat as proof that they come from it. */
let token = "";
const TOKEN_MS = 2000;

const rootGraph = () => app.rootGraph ?? app.graph;
const connected = () => api.socket?.readyState === WebSocket.OPEN && Boolean(api.clientId);

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
 * @returns {Generator<[string, any]>}
 */
function* everyNode(graph = rootGraph(), prefix = "") {
  for (const node of graph?.nodes ?? []) {
    yield [`${prefix}${node.id}`, node];
    if (node.subgraph) yield* everyNode(node.subgraph, `${prefix}${node.id}:`);
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
    if (panel) open.set(panel, [...(open.get(panel) ?? []), id]);
  }
  return open;
}

/** Panel at the foot of a node. */
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
    // The panel is not saved: it is in neither the workflow nor the prompt, and comes after all widgets that are.
    const options = { serialize: false, hideOnZoom: false, margin: 0, getMinHeight: height, getMaxHeight: height };
    node.addDOMWidget(WIDGET, "gag", this.element, options).serialize = false;
    // A node that Vue draws passes the wheel to the canvas by itself.
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
      // A node that was added just now has no memory yet.
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
    const { chartOpen = false, pickerOpen = false } = this.memory;
    // Undo and a change of workflow make new nodes. Vue reuses the page's elements of the old node with the same id,
    // among them the old panel, which nothing draws any more.
    if (vueNodes() && !this.element.isConnected && this.node.graph === app.canvas.graph) {
      document.querySelector(`[data-node-id="${CSS.escape(String(this.node.id))}"] .gag-panel`)?.replaceWith(this.element);
    }
    this.drawBadge();
    show(this.chartButton, this.chart.element, chartOpen, this.content);
    if (chartOpen) this.chart.draw(this.memory.run, setup?.series ?? NO_SERIES);
    if (this.pickerButton) {
      show(this.pickerButton, this.picker.element, pickerOpen, this.content);
      if (pickerOpen) this.picker.draw(this.memory.model, String(this.field("blocks")?.value ?? ""));
    }
    if (this.presetRow && setup && !this.chooser) {
      this.chooser = new PresetChooser(setup.presets, this.field.bind(this), this.write.bind(this));
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

  /** Keep the node as high as its panel needs. The page knows that height only once it shows the panel. */
  resize() {
    const height = this.content.offsetHeight;
    if (!height || height === this.height) return;
    const growth = height - this.height;
    this.height = height;
    const [width, nodeHeight] = this.node.size;
    this.node.setSize([width, Math.max(this.node.computeSize()[1], nodeHeight + Math.min(0, growth))]);
    this.node.graph?.setDirtyCanvas?.(true, true);
  }
}

const vueNodes = () => Boolean(/** @type {any} */ (globalThis).LiteGraph?.vueNodesMode);

/**
 * Add an element to a container, or remove it, and mark its button accordingly.
 * @param {Element} button
 * @param {Element} part
 * @param {boolean} open
 * @param {Element} container
 */
function show(button, part, open, container) {
  button.setAttribute("aria-expanded", String(open));
  if (open && part.parentElement !== container) container.append(part);
  if (!open) part.remove();
}

/** @param {string} route */
async function ask(route) {
  const answer = await api.fetchApi(route);
  if (!answer.ok) throw new Error(`${route}: ${answer.status}`);
  return answer.json();
}

/**
 * Send the server a request of this tab. The first request has no token yet: it is repeated once the token has come.
 * @param {string} route
 * @param {object} content
 * @returns {Promise<Response>}
 */
async function post(route, content) {
  const send = () => {
    const body = JSON.stringify({ client: api.clientId, token, ...content });
    return api.fetchApi(route, { method: "POST", headers: { "Content-Type": "application/json" }, body });
  };
  const known = token;
  const answer = await send();
  if (answer.status !== 409) return answer;
  for (let waited = 0; token === known && waited < TOKEN_MS; waited += REFRESH_MS) {
    await new Promise((resolve) => setTimeout(resolve, REFRESH_MS));
  }
  return token === known ? answer : send();
}

async function askForSetup() {
  try {
    setup = await ask("/gag/setup");
  } catch {
    // The server still runs another version of the pack than that of this file: the nodes have no presets to choose.
  }
}

/** Ask the server for the models that came into the nodes of this workflow before the page was loaded. */
async function askForBlocks() {
  const workflow = rootGraph().id;
  if (!connected()) return;
  try {
    const answer = await post("/gag/blocks", { workflow });
    if (!answer.ok) return;
    const known = await answer.json();
    for (const [id, model] of Object.entries(known)) memoryOf(workflow, firstId(workflow, id)).model ??= model;
  } catch {
    // The next run sends the blocks.
  }
}

/**
 * Send the server the list of open charts, if it changed. The server measures for these charts and no others.
 * @param {string[]} nodes
 */
async function sendOpenCharts(nodes) {
  if (sending || !connected()) return;
  const content = { workflow: rootGraph().id, nodes };
  const message = nodes.length ? JSON.stringify([api.clientId, content]) : "";
  if (message === sent) return;
  sending = true;
  sent = message;
  try {
    const answer = await post("/gag/listen", content);
    // The connection is so new that the server does not know it yet: send again.
    if (answer.status === 409) sent = "";
  } catch {
    // The server is gone. The list is sent again once it is back.
  } finally {
    sending = false;
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
  if (open.size && !askedForSetup && connected()) {
    askedForSetup = true;
    void askForSetup();
  }
  void sendOpenCharts(charts);
}

/**
 * Return the id that the memory of a node has. A node with several ids, in a subgraph that is used more than once, has
 * its memory under the first of them.
 * @param {string} workflow
 * @param {string} id
 */
function firstId(workflow, id) {
  if (workflow !== rootGraph().id) return id;
  return [...openPanels().values()].find((ids) => ids.includes(id))?.[0] ?? id;
}

/**
 * Call `act` with each message of a kind. A message for a workflow that is not open waits in its nodes' memories.
 * @param {string} kind
 * @param {(data: any, find: (id: string) => Memory) => void} act
 */
function on(kind, act) {
  api.addEventListener(kind, (/** @type {CustomEvent} */ { detail }) => {
    const workflow = detail.workflow ?? rootGraph().id;
    act(detail, (id) => memoryOf(workflow, firstId(workflow, id)));
  });
}

on("gag.token", (data) => {
  token = data.token;
});

on("gag.report", ({ node, ...report }, find) => {
  find(node).report = report;
});

on("gag.blocks", ({ node, parts, default: chosen }, find) => {
  find(node).model = { parts, default: chosen };
});

on("gag.chart", ({ run, steps, series, points }, find) => {
  for (const [id, values] of Object.entries(points)) {
    const memory = find(id);
    const earlier = memory.run?.id === run ? memory.run : undefined;
    const added = values.map((/** @type {number[]} */ [step, ...numbers]) => [step, numbers]);
    const all = new Map([...(earlier?.points ?? []), ...added]);
    memory.run = { id: run, steps, series: earlier?.series ?? series, points: all };
  }
});

// Nothing has been sent over a new connection yet.
api.addEventListener("reconnected", () => {
  sent = "";
  askedForSetup = Boolean(setup);
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
    if (GUIDANCE.includes(node.comfyClass)) panels.set(node, new Panel(node));
  },
});
