// SPDX-License-Identifier: GPL-3.0-or-later
/**
 * Syntax of the text that names blocks, such as `d0-1,u` or `double 0-18, single 7`. nodes/patching/block_syntax.py has
 * the same grammar.
 *
 * @typedef {Record<string, number[]>} Parts number of text attentions in each block, by part
 * @typedef {Record<string, boolean[][]>} Chosen for each text attention of each block, true if it is guided; by part
 */

const RANGE = "\\d{1,6}(?:\\s*-\\s*\\d{1,6})?";
const TERM = new RegExp(`^([a-z]+)?\\s*(${RANGE})?(?:\\.(${RANGE}))?$`);
const LETTERS = ["d", "m", "u"];

/** @param {Parts | Chosen} parts */
const isUNet = (parts) => Object.keys(parts).every((name) => LETTERS.includes(name));

/**
 * Return a choice of no text attention.
 * @param {Parts} parts
 * @returns {Chosen}
 */
export function chooseNone(parts) {
  const empty = Object.entries(parts).map(([name, blocks]) => [name, blocks.map((count) => Array(count).fill(false))]);
  return Object.fromEntries(empty);
}

/**
 * Return the items that a number or a range `first-last` picks: all items without one, null if there are no such items.
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
 * Parse a text. Returns null if it does not name blocks of this model.
 * @param {string} text not empty
 * @param {Parts} parts
 * @returns {Chosen | null}
 */
export function parseBlocks(text, parts) {
  const chosen = chooseNone(parts);
  let part;
  for (const term of text.toLowerCase().split(",")) {
    const match = TERM.exec(term.trim());
    if (!match?.[0]) return null;
    part = match[1] ?? part;
    if (part === undefined ? isUNet(parts) : !Object.hasOwn(parts, part)) return null;
    const names = part === undefined ? Object.keys(parts) : [part];
    const candidates = names.flatMap((name) => parts[name].map((count, block) => ({ name, block, count })));
    const blocks = range(match[2], candidates);
    if (!blocks) return null;
    for (const { name, block, count } of blocks) {
      const attentions = range(match[3], [...Array(count).keys()]);
      if (!attentions) return null;
      for (const index of attentions) chosen[name][block][index] = true;
    }
  }
  return chosen;
}

/**
 * Return the shortest text for a choice; an empty text if nothing is chosen.
 * @param {Chosen} chosen
 */
export function formatBlocks(chosen) {
  const space = isUNet(chosen) ? "" : " ";
  const terms = Object.entries(chosen).flatMap(([name, blocks]) => {
    const full = blocks.map((block) => block.every(Boolean));
    if (full.every(Boolean)) return [name];
    const fullBlocks = ranges(full).map((numbers) => `${name}${space}${numbers}`);
    const partialBlocks = blocks.flatMap((block, index) =>
      full[index] ? [] : ranges(block).map((numbers) => `${name}${space}${index}.${numbers}`),
    );
    return [...fullBlocks, ...partialBlocks];
  });
  return terms.join(space ? ", " : ",");
}

/**
 * Return the stretches of true values, such as `2` or `0-3`.
 * @param {boolean[]} values
 */
function ranges(values) {
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
