// SPDX-License-Identifier: GPL-3.0-or-later
/**
 * Readers of everything that the server sends. Each returns undefined for content that is not what it expects, such as
 * that of another version of the pack, so that the panels only ever meet what their types promise.
 */

/** Limit of the text attentions of a model, far above that of any model. The picker has a button for each block. */
const MOST_ATTENTIONS = 4096;

/** @typedef {Record<string, unknown>} Content */

/**
 * Answer of the server to /gag/setup.
 * @typedef {{presets: import("./presets.js").Presets, series: import("./chart.js").Series[]}} Setup
 */

/** @param {unknown} value @returns {value is Content} */
export const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);

/** @param {unknown} value @returns {value is string} */
export const isString = (value) => typeof value === "string";

/** @param {unknown} value @returns {value is number} */
const isNumber = (value) => Number.isFinite(value);

/** @param {unknown} value @returns {value is number} */
const isCount = (value) => Number.isSafeInteger(value) && Number(value) >= 0;

/**
 * @template T
 * @param {unknown} value
 * @param {(item: unknown) => item is T} isItem
 * @returns {value is T[]}
 */
const isListOf = (value, isItem) => Array.isArray(value) && value.every(isItem);

/**
 * @param {Content} content
 * @returns {import("./status.js").Status | undefined}
 */
export function readStatus({ parts, text, guided, inputs }) {
  if (guided !== null && !isCount(guided)) return undefined;
  if (!isString(text) || !isObject(inputs) || !isListOf(parts, isPart)) return undefined;
  return { parts, text, guided: /** @type {number | null} */ (guided), inputs };
}

/** @param {unknown} value @returns {value is [string, Content]} */
const isPart = (value) =>
  Array.isArray(value) && value.length === 2 && isString(value[0]) && isObject(value[1]) &&
  Object.values(value[1]).every((item) => isString(item) || isNumber(item));

/**
 * @param {unknown} content
 * @returns {import("./picker.js").Model | undefined}
 */
export function readModel(content) {
  if (!isObject(content)) return undefined;
  const { parts, default: chosen } = content;
  if (!isObject(parts) || !isObject(chosen)) return undefined;
  const names = Object.keys(parts);
  let attentions = 0;
  for (const name of names) {
    const counts = parts[name];
    const blocks = Object.hasOwn(chosen, name) ? chosen[name] : undefined;
    if (!isListOf(counts, isCount) || !isListOf(blocks, isSwitches) || blocks.length !== counts.length) return undefined;
    if (!blocks.every((block, index) => block.length === counts[index])) return undefined;
    attentions += blocks.reduce((sum, block) => sum + Math.max(block.length, 1), 0);
  }
  if (Object.keys(chosen).length !== names.length || attentions > MOST_ATTENTIONS) return undefined;
  return /** @type {import("./picker.js").Model} */ ({ parts, default: chosen });
}

/** @param {unknown} value @returns {value is boolean[]} */
const isSwitches = (value) => isListOf(value, (item) => typeof item === "boolean");

/**
 * Return the numbers of a run that are new, by node.
 * @param {Content} content
 * @returns {Map<string, import("./chart.js").Run> | undefined}
 */
export function readRuns({ run: id, steps, series, points }) {
  const declared = readSeries(series);
  if (!isNumber(id) || !isCount(steps) || !declared || !isObject(points)) return undefined;
  /** @type {Map<string, import("./chart.js").Run>} */
  const runs = new Map();
  for (const [node, rows] of Object.entries(points)) {
    if (!isListOf(rows, isRow) || !rows.every((row) => row.length === declared.length + 1)) return undefined;
    const added = rows.map(([step, ...numbers]) => /** @type {[number, number[]]} */ ([step, numbers]));
    runs.set(node, { id, steps, series: declared, points: new Map(added) });
  }
  return runs;
}

/** @param {unknown} value @returns {value is number[]} */
const isRow = (value) => isListOf(value, isNumber) && isCount(value[0]);

/**
 * @param {unknown} content
 * @returns {import("./chart.js").Series[] | undefined}
 */
export function readSeries(content) {
  return isListOf(content, isSeries) ? content : undefined;
}

/** @param {unknown} value @returns {value is import("./chart.js").Series} */
function isSeries(value) {
  if (!isObject(value) || !Array.isArray(value.range)) return false;
  const [low, high] = value.range;
  const isRange = value.range.length === 2 && isNumber(low) && (high === null || isNumber(high));
  return isRange && isString(value.name) && isString(value.unit) && isString(value.colour);
}

/**
 * @param {unknown} content
 * @returns {Setup | undefined}
 */
export function readSetup(content) {
  if (!isObject(content)) return undefined;
  const { presets } = content;
  const series = readSeries(content.series);
  if (!series || !isObject(presets) || !Object.values(presets).every(isObject)) return undefined;
  return { presets: /** @type {import("./presets.js").Presets} */ (presets), series };
}
