// SPDX-License-Identifier: GPL-3.0-or-later
import { element } from "./dom.js";
import { say } from "./texts.js";

const SVG = "http://www.w3.org/2000/svg";
const LINES = /** @type {const} */ (["gain", "parallel", "capped"]);

/**
 * The numbers of one run, by step: gain, parallel share, share of cap hits. What has other numbers is another object.
 * @typedef {{run: number, steps: number, points: Map<number, number[]>}} Series
 */

/** Three lines over the steps of a run, each with its latest value. */
export class Chart {
  constructor() {
    const svg = document.createElementNS(SVG, "svg");
    svg.setAttribute("viewBox", "0 0 100 100");
    svg.setAttribute("preserveAspectRatio", "none");
    this.lines = LINES.map((name) => {
      const line = document.createElementNS(SVG, "polyline");
      line.setAttribute("class", `gag-${name}`);
      svg.append(line);
      return line;
    });
    this.values = LINES.map((name) => element("span", { className: `gag-${name}`, title: say(`${name}_tip`) }));
    this.element = element("div", { className: "gag-chart" }, svg, element("div", {}, ...this.values));
    /** @type {Series | undefined | null} what is drawn; null before anything is */
    this.drawn = null;
    this.draw(undefined);
  }

  /** @param {Series | undefined} series */
  draw(series) {
    if (series === this.drawn) return;
    this.drawn = series;
    const steps = [...(series?.points.keys() ?? [])].sort((a, b) => a - b);
    const last = Math.max((series?.steps ?? 0) - 1, steps.at(-1) ?? 0, 1);
    LINES.forEach((name, i) => {
      const values = steps.map((step) => series?.points.get(step)?.[i] ?? 0);
      const most = name === "gain" ? Math.max(...values, Number.MIN_VALUE) : 1;
      const places = steps.map((step, k) => [(100 * step) / last, 98 - (96 * values[k]) / most]);
      // A line needs two points to be seen.
      if (places.length === 1) places.push([places[0][0] + 1, places[0][1]]);
      this.lines[i].setAttribute("points", places.map((place) => place.map((n) => n.toFixed(2)).join(",")).join(" "));
      const value = values.at(-1);
      const shown = value === undefined ? "" : ` ${Number((100 * value).toPrecision(3))} %`;
      this.values[i].textContent = say(name) + shown;
    });
  }
}
