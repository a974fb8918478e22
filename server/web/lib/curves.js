/** The curves of a job: what was measured at each step. */

/**
 * @typedef {{step: number, train: number | null, held: number | null, rate: number | null, norm: number | null}} Point
 *   the losses of training and of held-out rows, the learning rate, and the gradient's norm
 */

const MOST = 500;

/** @param {number} step @param {Partial<Point>} [values] @returns {Point} */
const point = (step, values = {}) => ({ step, train: null, held: null, rate: null, norm: null, ...values });

/** The points of a job's events. @param {JobEvent[]} events @returns {Point[]} */
export const pointsOfEvents = (events) =>
  events.flatMap(({ type, data }) =>
    type === "metrics" && typeof data["step"] === "number"
      ? [
          point(data["step"], {
            train: data["train_loss"] ?? null,
            held: data["eval_loss"] ?? null,
            rate: data["learning_rate"] ?? null,
            norm: data["gradient_norm"] ?? null,
          }),
        ]
      : [],
  );

/**
 * The points of a report's curves, which have the losses alone.
 * @param {{train_loss?: [number, number][], eval_loss?: [number, number][]} | undefined} curves
 */
export function pointsOf(curves) {
  /** @type {Map<number, Point>} */
  const points = new Map();
  for (const [step, train] of curves?.train_loss ?? []) points.set(step, point(step, { train }));
  for (const [step, held] of curves?.eval_loss ?? [])
    points.set(step, { ...(points.get(step) ?? point(step)), held });
  return [...points.values()].sort((one, other) => one.step - other.step);
}

/**
 * Thin out points evenly if there are more than are visible; losses of held-out rows stay.
 * @param {Point[]} points
 */
export function thinned(points) {
  const every = Math.ceil(points.length / MOST);
  return points.filter(({ held }, place) => held !== null || place % every === 0 || place === points.length - 1);
}

/**
 * The exponential moving average, without the start's bias.
 * @param {(number | null)[]} values
 * @param {number} share of the average that stays at each value, from 0 (the values themselves) to below 1
 */
export function smoothed(values, share) {
  let [sum, weight] = [0, 0];
  return values.map((value) => {
    if (value === null) return null;
    sum = share * sum + (1 - share) * value;
    weight = share * weight + (1 - share);
    return sum / weight;
  });
}
