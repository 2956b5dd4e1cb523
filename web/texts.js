// SPDX-License-Identifier: GPL-3.0-or-later
/** What the pack's nodes say in the browser. `python dev.py texts` carries it to locales/, one text a line. */
const ENGLISH = {
  guiding: "guiding {guided} of {of} layers",
  nothing: "not guiding: {why}",
  why_off: "strength is 0",
  why_no_call: "no model call",
  why_later: "a later GAG node acts",
  why_schedule: "its schedule is 0",
  why_range: "no step within {start} to {end}",
  why_empty: "the prompts are empty",
  why_no_positive: "no positive prompt",
  why_not_run: "none of its attentions ran",
  bypassed: "not guiding: bypassed",
  muted: "not guiding: muted",
  chart: "chart",
  chart_tip: "Draw what guidance does, step by step, while a run goes on.",
  blocks: "blocks",
  blocks_tip: "Pick the blocks to guide.",
  gain: "gain",
  gain_tip: "How much guidance changes what the model reads of the prompt. The line's top is its largest.",
  parallel: "parallel",
  parallel_tip: "Share of the direction that lies along what is read; the rest points sideways.",
  capped: "capped",
  capped_tip: "Share of spots where the brake (norm_threshold) shortens the guidance.",
  unknown: "Run once to see this model's blocks.",
  unnamed: "The text does not name blocks of this model.",
  down: "down",
  middle: "middle",
  up: "up",
  block_tip: "{part} {number}: {guided} of {of} text attentions guided",
  default: "default",
  default_tip: "Guide the model's usual blocks: empties the text.",
  preset: "preset",
  preset_tip: "Fills in the fields of a preset of the GAG node. Strength, range and blocks stay as they are.",
  modified: "modified",
};

/** @typedef {keyof typeof ENGLISH} Name of a text */

/** @type {Partial<Record<string, string>>} */
let translated = {};

/**
 * Say all further texts in another language, where there are translations.
 * @param {Record<string, {gag?: Record<string, string>}>} packs what the packs' locales/ have, by language
 * @param {string} language such as `de` or `zh-TW`
 */
export function speak(packs, language) {
  translated = (packs[language] ?? packs[language.split("-")[0]])?.gag ?? {};
}

/**
 * A text, with values in the places of their names.
 * @param {Name} name
 * @param {Record<string, unknown>} [values]
 */
export function say(name, values = {}) {
  return (translated[name] ?? ENGLISH[name]).replace(/\{(\w+)\}/g, (_, key) => String(values[key]));
}
