// SPDX-License-Identifier: GPL-3.0-or-later
/** Texts of the panels, one text a line. `python dev.py texts` copies them to locales/. */
const ENGLISH = {
  guided: "Guided {guided} of {of} attentions in {calls} of {all} calls.",
  overruled: "In {calls} a later GAG node acted.",
  adapted: "Strength was multiplied by {factor}, because CFG was {cfg}.",
  other_text: "In {attentions} attentions another node reads other text.",
  unknown_rows: "In {calls} some rows were left alone: their prompt cannot be told.",
  measured: "Measured {attentions} attentions in {calls} model calls.",
  nothing_measured: "Nothing measured: no text attention ran.",
  unfinished: "The last run did not finish.",
  nothing: "Nothing guided: {why}.",
  why_off: "strength is 0",
  why_no_call: "no model call reached it",
  why_later: "a later GAG node acts",
  why_cfg: "it rests beside CFG {found}",
  why_schedule: "its schedule is 0",
  why_range: "no step within {start} to {end}",
  why_empty: "the prompts are empty",
  why_no_context: "its text comes another way",
  why_no_positive: "no positive prompt",
  why_unknown_rows: "the prompts cannot be told apart",
  why_other_text: "another node reads other text",
  why_other_code: "the blocks run code of {found}",
  why_not_run: "none of its attentions ran",
  bypassed: "Bypassed: does nothing.",
  muted: "Muted: does not run.",
  cached: "Nothing ran: cached.",
  cached_tip: "Nothing had changed, so ComfyUI reused the last result. Another seed makes a new run.",
  edited: "The node was changed since that run.",
  chart: "chart",
  chart_tip: "Draw what guidance does, step by step, while a run goes on.",
  chart_empty: "Queue a run: it draws a point for each step.",
  chart_soon: "A run has begun. The first numbers come with its first step.",
  chart_later: "A run has begun. Guidance begins at {start} % of it.",
  chart_nothing: "Nothing was guided in the last run.",
  chart_closed: "The chart was closed during the last run. Run with another seed to draw it.",
  chart_cached: "Nothing ran: nothing had changed, so ComfyUI reused the last result. Run with another seed to draw it.",
  step: "step {step}",
  meaning: "On average guidance changes the attention output by {gain} %.",
  meaning_capped: "The cap holds it back in {capped} % of the tokens: for more effect raise {field}.",
  meaning_free: "The cap holds it back in {capped} % of the tokens: if the picture breaks, lower {field}.",
  blocks: "blocks",
  blocks_tip: "Pick the blocks to guide.",
  gain: "gain",
  gain_tip: "How much guidance changes the attention output. The top of the chart is the largest value so far.",
  parallel: "parallel",
  parallel_tip: "Share of the guidance that lies along the attention output; the rest is orthogonal to it.",
  capped: "capped",
  capped_tip: "Share of query tokens where the cap (norm_threshold) shortens the guidance.",
  unknown: "Run once to see this model's blocks.",
  unnamed: "The text does not name blocks of this model.",
  down: "down",
  middle: "middle",
  up: "up",
  block_tip: "{part} {number}: {guided} of {of} text attentions guided",
  default: "default",
  default_tip: "Guide the default blocks of this model, by clearing the field.",
  preset: "preset",
  preset_tip: "Fill in the fields from a preset of the GAG node. Only apply_to, blocks and verbose stay as they are.",
  modified: "modified",
};

/** @typedef {keyof typeof ENGLISH} Name of a text */

// Maps, because an object also answers to names that it inherits, such as "constructor".
/** @type {Map<string, string>} */
const english = new Map(Object.entries(ENGLISH));
/** @type {Map<string, string>} */
let translated = new Map();

/**
 * Use the texts of another language from now on, where they are translated.
 * @param {Record<string, {gag?: Record<string, string>}>} packs texts from the locales/ of all packs, by language
 * @param {string} language such as `de` or `zh-TW`
 */
export function speak(packs, language) {
  const texts = (packs[language] ?? packs[language.split("-")[0]])?.gag ?? {};
  translated = new Map(Object.entries(texts).filter(([, text]) => typeof text === "string"));
}

/**
 * True if there is a text of this name.
 * @param {string} name
 * @returns {name is Name}
 */
export const isText = (name) => english.has(name);

/**
 * Return a text, with each `{name}` in it replaced by the value of that name.
 * @param {Name} name
 * @param {Record<string, unknown>} [values]
 */
export function say(name, values = {}) {
  const text = translated.get(name) ?? english.get(name) ?? name;
  return text.replace(/\{(\w+)\}/g, (_, key) => String(values[key]));
}
