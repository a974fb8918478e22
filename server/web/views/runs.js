/** Runs side by side: a sortable table of jobs, and the curves and the differing settings of chosen ones. */
import { get } from "../lib/api.js";
import { pointsOfEvents, smoothed, thinned } from "../lib/curves.js";
import { ago, count, duration, loss, moment, percent } from "../lib/format.js";
import { html, useMemo, useState } from "../lib/html.js";
import { useResource } from "../lib/resource.js";
import { go, to } from "../lib/route.js";
import { useStore } from "../lib/store.js";
import { Fault, SortedTable, Table } from "../parts/basics.js";
import { Chart } from "../parts/chart.js";
import { DrawingFields, drawing } from "../parts/loss.js";
import { HIDDEN, flat, shown, words } from "../parts/settings.js";
import { Status } from "../parts/status.js";

/** @import { Point } from "../lib/curves.js" */
/** @import { Series, Tone } from "../parts/plot.js" */

const TONES = /** @type {Tone[]} */ (["first", "second", "third", "fourth", "fifth", "sixth"]);
const MOST = TONES.length;
const MOST_EVENTS = 10_000;

/** The seconds between a job's start and its end, or now. @param {Job} job */
const secondsOf = ({ started_at: from, finished_at: to }) =>
  from === null ? null : ((to === null ? Date.now() : Date.parse(to)) - Date.parse(from)) / 1000;

/**
 * @typedef {{title: string, of: (job: Job) => number | string | null | undefined, show: (value: any) => string,
 *   isNumber: boolean}} Column
 * @type {Column[]}
 */
const COLUMNS = [
  { title: "Held-out loss", of: (job) => job.metrics["eval_loss"], show: loss, isNumber: true },
  { title: "Held-out answers right", of: (job) => job.metrics["eval_exact_match"], show: percent, isNumber: true },
  { title: "Base's loss", of: (job) => job.metrics["base_eval_loss"], show: loss, isNumber: true },
  { title: "Recall", of: (job) => job.metrics["recall"], show: percent, isNumber: true },
  { title: "Training loss", of: (job) => job.metrics["train_loss"], show: loss, isNumber: true },
  { title: "Steps", of: (job) => job.progress.step, show: count, isNumber: true },
  { title: "Rank", of: (job) => job.config.lora?.["rank"], show: count, isNumber: true },
  { title: "Learning rate", of: (job) => job.config.training?.["learning_rate"], show: String, isNumber: true },
  { title: "Took", of: secondsOf, show: duration, isNumber: true },
  { title: "Made", of: (job) => job.created_at, show: ago, isNumber: false },
];

/** @param {number | string | null | undefined} value */
const isKnown = (value) => value !== null && value !== undefined;

/** Jobs in the order of a column; those without a value come last. @param {Job[]} jobs @param {string} title @param {boolean} isDown */
function inOrder(jobs, title, isDown) {
  const of = COLUMNS.find((column) => column.title === title)?.of ?? ((/** @type {Job} */ job) => job.name);
  return [...jobs].sort((one, other) => {
    const [value, against] = [of(one), of(other)];
    if (!isKnown(value) || !isKnown(against)) return Number(isKnown(against)) - Number(isKnown(value));
    const order = /** @type {any} */ (value) < /** @type {any} */ (against) ? -1 : value === against ? 0 : 1;
    return isDown ? -order : order;
  });
}

/**
 * @param {{jobs: Job[] | null, ids: string[], more: unknown}} props `ids`: of the chosen jobs; `more`: shown below the
 *   table
 */
export function Runs({ jobs, ids, more }) {
  const [order, setOrder] = useState({ by: "Made", isDown: true });
  const runs = (jobs ?? []).filter((job) => job.kind !== "merge");
  const listed = ids.map((id) => runs.find((job) => job.id === id));
  const missing = ids.filter((_, place) => !listed[place]).join();
  // jobs beyond the list, such as those of a saved address
  const further = useResource(
    async (signal) => {
      const asked = jobs && missing ? missing.split(",") : [];
      return Promise.all(
        asked.map(async (id) => /** @type {Job} */ (await get(`/train/${encodeURIComponent(id)}`, signal))),
      );
    },
    [missing, jobs === null],
  );
  const chosen = ids.flatMap((id) => [...runs, ...(further.data ?? [])].find((job) => job.id === id) ?? []);
  const choose = (/** @type {string} */ id) =>
    go("train", "runs", ...(ids.includes(id) ? ids.filter((of) => of !== id) : [...ids, id]));
  if (jobs?.length === 0)
    return html`<div class="card"><p>No runs yet. <a href=${to("train", "new")}>Train an adapter</a> first.</p></div>`;
  return html`<div class="card">
      <p class="muted">Tick up to ${MOST} runs to lay their curves over each other and to see how their settings differ.</p>
      <${SortedTable}
        label="Runs"
        columns=${["", "Name", "Status", ...COLUMNS.map(({ title, isNumber }) => (isNumber ? `#${title}` : title))]}
        sortable=${["Name", ...COLUMNS.map(({ title }) => title)]}
        order=${order}
        onOrder=${(/** @type {string} */ by) => setOrder({ by, isDown: by === order.by ? !order.isDown : by === "Made" })}
      >
        ${inOrder(runs, order.by, order.isDown).map(
          (job) =>
            html`<tr key=${job.id} class=${ids.includes(job.id) ? "chosen" : ""}>
              <td>
                <input type="checkbox" aria-label="Compare ${job.name}, made ${moment(job.created_at)}" checked=${ids.includes(job.id)}
                  disabled=${ids.length >= MOST && !ids.includes(job.id)} onChange=${() => choose(job.id)} />
              </td>
              <th scope="row"><a href=${to("train", job.id)}>${job.name}</a>${job.adapter ? html` <small>@${job.adapter.version}</small>` : null}</th>
              <td><${Status} job=${job} /></td>
              ${COLUMNS.map(({ of, show, isNumber }) => {
                const value = of(job);
                return html`<td class=${isNumber ? "number" : ""}>${isKnown(value) ? show(value) : "–"}</td>`;
              })}
            </tr>`,
        )}
      <//>
      ${more}
    </div>
    <${Fault} problem=${further.problem} />
    ${chosen.length ? html`<${Overlay} key=${chosen.map(({ id }) => id).join()} jobs=${chosen} />` : null}`;
}

/** The name of a run among others: its version tells runs of one name apart. @param {Job} job @param {Job[]} jobs */
function labelOf(job, jobs) {
  if (job.adapter) return `${job.name}@${job.adapter.version}`;
  const same = jobs.filter(({ name }) => name === job.name);
  return same.length > 1 ? `${job.name} (${job.id.slice(-4)})` : job.name;
}

/** @param {{jobs: Job[]}} props */
function Overlay({ jobs }) {
  const { smoothing, isLog } = useStore(drawing);
  const labels = jobs.map((job) => labelOf(job, jobs));
  const curves = useResource(
    (signal) =>
      Promise.all(
        jobs.map(async ({ id }) =>
          thinned(
            pointsOfEvents(await get(`/train/${encodeURIComponent(id)}/events?limit=${MOST_EVENTS}`, signal)),
          ),
        ),
      ),
    [jobs.map(({ id }) => id).join()],
    jobs.some(({ status }) => status === "running") ? 5 : 0,
  );
  const charts = useMemo(() => chartsOf(curves.data ?? [], labels, smoothing), [curves.data, smoothing]);
  return html`<section class="card" aria-label="Chosen runs">
    <h2>Curves</h2>
    <${Fault} problem=${curves.problem} />
    ${curves.data ? null : html`<p class="muted">Loading…</p>`}
    ${curves.data && !charts.length ? html`<p>Nothing was measured yet.</p>` : null}
    ${charts.length ? html`<${DrawingFields} />` : null}
    <div class="charts">
      ${charts.map(({ title, unit, x, series }) => html`<${Chart} key=${title} title=${title} x=${x} xLabel="step" yLabel=${unit} isLog=${isLog} series=${series} />`)}
    </div>
    <h2>Settings that differ</h2>
    <${Differences} jobs=${jobs} labels=${labels} />
  </section>`;
}

const CHARTS = /** @type {const} */ ([
  ["held", "Held-out loss", "nats per token"],
  ["train", "Training loss", "nats per token"],
  ["rate", "Learning rate", ""],
  ["norm", "Gradient norm", ""],
]);

/** A chart for each measure, with a line for each run. @param {Point[][]} runs @param {string[]} labels @param {number} smoothing */
function chartsOf(runs, labels, smoothing) {
  return CHARTS.flatMap(([name, title, unit]) => {
    const known = runs.map((points) => points.filter((point) => point[name] !== null));
    const x = [...new Set(known.flatMap((points) => points.map(({ step }) => step)))].sort((a, b) => a - b);
    if (!x.length) return [];
    const series = known.flatMap((points, place) => {
      const values = new Map(points.map((point) => [point.step, point[name]]));
      const line = x.map((step) => values.get(step) ?? null);
      return points.length
        ? [
            {
              label: labels[place] ?? "",
              tone: /** @type {Tone} */ (TONES[place % TONES.length]),
              values: name === "train" && smoothing ? smoothed(line, smoothing) : line,
              isSparse: name === "held",
            },
          ]
        : [];
    });
    return [{ title: `${title} by step`, unit, x, series: /** @type {Series[]} */ (series) }];
  });
}

/** @param {{jobs: Job[], labels: string[]}} props */
function Differences({ jobs, labels }) {
  const settings = jobs.map((job) => new Map([...flat(job.config), ["rows", job.data?.rows ?? null]]));
  const names = [...new Set(settings.flatMap((of) => [...of.keys()]))];
  const differing = names.filter(
    (name) => !HIDDEN.has(name) && new Set(settings.map((of) => JSON.stringify(of.get(name) ?? null))).size > 1,
  );
  if (jobs.length < 2) return html`<p>Tick another run to compare its settings with this one's.</p>`;
  if (!differing.length) return html`<p>None: the runs have the same settings and data set.</p>`;
  return html`<${Table} label="Settings that differ" columns=${["Setting", ...labels]}>
    ${differing.map(
      (name) =>
        html`<tr key=${name}>
          <th scope="row">${words(name)}</th>
          ${settings.map((of) => html`<td class="wraps">${shown(of.get(name) ?? null)}</td>`)}
        </tr>`,
    )}
  <//>`;
}
