/** Engine: its current state, from /metrics. */
import { listAdapters } from "../lib/adapters.js";
import { call } from "../lib/api.js";
import { bytes, compact, count, duration, percent } from "../lib/format.js";
import { html, useEffect, useMemo, useRef } from "../lib/html.js";
import { bucketsOf, bucketsSince, byLabel, parseMetrics, quantile, valueOf } from "../lib/prometheus.js";
import { useResource } from "../lib/resource.js";
import { to } from "../lib/route.js";
import { perKey } from "../lib/session.js";
import { useStore } from "../lib/store.js";
import { Badge, Fault, Table } from "../parts/basics.js";
import { Chart } from "../parts/chart.js";

const SECONDS = 2;
const KEPT = 150;

const GAP = 3 * SECONDS; // between readings: the view was left, or the server was away
const MOST_LISTED = 12;
const FIRST = "smolora_time_to_first_token_seconds";
const BETWEEN = "smolora_inter_token_seconds";

/**
 * @import { Buckets, Sample } from "../lib/prometheus.js"
 * @typedef {{at: number, running: number, waiting: number, generated: number, prompts: number, kv: number,
 *   replicas: number, first: Buckets, between: Buckets}} Reading
 */

/** @param {import("../lib/prometheus.js").Sample[]} samples @returns {Reading} */
const readingOf = (samples) => ({
  at: Date.now() / 1000,
  running: valueOf(samples, "smolora_requests_running"),
  waiting: valueOf(samples, "smolora_requests_waiting"),
  generated: valueOf(samples, "smolora_generated_tokens_total"),
  prompts: valueOf(samples, "smolora_prompt_tokens_total"),
  kv: valueOf(samples, "smolora_kv_blocks_used") / Math.max(1, valueOf(samples, "smolora_kv_blocks")),
  replicas: samples.filter(({ name }) => name === "smolora_generated_tokens_total").length,
  first: bucketsOf(samples, FIRST),
  between: bucketsOf(samples, BETWEEN),
});

/** Readings, with null where some are missing. @param {Reading[]} readings */
const withGaps = (readings) =>
  readings.flatMap((now, place) => {
    const before = readings[place - 1];
    return before && now.at - before.at > GAP ? [null, now] : [now];
  });

/** Times of readings; a missing one is between its neighbours. @param {(Reading | null)[]} readings */
const timesOf = (readings) =>
  readings.map((now, place) => now?.at ?? ((readings[place - 1]?.at ?? 0) + (readings[place + 1]?.at ?? 0)) / 2);

/** A counter's growth per second; null if the server was restarted, or a replica came or went. @param {(Reading | null)[]} readings @param {"generated" | "prompts"} of */
const rates = (readings, of) =>
  readings.map((now, place) => {
    const before = readings[place - 1];
    const isSame = now && before && now.replicas === before.replicas && now[of] >= before[of];
    return isSame ? (now[of] - before[of]) / (now.at - before.at) : null;
  });

/** The median and the 95th percentile, as text. @param {Buckets} buckets */
function spread(buckets) {
  const [middle, high] = [quantile(buckets, 0.5), quantile(buckets, 0.95)];
  return middle === null || high === null ? "–" : `${duration(middle)} · ${duration(high)}`;
}

/** Readings since the page was opened. */
const kept = perKey(/** @type {Reading[]} */ ([]));

export function EngineView() {
  const metrics = useResource(
    async (signal) => parseMetrics(await (await call("GET", "/metrics?all_replicas=true", { signal })).text()),
    [],
    SECONDS,
  );
  const adapters = useResource(listAdapters, [], 10);
  const all = useStore(kept);
  const readings = useMemo(() => withGaps(all), [all]);
  const last = useRef(metrics.data);
  useEffect(() => {
    if (!metrics.data || metrics.data === last.current) return;
    last.current = metrics.data;
    const reading = readingOf(metrics.data);
    kept.set([...kept.value.slice(-KEPT), reading]);
  }, [metrics.data]);

  const x = useMemo(() => timesOf(readings), [readings]);
  const tokens = useMemo(
    () => [
      { label: "generated", tone: "first", values: rates(readings, "generated") },
      { label: "read of prompts", tone: "second", values: rates(readings, "prompts") },
    ],
    [readings],
  );
  const queue = useMemo(
    () => [
      { label: "running", tone: "first", values: readings.map((reading) => reading?.running ?? null) },
      { label: "waiting", tone: "second", values: readings.map((reading) => reading?.waiting ?? null) },
    ],
    [readings],
  );
  const now = all.at(-1);
  const since = all[0];
  const speed = rates(readings, "generated").at(-1);
  const samples = metrics.data ?? [];
  const resident = [...(adapters.data?.own ?? []), ...(adapters.data?.shared ?? [])].filter(
    (adapter) => adapter.resident,
  );
  const listed = resident.slice(0, MOST_LISTED);
  const jobs = (/** @type {string} */ status) =>
    samples.find((sample) => sample.name === "smolora_jobs" && sample.labels["status"] === status)?.value ?? 0;
  const free = valueOf(samples, "smolora_disk_free_bytes");
  return html`<h1>Engine</h1>
    ${
      metrics.problem?.status === 403
        ? html`<div class="card"><p>Your key may not read the engine's metrics. Use one with the scope <code>metrics</code> or <code>admin</code>.</p></div>`
        : html`<${Fault} problem=${metrics.problem} />`
    }
    ${
      now
        ? html`<dl class="figures five">
            <div><dt>Answers running</dt><dd>${count(now.running)}</dd></div>
            <div><dt>Answers waiting</dt><dd>${count(now.waiting)}</dd></div>
            <div><dt>Tokens a second</dt><dd>${speed === null || speed === undefined ? "–" : count(Math.round(speed))}</dd></div>
            <${Spread} title="To the first token" now=${now.first} since=${since?.first ?? []} />
            <${Spread} title="Between tokens" now=${now.between} since=${since?.between ?? []} />
            <div><dt>Attention cache</dt><dd>${percent(now.kv)}</dd></div>
            <div><dt>Adapters loaded</dt><dd>${count(valueOf(samples, "smolora_adapters_resident"))}</dd></div>
            <div><dt>Jobs training</dt><dd>${count(jobs("running"))} <small>${count(jobs("queued"))} queued</small></dd></div>
            <div><dt>Generated since start</dt><dd>${compact(now.generated)}</dd></div>
            ${free ? html`<div><dt>Disk free</dt><dd>${bytes(free)}</dd></div>` : null}
          </dl>
          ${
            readings.length < 2
              ? null
              : html`<div class="charts">
            <div class="card"><${Chart} title="Tokens a second" x=${x} xLabel="time" isTime isFromZero series=${tokens} /></div>
            <div class="card"><${Chart} title="Answers" x=${x} xLabel="time" isTime isFromZero series=${queue} /></div>
          </div>`
          }
          <${Traffic} samples=${samples} />`
        : metrics.problem
          ? null
          : html`<p class="muted">Loading…</p>`
    }
    ${
      adapters.data
        ? html`<section class="card" aria-label="Adapters in memory">
          <h2>In memory now</h2>
          <p><small>By name${adapters.data.isCut ? ", for adapters in the list only" : ""}. Identical adapters share memory; a blend is loaded when its parts are.</small></p>
          ${
            resident.length
              ? html`<ul class="plain-list">
                ${listed.map((adapter) => html`<li><a href=${to("adapters", ...adapter.name.split("/"))}>${adapter.name}</a> ${adapter.versions.filter((version) => version.resident).map((version) => html`<${Badge} tone="good">version ${version.version}<//>`)}</li>`)}
              </ul>
              ${listed.length < resident.length ? html`<p class="muted">And ${count(resident.length - listed.length)} more.</p>` : null}`
              : html`<p>None of yours. An adapter's weights come when the first request needs them, and stay while there is room.</p>`
          }
        </section>`
        : null
    }`;
}

/**
 * A time's median and 95th percentile in these minutes, or since the server's start if nothing was observed since.
 * @param {{title: string, now: Buckets, since: Buckets}} props
 */
function Spread({ title, now, since }) {
  const recent = bucketsSince(now, since);
  const isRecent = Boolean(recent.at(-1)?.[1]);
  return html`<div>
    <dt>${title}, p50 · p95</dt>
    <dd class="spread">${spread(isRecent ? recent : now)} <small>${isRecent ? "since this view was opened" : "since the start"}</small></dd>
  </div>`;
}

/** Requests by adapter and by outcome. @param {{samples: Sample[]}} props */
function Traffic({ samples }) {
  const requests = byLabel(samples, "smolora_adapter_requests_total", "adapter").filter(([, number]) => number);
  const tokens = new Map(byLabel(samples, "smolora_adapter_tokens_total", "adapter"));
  const outcomes = byLabel(samples, "smolora_requests_total", "outcome").filter(([, number]) => number);
  if (!requests.length && !outcomes.length) return null;
  return html`<div class="charts">
    <section class="card" aria-label="Busiest adapters">
      <h2>Busiest adapters since the start</h2>
      <${Table} label="Busiest adapters" columns=${["Adapter", "#Requests", "#Tokens generated"]}>
        ${requests.slice(0, MOST_LISTED).map(
          ([name, number]) =>
            html`<tr key=${name}>
              <th scope="row">${name}</th>
              <td class="number">${count(number)}</td>
              <td class="number">${compact(tokens.get(name) ?? 0)}</td>
            </tr>`,
        )}
      <//>
    </section>
    <section class="card" aria-label="Requests by outcome">
      <h2>Requests by outcome</h2>
      <${Table} label="Requests by outcome" columns=${["Outcome", "#Requests", "#Share"]}>
        ${outcomes.map(
          ([name, number]) =>
            html`<tr key=${name}>
              <th scope="row">${name}</th>
              <td class="number">${count(number)}</td>
              <td class="number">${percent(number / outcomes.reduce((sum, [, one]) => sum + one, 0))}</td>
            </tr>`,
        )}
      <//>
    </section>
  </div>`;
}
