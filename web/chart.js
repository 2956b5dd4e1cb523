// SPDX-License-Identifier: GPL-3.0-or-later
import { element } from "./dom.js";

const SVG = "http://www.w3.org/2000/svg";
const LINES = [
  { name: "gain", means: "How much guidance changes what the model reads of the prompt. The line's top is its largest." },
  { name: "parallel", means: "Share of the direction that lies along what is read; the rest points sideways." },
  { name: "capped", means: "Share of spots where the brake (norm_threshold) shortens the guidance." },
];

/**
 * The numbers of one run, by step: gain, parallel share, share of cap hits.
 * @typedef {{run: number, steps: number, points: Map<number, number[]>}} Series
 */

/** Three lines over the steps of a run, each with its latest value. */
export class Chart {
  constructor() {
    const svg = document.createElementNS(SVG, "svg");
    svg.setAttribute("viewBox", "0 0 100 100");
    svg.setAttribute("preserveAspectRatio", "none");
    this.lines = LINES.map(({ name }) => {
      const line = document.createElementNS(SVG, "polyline");
      line.setAttribute("class", `gag-${name}`);
      svg.append(line);
      return line;
    });
    this.values = LINES.map(({ name, means }) => element("span", { className: `gag-${name}`, title: means }));
    this.element = element("div", { className: "gag-chart" }, svg, element("div", {}, ...this.values));
    this.draw(undefined);
  }

  /** @param {Series | undefined} series */
  draw(series) {
    const steps = [...(series?.points.keys() ?? [])].sort((a, b) => a - b);
    const last = Math.max((series?.steps ?? 0) - 1, steps.at(-1) ?? 0, 1);
    LINES.forEach(({ name }, i) => {
      const values = steps.map((step) => series?.points.get(step)?.[i] ?? 0);
      const most = name === "gain" ? Math.max(...values, Number.MIN_VALUE) : 1;
      const places = steps.map((step, k) => [(100 * step) / last, 98 - (96 * values[k]) / most]);
      // A line needs two points to be seen.
      if (places.length === 1) places.push([places[0][0] + 1, places[0][1]]);
      this.lines[i].setAttribute("points", places.map((place) => place.map((n) => n.toFixed(2)).join(",")).join(" "));
      const value = values.at(-1);
      this.values[i].textContent = value === undefined ? name : `${name} ${(100 * value).toPrecision(3)} %`;
    });
  }
}
