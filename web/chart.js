// SPDX-License-Identifier: GPL-3.0-or-later
import { element } from "./dom.js";
import { isText, say } from "./texts.js";

const SVG = "http://www.w3.org/2000/svg";
// The box is 100 wide and 100 high. The margin keeps a line at the edge of the range in sight.
const SIZE = 100;
const MARGIN = 2;

/**
 * A series of numbers that a chart shows, as the server declares it (SERIES in nodes/panel/chart.py). Label and tooltip
 * are the texts `name` and `name_tip` of texts.js.
 * @typedef {{
 *   name: string,
 *   unit: string,
 *   range: [number, number | null],
 *   colour: string,
 * }} Series `unit` "%": a share, shown times 100. `range`: values at the bottom and top of the box; a top of null is
 *   the largest value so far.
 */

/**
 * Numbers of one run: for each step one number per series, in the order of `series`. New numbers make a new object.
 * @typedef {{id: number, steps: number, series: Series[], points: Map<number, number[]>, live?: boolean}} Run `live`: true
 *   until the run has ended.
 */

/** Chart of a run: a line for each series over the steps, axes, a legend with the latest values, and a sentence. */
export class Chart {
  constructor() {
    this.svg = document.createElementNS(SVG, "svg");
    this.svg.setAttribute("viewBox", `0 0 ${SIZE} ${SIZE}`);
    this.svg.setAttribute("preserveAspectRatio", "none");
    // Axes: that of the series whose top grows with the values, that of the others, and that of the steps.
    this.left = element("div", { className: "gag-axis" });
    this.right = element("div", { className: "gag-axis" });
    this.steps = element("div", { className: "gag-steps" });
    this.legend = element("div", { className: "gag-legend" });
    this.note = element("div", { className: "gag-note" });
    const plot = element("div", { className: "gag-plot" }, this.left, this.svg, this.right, this.steps);
    this.element = element("div", { className: "gag-chart" }, plot, this.legend, this.note);
    /** @type {Series[]} */
    this.series = [];
    /** @type {SVGPolylineElement[]} by series */
    this.lines = [];
    /** @type {HTMLElement[]} by series */
    this.labels = [];
    /** @type {Run | undefined} the run that the lines show */
    this.drawn = undefined;
  }

  /**
   * @param {Run | undefined} run
   * @param {Series[]} declared the series to show while there is no run
   * @param {string} note
   * @param {boolean} old true if the node was edited since the run
   */
  draw(run, declared, note, old) {
    this.element.classList.toggle("gag-old", old);
    if (this.note.textContent !== note) this.note.textContent = note;
    const series = run?.series ?? declared;
    if (run === this.drawn && series === this.series) return;
    this.drawn = run;
    if (series !== this.series) this.declare(series);
    const steps = [...(run?.points.keys() ?? [])].sort((a, b) => a - b);
    const last = Math.max((run?.steps ?? 0) - 1, steps.at(-1) ?? 0, 1);
    const tops = series.map((one, i) => {
      const values = steps.map((step) => run?.points.get(step)?.[i] ?? 0);
      this.lines[i].setAttribute("points", polyline(one, steps.map((step) => step / last), values));
      this.labels[i].textContent = `${label(one)}${shown(one, values.at(-1))}`;
      return top(one, values);
    });
    const axis = (/** @type {number} */ i) =>
      i < 0 || !steps.length ? [] : [tops[i], series[i].range[0]].map((value) => shown(series[i], value).trim());
    write(this.left, axis(series.findIndex(({ range }) => range[1] === null)));
    write(this.right, axis(series.findIndex(({ range }) => range[1] !== null)));
    const named = run ? [0, ...(last > 2 ? [Math.round(last / 2)] : []), last] : [];
    write(this.steps, named.map((step, i) => (i ? `${step + 1}` : say("step", { step: step + 1 }))));
  }

  /** @param {Series[]} series */
  declare(series) {
    this.series = series;
    this.lines = series.map(() => document.createElementNS(SVG, "polyline"));
    this.labels = series.map((one) => element("span", { title: tooltip(one) }));
    series.forEach(({ name, colour }, i) => {
      for (const part of [this.lines[i], this.labels[i]]) {
        part.setAttribute("class", "gag-series");
        part.dataset.series = name;
        part.style.setProperty("--gag-series", colour);
      }
    });
    this.svg.replaceChildren(...this.lines);
    this.legend.replaceChildren(...this.labels);
    // The axis of a single series has its colour.
    const growing = series.filter(({ range }) => range[1] === null);
    this.left.classList.toggle("gag-series", growing.length === 1);
    this.left.style.setProperty("--gag-series", growing[0]?.colour ?? "");
  }
}

/**
 * Write the texts of an axis.
 * @param {HTMLElement} axis
 * @param {string[]} texts
 */
const write = (axis, texts) => axis.replaceChildren(...texts.map((text) => element("span", {}, text)));

/** @param {Series} series */
const label = ({ name }) => (isText(name) ? say(name) : name);

/** @param {Series} series */
function tooltip({ name }) {
  const tip = `${name}_tip`;
  return isText(tip) ? say(tip) : name;
}

/**
 * Return a value with its unit, and a space before it; an empty text without a value.
 * @param {Series} series
 * @param {number | undefined} value
 */
function shown({ unit }, value) {
  if (value === undefined) return "";
  const number = Number((unit === "%" ? 100 * value : value).toPrecision(3));
  return unit ? ` ${number} ${unit}` : ` ${number}`;
}

/**
 * Return the value at the top of the box.
 * @param {Series} series
 * @param {number[]} values
 */
const top = ({ range: [, high] }, values) =>
  high ?? values.reduce((largest, value) => Math.max(largest, value), -Infinity);

/**
 * Return the points of an SVG polyline, all of them within the box.
 * @param {Series} series
 * @param {number[]} xs places along the run, from 0 to 1
 * @param {number[]} values
 */
function polyline(series, xs, values) {
  const low = series.range[0];
  const high = top(series, values);
  // A range without extent, such as that of values that are all 0, has all its values at the bottom.
  const extent = high - low > 0 ? high - low : 1;
  const points = values.map((value, k) => {
    // Values whose difference overflows have no share.
    const share = Math.min(Math.max((value - low) / extent, 0), 1) || 0;
    return [SIZE * xs[k], SIZE - MARGIN - (SIZE - 2 * MARGIN) * share];
  });
  // A line needs two points to be seen.
  if (points.length === 1) points.push([points[0][0] + 1, points[0][1]]);
  return points.map((point) => point.map((n) => n.toFixed(2)).join(",")).join(" ");
}
