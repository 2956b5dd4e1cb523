// SPDX-License-Identifier: GPL-3.0-or-later
/** Room for a node that grows: it moves to the nearest place where it covers no other node. Other nodes stay. */

export const TITLE = 30;
const GAP = 24;
const MOST_PLACES = 60;

/** @typedef {[number, number]} Pair */

/**
 * Return the nearest place where a node of this size covers no other node. Nodes that it covers at its old size count
 * for nothing.
 * @param {any} node
 * @param {Pair} oldSize
 * @param {Pair} size
 * @returns {Pair}
 */
export function nearestRoom(node, oldSize, size) {
  const [x, y] = node.pos;
  const others = (node.graph?.nodes ?? [])
    .filter((/** @type {any} */ other) => other !== node && !covers([x, y], oldSize, other))
    .filter((/** @type {any} */ other) => Number.isFinite(other.pos?.[0]) && Number.isFinite(other.size?.[0]));
  const isFree = (/** @type {Pair} */ pos) => !others.some((/** @type {any} */ other) => covers(pos, size, other));
  if (isFree([x, y])) return [x, y];
  const places = (/** @type {0 | 1} */ axis, /** @type {number} */ title) => {
    const beside = others.flatMap((/** @type {any} */ { pos, size: [...own] }) => [
      Math.round(pos[axis] - size[axis] - GAP - title),
      Math.round(pos[axis] + own[axis] + GAP + title),
    ]);
    const distance = (/** @type {number} */ place) => Math.abs(place - node.pos[axis]);
    return [node.pos[axis], ...beside].sort((a, b) => distance(a) - distance(b)).slice(0, MOST_PLACES);
  };
  const rows = places(1, TITLE);
  const found = places(0, 0).flatMap((left) => rows.map((top) => /** @type {Pair} */ ([left, top])));
  const far = (/** @type {Pair} */ [left, top]) => Math.hypot(left - x, top - y);
  return found.sort((a, b) => far(a) - far(b)).find(isFree) ?? [x, y];
}

/**
 * True if a node at a place, with its title bar, covers a part of another node.
 * @param {Pair} pos
 * @param {Pair} size
 * @param {any} other
 */
function covers([x, y], [width, height], { pos, size, flags }) {
  const [otherWidth, otherHeight] = flags?.collapsed ? [size[0], 0] : size;
  return (
    x < pos[0] + otherWidth && pos[0] < x + width && y - TITLE < pos[1] + otherHeight && pos[1] - TITLE < y + height
  );
}
