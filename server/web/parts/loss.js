/** The curves of a job: the loss of each step, and of the held-out rows if measured. */
import { html, useMemo } from "../lib/html.js";
import { Chart } from "./chart.js";

/** @typedef {{step: number, train: number | null, held: number | null}} Point */

const MOST = 500;

/**
 * Thin out points evenly if there are more than are visible; losses of held-out rows stay.
 * @param {Point[]} points
 */
function thinned(points) {
  const every = Math.ceil(points.length / MOST);
  return points.filter(
    (point, place) => point.held !== null || place % every === 0 || place === points.length - 1,
  );
}

/** @param {{points: Point[]}} props */
export function LossChart({ points: all }) {
  const points = useMemo(() => thinned(all), [all]);
  const x = useMemo(() => points.map((point) => point.step), [points]);
  const series = useMemo(() => {
    const held = points.map((point) => point.held);
    /** @type {import("./chart.js").Series[]} */
    const found = [{ label: "training", tone: "first", values: points.map((point) => point.train) }];
    if (held.some((value) => value !== null)) found.push({ label: "held-out", tone: "second", values: held });
    return found;
  }, [points]);
  if (!points.length) return null;
  return html`<${Chart} title="Loss by step" x=${x} xLabel="step" series=${series} />`;
}
