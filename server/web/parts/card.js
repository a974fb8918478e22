/** A job's report: verdicts, evaluation against the base and earlier versions, and cost. */
import { bytes, compact, count, duration, loss, percent, plural } from "../lib/format.js";
import { html } from "../lib/html.js";
import { Table } from "./basics.js";
import { Trust } from "./decisions.js";

/** @import { Point } from "../lib/curves.js" */
/**
 * @typedef {{version: string | null, metric: "loss" | "exact_match" | "accuracy" | "brier", num_rows: number, tuned: number, other: number,
 *   includes_trained?: boolean, low: number | null, high: number | null, verdict: Verdict}} Comparison
 */

const FEW_ROWS = 20;
const MOST_ROSE = 1.02; // a held-out curve that ends this much above its lowest point has risen

const MEASURES = /** @type {const} */ ([
  ["loss", "Loss", loss],
  ["perplexity", "Perplexity", loss],
  ["accuracy", "Accuracy by token", percent],
  ["exact_match", "Answers right", rightOf],
]);

const COLUMNS = /** @type {const} */ ([
  ["base", "Base"],
  ["latest", "Latest before"],
  ["parent", "Went on from"],
  ["tuned", "Tuned"],
]);

/** @param {{report: any, points: Point[]}} props `points`: those of the whole run */
export function Card({ report, points }) {
  if (report.kind === "merge") return html`<${MergeCard} report=${report} />`;
  const sentences = [answersOf(report), ...verdictsOf(report), riseOf(report, points)].filter(Boolean);
  return html`<div class="reported">
    ${sentences.map((sentence) => html`<p>${sentence}</p>`)}
    ${report.gate?.passes === false && report.method !== "full" ? html`<p class="warning">No version was published: ${report.gate.reason}.</p>` : null}
    ${report.description ? html`<p>${report.description}</p>` : null}
    ${report.evaluation ? null : html`<p class="muted">No rows were held out, so its quality on new rows wasn't measured.</p>`}
    <${Measures} held=${report.evaluation} recall=${report.recall ?? null} />
    <${Split} data=${report.data} share=${report.config?.validation} />
    ${
      report.test
        ? html`<p>Test rows weren't used to choose anything. On them, it is ${report.test.comparison?.summary ?? "not comparable with the base"}.</p>
            <${Measures} held=${report.test} recall=${null} kind="test row" />`
        : null
    }
    <${Trust} reports=${report.decisions ?? {}} />
    <dl>
      <dt>Method</dt>
      <dd>${report.method === "full" ? "full fine-tuning" : "LoRA"}</dd>
      ${report.trainable_parameters ? html`<dt>Trained</dt><dd>${compact(report.trainable_parameters)} parameters, ${percent(report.trainable_share)}</dd>` : null}
      <dt>Data</dt>
      <dd>${plural(report.data?.rows ?? 0, "row")}, ${plural(report.data?.trained_tokens ?? 0, "trained-on token")}</dd>
      <dt>Steps</dt>
      <dd>${count(report.steps ?? 0)}${report.kept_step && report.kept_step !== report.steps ? `, the best at ${report.kept_step}` : ""}</dd>
      <dt>Training took</dt>
      <dd>${duration(report.wall_seconds ?? 0)}, ${bytes(report.peak_memory_bytes ?? 0)} of memory at most</dd>
      <dt>Stored</dt>
      <dd>${bytes(report.bytes_stored ?? 0)}</dd>
    </dl>
  </div>`;
}

/** How many of the rows with an answer were answered right; older reports don't say how many there are. @param {number} share @param {number | undefined} rows */
function rightOf(share, rows) {
  return rows ? `${count(Math.round(share * rows))} of ${count(rows)}` : percent(share);
}

/** The answers to new rows, which decide, and those to trained ones. @param {any} report @returns {string} */
function answersOf({ evaluation: held, recall, data }) {
  const share = held?.tuned?.exact_match ?? null;
  if (share === null) return "";
  const base = held.base?.exact_match ?? null;
  const asked = held.num_completions;
  const than = base === null ? "" : ` (the base: ${rightOf(base, asked)})`;
  const trained = recall
    ? `, and ${count(recall.num_right.tuned)} of ${plural(recall.num_rows, "trained row")}`
    : "";
  const new_ = data?.overlap ? "" : ", which it never saw";
  return `Right on ${rightOf(share, asked)}${asked ? "" : " of the"} held-out rows${new_}${than}${trained}.`;
}

const STRAY = 0.25; // held-out rows this much fewer or more than the share of the rows, as a share of them

/**
 * Why more or fewer rows are held out than the share says. Large data sets don't stray. With test rows, or if rows were
 * split or dropped, it says nothing.
 * @param {{data?: RowCounts, share: unknown}} props `share`: of the rows; anything else isn't explained
 */
export function Split({ data, share }) {
  if (!data?.validation_rows || typeof share !== "number") return null;
  if (data.test_rows || data.split || data.dropped) return null; // then these numbers aren't those of the rows given
  const total = data.rows + data.validation_rows;
  const expected = Math.max(1, Math.round(share * total));
  if (Math.abs(data.validation_rows - expected) <= STRAY * expected) return null;
  return html`<p class="muted">
    ${count(data.validation_rows)} of ${count(total)} rows are held out, not ${count(expected)}: each row's text decides whether it is held out, so with few rows the number can differ from the share.
  </p>`;
}

/**
 * @param {{held: any, recall: any, kind?: string}} props what was measured on held-out rows, or on rows of the `kind`, and
 * on trained ones; null: not measured
 */
function Measures({ held, recall, kind = "held-out row" }) {
  if (!held && !recall) return null;
  const has = (/** @type {any} */ value) => value !== null && value !== undefined;
  const columns = COLUMNS.filter(([name]) => has(held?.[name]) || has(recall?.num_right[name]));
  const rows = held ? `On ${plural(held.num_rows, kind)}` : "On trained rows";
  return html`<${Table} label=${kind === "test row" ? "What was measured on test rows" : "What was measured"} columns=${[rows, ...columns.map(([, words]) => `#${words}`)]}>
      ${MEASURES.filter(([name]) => columns.some(([of]) => has(held?.[of]?.[name]))).map(
        ([name, words, format]) =>
          html`<tr>
            <th scope="row">${words}</th>
            ${columns.map(([of]) => html`<td class="number">${has(held[of]?.[name]) ? format(held[of][name], held.num_completions) : "–"}</td>`)}
          </tr>`,
      )}
      ${
        recall
          ? html`<tr>
            <th scope="row">Trained answers right (recall)</th>
            ${columns.map(([of]) => html`<td class="number">${has(recall.num_right[of]) ? `${count(recall.num_right[of])} of ${count(recall.num_rows)}` : "–"}</td>`)}
          </tr>`
          : null
      }
    <//>`;
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

/** Sentences on how the adapter compares with others. @param {any} report @returns {string[]} */
function verdictsOf({ comparisons, evaluation, unmeasured, moves_latest: movesLatest }) {
  if (!comparisons) return evaluation?.base && evaluation.tuned ? [olderVerdictOf(evaluation)] : [];
  /** @type {Comparison[]} */
  const found = ["base", "latest", "parent"].map((name) => comparisons[name]).filter(Boolean);
  const others = found.filter((one, place) => found.findIndex(({ version }) => version === one.version) === place);
  const where = comparisons.latest ? `at ${comparisons.latest.version}` : "where it was"; // it may not be measurable
  const stays = movesLatest === false ? `latest stays ${where}.` : "";
  return [...others.map(sentenceOf), ...Object.values(unmeasured ?? {}), stays].filter(Boolean);
}

/** @param {Comparison} comparison */
function sentenceOf({
  version,
  metric,
  num_rows: rows,
  includes_trained: isMixed,
  tuned,
  other,
  low,
  high,
  verdict,
}) {
  const name = version ?? "the base";
  const right = (/** @type {number} */ share) => count(Math.round(share * rows));
  const measured =
    metric === "loss" || metric === "brier"
      ? `${metric === "loss" ? "held-out loss" : "Brier score"} ${loss(tuned)} against ${loss(other)}`
      : `${right(tuned)} rows right against ${right(other)}`;
  const on = `${count(rows)} ${isMixed ? "rows, trained ones included" : rows === 1 ? "held-out row" : "held-out rows"}`;
  if (verdict !== "can't tell")
    return `${verdict === "better" ? "Better" : "Worse"} than ${name}: ${measured} (${on}).`;
  const why =
    rows < FEW_ROWS || low === null || high === null
      ? `${on}: too few to tell`
      : `${on}; the difference may be ${spanOf(metric, low, high)}`;
  return `No clear difference from ${name}: ${measured} (${why}).`;
}

/** @param {Comparison["metric"]} metric @param {number} low @param {number} high */
function spanOf(metric, low, high) {
  if (metric === "loss" || metric === "brier") return `${low.toPrecision(2)} to ${high.toPrecision(2)}`;
  const points = (/** @type {number} */ share) => `${share < 0 ? "−" : "+"}${Math.round(100 * Math.abs(share))}`;
  return `${points(low)} to ${points(high)} points`;
}

/** The verdict on a report that was made before jobs compared row by row. @param {any} held */
function olderVerdictOf({ base, tuned, num_rows: rows }) {
  return `The held-out loss is ${tuned.loss < base.loss ? "" : "not "}lower than the base's${tooFew(rows)}.`;
}

/** @param {number} rows that were held out */
const tooFew = (rows) => ` (${plural(rows, "row")}${rows < FEW_ROWS ? ": too few to tell" : ""})`;

/** Say whether the held-out loss rose in the end, and whether that is a reason to train less. @param {any} report @param {Point[]} points */
function riseOf({ evaluation, kept_step: kept }, points) {
  /** @type {[number, number][]} */
  const curve = points.flatMap(({ step, held }) => (held === null ? [] : [[step, held]]));
  const [first, last] = [curve[0], curve.at(-1)];
  if (!first || !last || !evaluation) return "";
  const [step, lowest] = curve.reduce((best, one) => (one[1] < best[1] ? one : best), first);
  if (last[1] < lowest * MOST_ROSE) return "";
  const rose = `Held-out loss rose after step ${step}, from ${loss(lowest)} to ${loss(last[1])}`;
  const rows = evaluation.num_rows;
  if (rows < FEW_ROWS) return `${rose}${tooFew(rows)}.`;
  return kept === step ? `${rose}: fewer epochs would do.` : `${rose}; the weights of step ${kept} were kept.`;
}
