// SPDX-License-Identifier: GPL-3.0-or-later
/** What the numbers of a chart mean, in words. This file alone knows series by their names. */
import { say } from "./texts.js";

/** @typedef {import("./chart.js").Run} Run */

/**
 * Return what the numbers of a run mean, in a sentence or two; an empty text without points.
 * @param {Run} run
 * @param {string} field the setting that makes guidance stronger on this node
 */
export function meaning(run, field) {
  const gain = mean(run, "gain");
  const capped = mean(run, "capped");
  if (gain === undefined || capped === undefined) return "";
  const values = { gain: percent(gain), capped: percent(capped), field };
  if (capped === 0) return say("meaning", values); // the rule may have no cap
  return `${say("meaning", values)} ${say(capped >= 0.5 ? "meaning_capped" : "meaning_free", values)}`;
}

/** @param {number} share */
const percent = (share) => Number((100 * share).toPrecision(2));

/**
 * Return the mean of a series over the steps of a run.
 * @param {Run} run
 * @param {string} name
 */
function mean({ series, points }, name) {
  const index = series.findIndex((one) => one.name === name);
  if (index < 0 || !points.size) return undefined;
  return [...points.values()].reduce((sum, values) => sum + values[index], 0) / points.size;
}
