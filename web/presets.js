// SPDX-License-Identifier: GPL-3.0-or-later
import { element } from "./dom.js";
import { say } from "./texts.js";

/** @typedef {Record<string, Record<string, unknown>>} Presets values of the fields, by the name of the preset */

// No preset has this name.
const MODIFIED = "";

/** List of presets. It fills the fields of a node, and shows which preset the fields have. */
export class PresetChooser {
  /**
   * @param {Presets} presets
   * @param {(name: string) => any} widget returns the widget of a field; undefined if the node has no such field
   * @param {(values: Record<string, unknown>) => void} write sets the fields that the node has
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
    const shown = Object.entries(this.presets).find(([, fields]) =>
      Object.entries(fields).every(([name, value]) => this.widget(name)?.value === value || !this.widget(name)),
    );
    const name = shown?.[0] ?? MODIFIED;
    if (this.select.value !== name) this.select.value = name;
  }
}
