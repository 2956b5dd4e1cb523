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
import { isObject, isString, readModel, readReport, readRuns, readSetup } from "./messages.js";
import { Picker } from "./picker.js";
import { PresetChooser } from "./presets.js";
import { isText, say, speak } from "./texts.js";

const GUIDANCE = ["GAGuidance", "GAGuidanceAdvanced", "GAGAnderson"];
const WIDGET = "gag_panel";
const REFRESH_MS = 250;
const ROW = 24;
const MUTED = 2;
const BYPASSED = 4;
const MOST_REMEMBERED = 500;
/** Limits of a search for nodes. Subgraphs within each other can hold more nodes than fit anywhere. */
const MOST_NODES = 10_000;
const DEEPEST = 32;
/** Most charts that the server takes. */
const MOST_CHARTS = 1000;

/**
 * Memory of a node. It outlives the node's object: undo and a change of workflow make new objects.
 * @typedef {{
 *   chartOpen?: boolean,
 *   pickerOpen?: boolean,
 *   report?: import("./messages.js").Report,
 *   run?: import("./chart.js").Run,
 *   model?: import("./picker.js").Model,
 * }} Memory
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
/** The message about open charts that was last sent to the server; empty if no chart is open there. */
let sent = "";
let sending = false;
/** Token that the server sent over this tab's connection, and that requests repeat as proof that they come from it. */
let token = "";
const TOKEN_MS = 2000;
/** @type {Promise<void> | undefined} the request for a token that goes on */
let askingForToken;

const rootGraph = () => app.rootGraph ?? app.graph;
const connected = () => api.socket?.readyState === WebSocket.OPEN && Boolean(api.clientId);

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
    else if (report) text = report.guided ? say("guiding", report) : say("nothing", { why: reason(report) });
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

/** @param {import("./messages.js").Report} report */
const reason = (report) => (isText(report.why) ? say(report.why, report) : report.why);

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
 * Send the server something as JSON.
 * @param {string} route
 * @param {object} content
 */
function post(route, content) {
  const headers = { "Content-Type": "application/json" };
  return api.fetchApi(route, { method: "POST", headers, body: JSON.stringify({ client: api.clientId, ...content }) });
}

/** Ask the server for the token, and wait until it comes, but not for long. */
async function askForToken() {
  try {
    await post("/gag/token", {});
    for (let waited = 0; !token && waited < TOKEN_MS; waited += REFRESH_MS) {
      await new Promise((resolve) => setTimeout(resolve, REFRESH_MS));
    }
  } catch {
    // The server is gone. The next request asks again.
  } finally {
    askingForToken = undefined;
  }
}

/**
 * Send the server a request that it takes from this tab alone, and return the answer; undefined if the tab has no token
 * yet, because its connection is so new that the server does not know it.
 * @param {string} route
 * @param {object} content
 */
async function postWithToken(route, content) {
  if (!token) await (askingForToken ??= askForToken());
  return token ? post(route, { token, ...content }) : undefined;
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
 * Send the server the list of open charts, if it changed. The server measures for these charts and no others.
 * @param {string[]} nodes
 */
async function sendOpenCharts(nodes) {
  if (sending || !connected()) return;
  const content = { workflow: openWorkflow(), nodes };
  const message = nodes.length ? JSON.stringify([api.clientId, content]) : "";
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
    if (panel.memory.chartOpen) charts.push(...ids);
  }
  if (open.size && !asked && connected()) {
    asked = true;
    if (!setup) void askForSetup();
    // A chart that is opened later is measured from the next step on if the token is there by then.
    askingForToken ??= askForToken();
  }
  void sendOpenCharts(charts.slice(0, MOST_CHARTS));
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

on("gag.token", (data) => {
  if (isString(data.token)) token = data.token;
});

on("gag.report", (data, find) => {
  const report = readReport(data);
  if (report && isString(data.node)) find(data.node).report = report;
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
    memory.run = { ...run, series: earlier?.series ?? run.series, points };
  }
});

// Nothing has been sent over a new connection yet, and it has another token.
api.addEventListener("reconnected", () => {
  sent = token = "";
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
    if (GUIDANCE.includes(node.comfyClass)) panels.set(node, new Panel(node));
  },
});
