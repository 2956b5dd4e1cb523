// SPDX-License-Identifier: GPL-3.0-or-later
import { element } from "./dom.js";
import { say } from "./texts.js";

/** @typedef {Record<string, Record<string, unknown>>} Presets by name, the values of the fields */

// No preset is called so.
const MODIFIED = "";

/** A list of presets that fills the fields of a node, and shows which preset they are. */
export class PresetChooser {
  /**
   * @param {Presets} presets
   * @param {(name: string) => any} widget of a field of the node; undefined for those that it does not have
   * @param {(values: Record<string, unknown>) => void} write fields; those that the node does not have are left out
   */
  constructor(presets, widget, write) {
    this.presets = presets;
    this.widget = widget;
    const options = Object.keys(presets).map((name) => element("option", { value: name }, name));
    const modified = element("option", { value: MODIFIED, disabled: true }, say("modified"));
    this.select = element("select", { title: say("preset_tip") }, ...options, modified);
    this.select.onchange = () => write(presets[this.select.value] ?? {});
    this.element = element("label", {}, `${say("preset")} `, this.select);
  }

  draw() {
    const same = Object.entries(this.presets).find(([, fields]) =>
      Object.entries(fields).every(([name, value]) => this.widget(name)?.value === value || !this.widget(name)),
    );
    const shown = same?.[0] ?? MODIFIED;
    if (this.select.value !== shown) this.select.value = shown;
  }
}
