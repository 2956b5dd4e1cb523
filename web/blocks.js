// SPDX-License-Identifier: GPL-3.0-or-later
/**
 * The text that names blocks, `d0-1,u` or `double 0-18, single 7`: the same grammar as nodes/blocks.py.
 *
 * @typedef {Record<string, number[]>} Parts by part, the number of text attentions in each of its blocks
 * @typedef {Record<string, boolean[][]>} Chosen by part and block, which of its text attentions are guided
 */

const RANGE = "\\d{1,6}(?:\\s*-\\s*\\d{1,6})?";
const TERM = new RegExp(`^([a-z]+)?\\s*(${RANGE})?(?:\\.(${RANGE}))?$`);
const LETTERS = ["d", "m", "u"];

/** @param {Parts} parts */
const isUNet = (parts) => Object.keys(parts).every((name) => LETTERS.includes(name));

/**
 * Nothing chosen yet.
 * @param {Parts} parts
 * @returns {Chosen}
 */
function none(parts) {
  const empty = Object.entries(parts).map(([name, blocks]) => [name, blocks.map((count) => Array(count).fill(false))]);
  return Object.fromEntries(empty);
}

/**
 * The items that a number or a range `first-last` picks, all for none; null if there are no such.
 * @template T
 * @param {string | undefined} numbers
 * @param {T[]} items
 */
function range(numbers, items) {
  if (numbers === undefined) return items.length ? items : null;
  const [first, last = first] = numbers.split("-").map(Number);
  return first <= last && last < items.length ? items.slice(first, last + 1) : null;
}

/**
 * What a text names; null if it does not name blocks of this model.
 * @param {string} text not empty
 * @param {Parts} parts
 * @returns {Chosen | null}
 */
export function parseBlocks(text, parts) {
  const chosen = none(parts);
  let part;
  for (const term of text.toLowerCase().split(",")) {
    const match = TERM.exec(term.trim());
    if (!match?.[0]) return null;
    part = match[1] ?? part;
    if (part === undefined ? isUNet(parts) : !(part in parts)) return null;
    const named = part === undefined ? Object.keys(parts) : [part];
    const places = named.flatMap((name) => parts[name].map((count, block) => ({ name, block, count })));
    const blocks = range(match[2], places);
    if (!blocks) return null;
    for (const { name, block, count } of blocks) {
      const inner = range(match[3], [...Array(count).keys()]);
      if (!inner) return null;
      for (const number of inner) chosen[name][block][number] = true;
    }
  }
  return chosen;
}

/**
 * The shortest text that names what is chosen; empty if nothing is.
 * @param {Chosen} chosen
 */
export function formatBlocks(chosen) {
  const space = isUNet(/** @type {any} */ (chosen)) ? "" : " ";
  const terms = Object.entries(chosen).flatMap(([name, blocks]) => {
    const full = blocks.map((block) => block.every(Boolean));
    if (full.every(Boolean)) return [name];
    const whole = runs(full).map((numbers) => `${name}${space}${numbers}`);
    const parts = blocks.flatMap((block, number) =>
      full[number] ? [] : runs(block).map((numbers) => `${name}${space}${number}.${numbers}`),
    );
    return [...whole, ...parts];
  });
  return terms.join(space ? ", " : ",");
}

/**
 * The stretches of true values, as `2` or `0-3`.
 * @param {boolean[]} values
 */
function runs(values) {
  const found = [];
  for (let first = 0; first < values.length; first++) {
    if (!values[first]) continue;
    let last = first;
    while (values[last + 1]) last++;
    found.push(first === last ? `${first}` : `${first}-${last}`);
    first = last;
  }
  return found;
}
