// SPDX-License-Identifier: GPL-3.0-or-later
import { element } from "./dom.js";
import { isText, say } from "./texts.js";

const MUTED = 2;
const BYPASSED = 4;

/**
 * What the last run of a node did, or why it did nothing, as the server sends it (nodes/panel/status.py).
 * @typedef {{
 *   parts: [string, Record<string, unknown>][],
 *   text: string,
 *   guided: number | null,
 *   inputs: Record<string, unknown>,
 * }} Status `parts`: sentences, each the name of a text and its values; `text`: the same in English; `guided`: number of
 *   attentions; `inputs`: those that the node was queued with, null for one that was linked.
 */

/** The line of a node that says what its last run did. */
export class StatusLine {
  constructor() {
    this.element = element("span", { className: "gag-status" });
    this.drawn = "";
  }

  /**
   * @param {any} node
   * @param {Status | undefined} status
   * @param {boolean} cached true if ComfyUI ran nothing the last time, because nothing had changed
   */
  draw(node, status, cached) {
    const told = status ? speak(status) : "";
    const edited = isEdited(node, status);
    const state = stateOf(node, cached && !edited);
    // A text that reports something is not about a run alone, so it stays.
    const text = state && status?.guided === null ? `${state} ${told}` : (state ?? told);
    const title = [text];
    if (state && told && text !== `${state} ${told}`) title.push(told);
    if (edited) title.push(say("edited"));
    if (cached && !edited) title.push(say("cached_tip"));
    const classes = ["gag-status"];
    if (state || edited) classes.push("gag-old");
    else if (status?.guided === 0) classes.push("gag-none");
    const drawn = JSON.stringify([text, title, classes]);
    if (drawn === this.drawn) return;
    this.drawn = drawn;
    this.element.textContent = text;
    this.element.title = text ? title.join("\n") : "";
    this.element.className = classes.join(" ");
  }
}

/**
 * Return the text for a node that did not run the last time, or will not run the next time.
 * @param {any} node
 * @param {boolean} cached
 */
function stateOf(node, cached) {
  if (node.mode === BYPASSED) return say("bypassed");
  if (node.mode === MUTED) return say("muted");
  return cached ? say("cached") : undefined;
}

/** @param {Status} status */
function speak({ parts, text }) {
  const known = parts.every(([name, { why }]) => isText(name) && (why === undefined || isText(String(why))));
  if (!known) return text;
  return parts.map(([name, values]) => say(/** @type {any} */ (name), withReason(values))).join(" ");
}

/**
 * Return the values of a sentence with the reason in words.
 * @param {Record<string, unknown>} values
 */
const withReason = (values) =>
  values.why === undefined ? values : { ...values, why: say(/** @type {any} */ (values.why), values) };

/**
 * True if a node has other settings or links than those that its status is about, or is switched off.
 * @param {any} node
 * @param {Status | undefined} status
 */
export function isEdited(node, status) {
  if (!status) return false;
  const { inputs } = status;
  if (node.mode === BYPASSED || node.mode === MUTED) return true;
  const linked = new Set();
  for (const [index, { name, link }] of (node.inputs ?? []).entries()) {
    const wasLinked = Object.hasOwn(inputs, name) && inputs[name] === null;
    if (link != null) linked.add(name);
    if (wasLinked && link == null) return true;
    // Not every link hands something on: not that from a node that is off, or that only the page knows.
    const source = wasLinked || link == null ? undefined : node.getInputNode?.(index);
    if (source?.mode === 0 && !source.isVirtualNode) return true;
  }
  return (node.widgets ?? []).some(
    (/** @type {any} */ { name, value }) => Object.hasOwn(inputs, name) && !linked.has(name) && inputs[name] !== value,
  );
}
