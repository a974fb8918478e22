/** The curves of a job: the loss of each step and of the held-out rows, learning rate and gradient norm. */
import { smoothed, thinned } from "../lib/curves.js";
import { html, useMemo } from "../lib/html.js";
import { Store, useStore } from "../lib/store.js";
import { Check } from "./basics.js";
import { Chart } from "./chart.js";

/** @import { Point } from "../lib/curves.js" */
/** @import { Series } from "./plot.js" */

/** How all charts of losses are drawn. */
export const drawing = new Store({ smoothing: 0, isLog: false });
const MOST_SMOOTHING = 0.95;

/** The choices of `drawing`. */
export function DrawingFields() {
  const { smoothing, isLog } = useStore(drawing);
  return html`<p class="row drawing">
    <label class="check"
      >Smoothing
      <input type="range" min="0" max=${MOST_SMOOTHING} step="0.05" value=${smoothing}
        onInput=${(/** @type {import("./basics.js").Typed} */ event) => drawing.update({ smoothing: event.currentTarget.valueAsNumber })} />
      <output>${smoothing.toFixed(2)}</output></label
    >
    <${Check} checked=${isLog} onChange=${() => drawing.update({ isLog: !isLog })}>Logarithmic<//>
  </p>`;
}

/**
 * @param {{points: Point[], kept?: number | null, base?: number | null}} props `kept`: the step whose weights were
 *   kept; `base`: the base's held-out loss
 */
export function LossChart({ points: all, kept = null, base = null }) {
  const { smoothing, isLog } = useStore(drawing);
  const points = useMemo(() => thinned(all), [all]);
  const x = useMemo(() => points.map((point) => point.step), [points]);
  const series = useMemo(() => {
    const train = points.map((point) => point.train);
    const held = points.map((point) => point.held);
    /** @type {Series[]} */
    const found = [{ label: "training", tone: "first", values: train, isFaint: smoothing > 0 }];
    if (smoothing) found.push({ label: "training, smoothed", tone: "first", values: smoothed(train, smoothing) });
    if (held.some((value) => value !== null))
      found.push({ label: "held-out", tone: "second", values: held, isSparse: true });
    if (base !== null)
      found.push({ label: "base's", tone: "third", values: points.map(() => base), isDashed: true });
    return found;
  }, [points, base, smoothing]);
  const mark = useMemo(() => (kept === null ? null : { at: kept, label: `kept: step ${kept}` }), [kept]);
  if (!points.length) return null;
  return html`<${DrawingFields} />
    <${Chart} title="Loss by step" x=${x} xLabel="step" yLabel="loss (nats per token)" isLog=${isLog} series=${series} mark=${mark} />
    <${Course} points=${points} x=${x} />`;
}

/** Learning rate and gradient norm, if they are known. @param {{points: Point[], x: number[]}} props */
function Course({ points, x }) {
  const curves = useMemo(
    () =>
      [
        { title: "Learning rate by step", label: "learning rate", values: points.map((point) => point.rate) },
        { title: "Gradient norm by step", label: "gradient norm", values: points.map((point) => point.norm) },
      ].map(({ title, label, values }) => ({
        title,
        series: /** @type {Series[]} */ ([{ label, tone: "first", values }]),
      })),
    [points],
  );
  if (!points.some(({ rate, norm }) => rate !== null || norm !== null)) return null;
  return html`<details>
    <summary>Learning rate and gradient norm</summary>
    <div class="charts">
      ${curves.map(({ title, series }) => html`<${Chart} key=${title} title=${title} x=${x} xLabel="step" series=${series} height=${150} />`)}
    </div>
  </details>`;
}
