// SPDX-License-Identifier: GPL-3.0-or-later
import { chooseNone, formatBlocks, parseBlocks } from "./blocks.js";
import { element } from "./dom.js";
import { say } from "./texts.js";

/**
 * Blocks of a model, and those that are guided by default.
 * @typedef {{parts: import("./blocks.js").Parts, default: import("./blocks.js").Chosen}} Model
 */

/** @type {Record<string, import("./texts.js").Name>} */
const TITLES = { d: "down", m: "middle", u: "up" };

/** Grid of the blocks of a model. It shows which blocks a text names. A click on a block writes a new text. */
export class Picker {
  /** @param {(text: string) => void} write receives the new text */
  constructor(write) {
    this.write = write;
    this.element = element("div", { className: "gag-picker" });
    this.drawn = "";
  }

  /**
   * @param {Model | undefined} model
   * @param {string} text
   */
  draw(model, text) {
    const drawn = JSON.stringify([model, text]);
    if (drawn === this.drawn) return;
    this.drawn = drawn;
    if (!model) {
      this.element.replaceChildren(element("div", { className: "gag-note" }, say("unknown")));
      return;
    }
    const chosen = text.trim() ? parseBlocks(text, model.parts) : model.default;
    const shown = chosen ?? chooseNone(model.parts);
    const rows = Object.entries(shown).map(([part, blocks]) => {
      const cells = blocks.map((block, index) => this.cell(model, shown, part, index, block));
      const title = Object.hasOwn(TITLES, part) ? say(TITLES[part]) : part;
      return element("div", { className: "gag-part" }, element("span", {}, title), ...cells);
    });
    const reset = element("button", { textContent: say("default"), title: say("default_tip") });
    reset.setAttribute("aria-pressed", String(!text.trim()));
    reset.onclick = () => this.write("");
    const note = element("span", { className: "gag-note" }, chosen ? "" : say("unnamed"));
    rows.push(element("div", { className: "gag-part" }, reset, note));
    this.element.replaceChildren(...rows);
  }

  /**
   * @param {Model} model
   * @param {import("./blocks.js").Chosen} shown
   * @param {string} part
   * @param {number} index
   * @param {boolean[]} block
   */
  cell(model, shown, part, index, block) {
    const some = block.some(Boolean);
    const all = block.every(Boolean);
    const cell = element("button", {
      className: "gag-block",
      textContent: `${index}`,
      title: say("block_tip", { part, number: index, guided: block.filter(Boolean).length, of: block.length }),
    });
    cell.setAttribute("aria-pressed", all ? "true" : some ? "mixed" : "false");
    cell.onclick = () => {
      const wanted = structuredClone(shown);
      wanted[part][index] = block.map(() => !all);
      const text = formatBlocks(wanted);
      // The last chosen block cannot be removed, because an empty text means the default.
      if (text) this.write(text === formatBlocks(model.default) ? "" : text);
    };
    return cell;
  }
}
