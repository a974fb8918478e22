/** The lab: measure a blend at several weights on the rows of a data set, use the best weights, and save them. */
import { versionOf } from "../lib/adapters.js";
import { Problem, ask, get } from "../lib/api.js";
import { MOST_ROWS, allRows, send } from "../lib/datasets.js";
import { checked, format, parse } from "../lib/expression.js";
import { plural } from "../lib/format.js";
import { html, useEffect, useMemo, useState } from "../lib/html.js";
import { expression } from "../lib/playground.js";
import { useAction, useResource } from "../lib/resource.js";
import { perPerson } from "../lib/session.js";
import { to } from "../lib/route.js";
import { useStore } from "../lib/store.js";
import { Bar, Check, Fault, SelectField, Table, TextField } from "./basics.js";
import { Chart } from "./chart.js";

/** @import { Term } from "../lib/expression.js" */

/**
 * @typedef {{adapter: string, metric: string, value: number, low: number | null, high: number | null, n: number}} Result
 * @typedef {{to: string, difference: number, low: number | null, high: number | null}} Difference
 * @typedef {{id: string, status: JobStatus, error: string | null, position: number | null, progress: {step: number, total_steps: number},
 *   results: Result[] | null, differences: Difference[] | null}} Evaluation
 * @typedef {{at: number, adapter: string}} Point `at`: the second part's share of a line of two parts, else a factor
 * @typedef {{id: string, terms: Term[], current: string, points: Point[], metric: string}} Sweep
 */

const SHARES = Array.from({ length: 11 }, (_, place) => place / 10);
const FACTORS = [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5];
/** @type {[string, string][]} */
const METRICS = [
  ["loss", "loss"],
  ["token_accuracy", "tokens right"],
  ["exact_match", "whole answers right"],
];

/** The weights to measure: a line between two parts, or all weights times a factor. @param {Term[]} terms @returns {Point[]} */
export function pointsOf(terms) {
  const [one, other] = terms;
  const isLine = terms.length === 2;
  return (isLine ? SHARES : FACTORS).map((at) => {
    const rounded = (/** @type {number} */ weight) => Number(weight.toFixed(4));
    const weighted =
      isLine && one && other
        ? [
            { ...one, weight: rounded(1 - at) },
            { ...other, weight: at },
          ]
        : terms.map((term) => ({ ...term, weight: rounded(term.weight * at) }));
    return { at, adapter: format(weighted.filter((term) => term.weight)) || "base" };
  });
}

/** The sweep that is measured, or was last. */
const last = perPerson(/** @type {Sweep | null} */ (null));

/** @param {{terms: Term[], value: string}} props `value`: their expression */
export function Lab({ terms, value }) {
  const [dataset, setDataset] = useState("");
  const [metric, setMetric] = useState("loss");
  const [isHeldOut, setHeldOut] = useState(true);
  const sets = useResource((signal) => get("/datasets", signal), []);
  const parts = terms.map(({ name, pin }) => (pin ? `${name}@${pin}` : name)); // weights don't matter
  const trained = useResource((signal) => trainedOn(terms, signal), [parts.join()]);
  const sweep = useStore(last);
  const chosen = sets.data?.datasets.find((/** @type {DataSet} */ set) => set.id === dataset);
  const splits = (trained.data ?? []).flatMap((config) => (config.dataset === dataset ? [config.validation] : []));
  const canHoldOut = splits.length > 0 && splits.every(isShare) && chosen?.rows <= MOST_ROWS;
  const start = useAction(async () => {
    const points = pointsOf(terms);
    // each is compared with the first, on the same rows
    const adapters = [...new Set([value, ...points.map((point) => point.adapter), "base"])];
    const measured = canHoldOut && isHeldOut ? await heldOut(chosen, splits) : dataset;
    const { id } = await ask("POST", "/evaluate", { json: { adapters, datasets: [measured], metrics: [metric] } });
    last.set({ id, terms, current: value, points, metric });
  });
  const choose = (/** @type {string} */ id) => {
    start.clear();
    setDataset(id);
  };
  const options = sets.data?.datasets.map((/** @type {DataSet} */ set) => [
    set.id,
    `${set.filename ?? set.id} · ${plural(set.rows, "row")}`,
  ]);
  return html`<p class="muted">
      ${terms.length === 2 ? "Measures eleven blends on the line from the first part alone to the second alone." : "Measures the blend with all its weights times 0 to 1.5."}${" "}
      Up to 200 rows are read.
    </p>
    <${Fault} problem=${sets.problem ?? trained.problem} />
    ${options && !options.length ? html`<p>There is no data set yet: <a href=${to("train", "new")}>upload one</a>, of rows that no part was trained on.</p>` : null}
    <div class="fields">
      <${SelectField} label="Data set" name="datasets" problem=${start.problem} hint="Choose rows that no part was trained on." value=${dataset} options=${[["", "choose one"], ...(options ?? [])]} onChange=${choose} />
      <${SelectField} label="Measure" name="metrics" problem=${start.problem} value=${metric} options=${METRICS} onChange=${setMetric} />
    </div>
    ${canHoldOut ? html`<${Check} checked=${isHeldOut} onChange=${() => setHeldOut(!isHeldOut)}>Only rows that were held out of training (stored as a data set of their own)<//>` : null}
    ${splits.length && !(canHoldOut && isHeldOut) ? html`<p class="warning">A part was trained on this data set, so what is found may hold for these rows only.</p>` : null}
    <p><button type="button" class="plain" disabled=${!dataset || start.busy || !(trained.data || trained.problem)} onClick=${() => start.run()}>Measure</button></p>
    <${Fault} problem=${start.problem} beside=${["datasets", "metrics"]} />
    ${sweep ? html`<${Measured} key=${sweep.id} sweep=${sweep} />` : null}`;
}

/** Whether a job held out a share of its rows, neither none nor rows of its own. @param {unknown} validation */
const isShare = (validation) => validation === null || (typeof validation === "number" && validation > 0);

/**
 * A data set of the rows that none of the splits trained on.
 * @param {DataSet} set
 * @param {(number | null)[]} splits the shares that were held out; null: the default
 * @returns {Promise<string>} its id
 */
async function heldOut({ id, filename }, splits) {
  const all = await Promise.all([...new Set(splits)].map((share) => allRows(id, share ?? undefined)));
  const rows = (all[0] ?? []).filter((_, place) => all.every((side) => side[place]?.split === "validation"));
  const message =
    "has no rows that were held out of training: choose another data set, or measure all of its rows";
  if (!rows.length) throw new Problem(422, message, [{ loc: ["datasets"], message }]);
  const name = (filename ?? "rows").replace(/\.\w+$/, "");
  const kept = rows.map(({ row }) => row);
  return (await send(kept, `${name}-held-out.jsonl`)).id;
}

/**
 * The configurations of the jobs that made the terms' versions, and the versions that these went on from or consist of.
 * @param {Term[]} terms
 * @param {AbortSignal} signal
 * @returns {Promise<any[]>}
 */
async function trainedOn(terms, signal) {
  const found = await Promise.all(
    terms.map(async ({ name, pin }) => {
      if (name.includes("/")) return [];
      const adapter = (await get(`/adapters?${new URLSearchParams({ name })}`, signal)).adapters[0];
      const version = adapter && versionOf(adapter, pin);
      const job = version?.job_id;
      const own = job ? [(await get(`/train/${encodeURIComponent(job)}`, signal)).config] : [];
      return [...own, ...(await trainedOn(parse(version?.parent ?? "") ?? [], signal))];
    }),
  );
  return found.flat();
}

/** @param {{sweep: Sweep}} props */
function Measured({ sweep }) {
  const [isOver, setOver] = useState(false);
  const job = useResource(
    (signal) => get(`/evaluate/${encodeURIComponent(sweep.id)}`, signal),
    [sweep.id],
    isOver ? 0 : 2,
  );
  /** @type {Evaluation | null} */
  const found = job.data;
  const hasEnded = found !== null && ["succeeded", "failed", "cancelled"].includes(found.status);
  useEffect(() => {
    if (hasEnded) setOver(true);
  }, [hasEnded]);
  const cancel = useAction(async () => {
    await ask("POST", `/evaluate/${encodeURIComponent(sweep.id)}/cancel`);
    await job.reload();
  });
  if (!found) return html`<${Fault} problem=${job.problem} />`;
  if (found.results)
    return html`<${Found} sweep=${sweep} results=${found.results} differences=${found.differences ?? []} />`;
  if (hasEnded)
    return html`<p class="muted">${found.status === "failed" ? `It failed: ${found.error ?? "see the server's log"}.` : "It was cancelled."}</p>`;
  return html`<p class="muted">${found.status === "queued" ? "Waits for its turn." : `Measured ${found.progress.step} of ${found.progress.total_steps}.`}</p>
    <${Bar} label="Measuring" value=${found.progress.step} most=${found.progress.total_steps} />
    <p><button type="button" class="plain" disabled=${cancel.busy} onClick=${() => cancel.run()}>Cancel</button></p>
    <${Fault} problem=${cancel.problem} />`;
}

/** @param {number | null | undefined} value */
const shown = (value) => (value === null || value === undefined ? "–" : value.toPrecision(3));

/** @param {{sweep: Sweep, results: Result[], differences: Difference[]}} props */
function Found({ sweep, results, differences }) {
  const { points, metric, current, terms } = sweep;
  const values = useMemo(() => new Map(results.map((result) => [result.adapter, result])), [results]);
  const isLess = metric === "loss";
  const best = results.reduce((one, other) =>
    (isLess ? other.value < one.value : other.value > one.value) ? other : one,
  );
  const gain = differences.find((difference) => difference.to === best.adapter);
  const words = METRICS.find(([of]) => of === metric)?.[1] ?? metric;
  const series = useMemo(
    () =>
      /** @type {import("./plot.js").Series[]} */ ([
        { label: words, tone: "first", values: points.map((point) => values.get(point.adapter)?.value ?? null) },
        {
          label: "base's",
          tone: "third",
          values: points.map(() => values.get("base")?.value ?? null),
          isDashed: true,
        },
      ]),
    [values],
  );
  const x = useMemo(() => points.map((point) => point.at), [points]);
  const at = points.find((point) => point.adapter === best.adapter)?.at;
  const mark = useMemo(() => (at === undefined ? null : { at, label: "best" }), [at]);
  const isLine = terms.length === 2;
  const [start, end] = terms.map(({ name, pin }) => name + (pin && `@${pin}`)); // two versions may have one name
  return html`<section aria-label="Weights measured">
    <${Chart} title=${isLine ? `From ${start} to ${end}` : "By factor"} x=${x} xLabel=${isLine ? `weight of ${end}` : "factor"} yLabel=${words} series=${series} mark=${mark} height=${200} />
    <${Table} label="Weights" columns=${["Expression", `#${words}`, "#95 %"]}>
      ${results.map(
        (result) =>
          html`<tr class=${result === best ? "chosen" : ""}>
            <th scope="row" class="wraps">
              ${result.adapter === "base" ? html`<code>base</code>` : html`<button type="button" class="link" title="Use these weights" onClick=${() => expression.set(result.adapter)}><code>${result.adapter}</code></button>`}
            </th>
            <td class="number">${shown(result.value)}</td>
            <td class="number">${result.low === null ? "–" : `${shown(result.low)} to ${shown(result.high)}`}</td>
          </tr>`,
      )}
    <//>
    <p aria-live="polite">
      Best: <code>${best.adapter}</code>, ${words} ${shown(best.value)} on ${plural(best.n, "row")}.
      ${best.adapter === current ? " These are the present weights." : gain ? ` ${judged(gain, isLess)}` : ""}
    </p>
    ${
      best.adapter === "base"
        ? null
        : html`<p><button type="button" class="plain" onClick=${() => expression.set(best.adapter)}>Use these weights</button></p>
            <${Save} expression=${best.adapter} evaluation=${sweep.id} />`
    }
  </section>`;
}

/** @param {Difference} difference @param {boolean} isLess */
function judged({ difference, low, high }, isLess) {
  const interval = low === null || high === null ? "" : ` (95 %: ${shown(low)} to ${shown(high)})`;
  const isCertain = low !== null && high !== null && (isLess ? high < 0 : low > 0);
  return `Against the present weights: ${difference > 0 ? "+" : ""}${shown(difference)}${interval}${isCertain ? "" : ", which may be chance"}.`;
}

/** @param {{expression: string, evaluation: string}} props */
function Save({ expression: of, evaluation }) {
  const [name, setName] = useState("");
  const [saved, setSaved] = useState("");
  const save = useAction(async () => {
    const json = { expression: of, evaluation };
    const version = await ask("POST", `/compositions/${checked(name)}`, { json });
    setSaved(`${version.name}@${version.version}`);
  });
  return html`<div class="row end">
      <${TextField} label="Name for the best" name="name" problem=${save.problem} value=${name} onChange=${setName} onEnter=${() => name && save.run()} />
      <button type="button" disabled=${!name || save.busy} onClick=${() => save.run()}>Save with its evaluation</button>
    </div>
    <${Fault} problem=${save.problem} beside=${["name"]} />
    ${saved && html`<p role="status">Saved as <a href=${to("adapters", saved.split("@")[0] ?? "")}>${saved}</a>.</p>`}`;
}
