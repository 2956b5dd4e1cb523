// SPDX-License-Identifier: GPL-3.0-or-later
import { element } from "./dom.js";

/** @typedef {Record<string, Record<string, unknown>>} Presets by name, the values of the fields */

const MODIFIED = "modified";

/** A list of presets that fills the fields of a node, and shows which preset they are. */
export class PresetChooser {
  /**
   * @param {Presets} presets
   * @param {(name: string) => any} widget of a field of the node; undefined for those that it does not have
   * @param {(name: string, value: unknown) => void} write a field
   */
  constructor(presets, widget, write) {
    this.presets = presets;
    this.widget = widget;
    const title = "Fills in the fields of a preset of the GAG node. Strength, range and blocks stay as they are.";
    const names = [...Object.keys(presets), MODIFIED];
    this.select = element("select", { title }, ...names.map((name) => element("option", { value: name }, name)));
    this.select.options[names.length - 1].disabled = true;
    this.select.onchange = () => {
      for (const [name, value] of Object.entries(presets[this.select.value] ?? {})) {
        if (widget(name)) write(name, value);
      }
    };
    this.element = element("label", {}, "preset ", this.select);
  }

  draw() {
    const same = Object.entries(this.presets).find(([, fields]) =>
      Object.entries(fields).every(([name, value]) => this.widget(name)?.value === value || !this.widget(name)),
    );
    const shown = same?.[0] ?? MODIFIED;
    if (this.select.value !== shown && document.activeElement !== this.select) this.select.value = shown;
  }
}
