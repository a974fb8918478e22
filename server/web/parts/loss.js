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

/**
 * The points of a report's curves.
 * @param {{train_loss?: [number, number][], eval_loss?: [number, number][]} | undefined} curves
 */
export function pointsOf(curves) {
  /** @type {Map<number, Point>} */
  const points = new Map();
  for (const [step, value] of curves?.train_loss ?? []) points.set(step, { step, train: value, held: null });
  for (const [step, value] of curves?.eval_loss ?? [])
    points.set(step, { step, train: points.get(step)?.train ?? null, held: value });
  return [...points.values()].sort((one, other) => one.step - other.step);
}

/**
 * @param {{points: Point[], kept?: number | null, base?: number | null}} props `kept`: the step whose weights were
 *   kept; `base`: the base's held-out loss
 */
export function LossChart({ points: all, kept = null, base = null }) {
  const points = useMemo(() => thinned(all), [all]);
  const x = useMemo(() => points.map((point) => point.step), [points]);
  const series = useMemo(() => {
    const held = points.map((point) => point.held);
    /** @type {import("./chart.js").Series[]} */
    const found = [{ label: "training", tone: "first", values: points.map((point) => point.train) }];
    if (held.some((value) => value !== null)) found.push({ label: "held-out", tone: "second", values: held });
    if (base !== null)
      found.push({ label: "base's", tone: "third", values: points.map(() => base), isDashed: true });
    return found;
  }, [points, base]);
  const mark = useMemo(() => (kept === null ? null : { at: kept, label: `kept: step ${kept}` }), [kept]);
  if (!points.length) return null;
  return html`<${Chart} title="Loss by step" x=${x} xLabel="step" series=${series} mark=${mark} />`;
}
