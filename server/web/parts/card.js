/** A job's report: evaluation against the base, cost, and curves. */
import { bytes, compact, count, duration, loss, percent, plural } from "../lib/format.js";
import { html, useMemo } from "../lib/html.js";
import { LossChart } from "./loss.js";

const MEASURES = /** @type {const} */ ([
  ["loss", "Held-out loss", loss],
  ["perplexity", "Perplexity", loss],
  ["accuracy", "Accuracy by token", percent],
  ["exact_match", "Whole answers right", percent],
]);

/** @param {{report: any}} props */
export function Card({ report }) {
  const held = report.evaluation;
  const points = useMemo(() => pointsOf(report.curves), [report]);
  if (report.kind === "merge") return html`<${MergeCard} report=${report} />`;
  return html`<div class="reported">
    ${held?.base && held.tuned ? html`<p>${verdictOf(held)}</p>` : null}
    ${report.gate?.passes === false && report.method !== "full" ? html`<p class="warning">No version was published: ${report.gate.reason}.</p>` : null}
    ${report.description ? html`<p>${report.description}</p>` : null}
    ${
      held
        ? html`<table>
          <caption>
            On ${plural(held.num_rows, "held-out row")}
          </caption>
          <thead>
            <tr>
              <th scope="col"><span class="hidden">Measure</span></th>
              <th scope="col" class="number">Base</th>
              <th scope="col" class="number">Tuned</th>
            </tr>
          </thead>
          <tbody>
            ${MEASURES.filter(([name]) => held.base?.[name] !== undefined && held.base?.[name] !== null).map(
              ([name, words, format]) =>
                html`<tr>
                  <th scope="row">${words}</th>
                  <td class="number">${format(held.base[name])}</td>
                  <td class="number">${format(held.tuned[name])}</td>
                </tr>`,
            )}
          </tbody>
        </table>`
        : html`<p class="muted">No rows were held out, so its quality on new rows wasn't measured.</p>`
    }
    <dl>
      <dt>Method</dt>
      <dd>${report.method === "full" ? "full fine-tuning" : "LoRA"}</dd>
      ${report.trainable_parameters ? html`<dt>Trained</dt><dd>${compact(report.trainable_parameters)} parameters, ${percent(report.trainable_share)}</dd>` : null}
      <dt>Data</dt>
      <dd>${plural(report.data?.rows ?? 0, "row")}, ${plural(report.data?.trained_tokens ?? 0, "trained-on token")}</dd>
      <dt>Steps</dt>
      <dd>${count(report.steps ?? 0)}${report.kept_step && report.kept_step !== report.steps ? `, the best at ${report.kept_step}` : ""}</dd>
      <dt>Took</dt>
      <dd>${duration(report.wall_seconds ?? 0)}, ${bytes(report.peak_memory_bytes ?? 0)} of memory at most</dd>
      <dt>Stored</dt>
      <dd>${bytes(report.bytes_stored ?? 0)}</dd>
    </dl>
    <${LossChart} points=${points} />
  </div>`;
}

/** @param {{report: any}} props of a merge, which has neither rows nor steps */
function MergeCard({ report }) {
  return html`<dl class="reported">
    <dt>Merged by</dt>
    <dd>${report.method}</dd>
    <dt>Made of</dt>
    <dd><code>${report.lineage?.expression}</code></dd>
    ${(report.distance ?? null) === null ? null : html`<dt>Distance</dt><dd>${loss(report.distance)} from the exact sum, as a share of it</dd>`}
    <dt>Took</dt>
    <dd>${duration(report.wall_seconds ?? 0)}, ${bytes(report.peak_memory_bytes ?? 0)} of memory at most</dd>
    <dt>Stored</dt>
    <dd>${bytes(report.bytes_stored ?? 0)}</dd>
  </dl>`;
}

/** Say whether the adapter is better than the base. @param {any} held */
function verdictOf({ base, tuned, latest }) {
  const isBetter = tuned.loss < base.loss;
  const against = !latest
    ? ""
    : tuned.loss < latest.loss
      ? ", and better than the version before"
      : ", but no better than the version before";
  return isBetter
    ? `Better than the base on rows that it hasn't seen${against}.`
    : `No better than the base on rows that it hasn't seen: more or other rows, or fewer epochs, may help${against}.`;
}

/** @param {{train_loss?: [number, number][], eval_loss?: [number, number][]} | undefined} curves */
function pointsOf(curves) {
  /** @type {Map<number, import("./loss.js").Point>} */
  const points = new Map();
  for (const [step, value] of curves?.train_loss ?? []) points.set(step, { step, train: value, held: null });
  for (const [step, value] of curves?.eval_loss ?? [])
    points.set(step, { step, train: points.get(step)?.train ?? null, held: value });
  return [...points.values()].sort((one, other) => one.step - other.step);
}
