/** Engine: its current state, from /metrics. */
import { listAdapters } from "../lib/adapters.js";
import { call } from "../lib/api.js";
import { bytes, compact, count, percent } from "../lib/format.js";
import { html, useEffect, useMemo, useRef } from "../lib/html.js";
import { parseMetrics, valueOf } from "../lib/prometheus.js";
import { useResource } from "../lib/resource.js";
import { to } from "../lib/route.js";
import { perKey } from "../lib/session.js";
import { useStore } from "../lib/store.js";
import { Badge, Fault } from "../parts/basics.js";
import { Chart } from "../parts/chart.js";

const SECONDS = 2;
const KEPT = 150;

/** @typedef {{at: number, running: number, waiting: number, generated: number, prompts: number, kv: number}} Reading */

/** @param {import("../lib/prometheus.js").Sample[]} samples @returns {Reading} */
const readingOf = (samples) => ({
  at: Date.now() / 1000,
  running: valueOf(samples, "smolora_requests_running"),
  waiting: valueOf(samples, "smolora_requests_waiting"),
  generated: valueOf(samples, "smolora_generated_tokens_total"),
  prompts: valueOf(samples, "smolora_prompt_tokens_total"),
  kv: valueOf(samples, "smolora_kv_blocks_used") / Math.max(1, valueOf(samples, "smolora_kv_blocks")),
});

/** A counter's growth per second; null if the server was restarted. @param {Reading[]} readings @param {"generated" | "prompts"} of */
const rates = (readings, of) =>
  readings.map((now, place) => {
    const before = readings[place - 1];
    return before && now[of] >= before[of] ? (now[of] - before[of]) / (now.at - before.at) : null;
  });

/** Readings since the page was opened. */
const kept = perKey(/** @type {Reading[]} */ ([]));

export function EngineView() {
  const metrics = useResource(
    async (signal) => parseMetrics(await (await call("GET", "/metrics", { signal })).text()),
    [],
    SECONDS,
  );
  const adapters = useResource(listAdapters, [], 5);
  const readings = useStore(kept);
  const last = useRef(metrics.data);
  useEffect(() => {
    if (!metrics.data || metrics.data === last.current) return;
    last.current = metrics.data;
    const reading = readingOf(metrics.data);
    kept.set([...kept.value.slice(-KEPT), reading]);
  }, [metrics.data]);

  const x = useMemo(() => readings.map((reading) => reading.at), [readings]);
  const tokens = useMemo(
    () => [
      { label: "generated", tone: "first", values: rates(readings, "generated") },
      { label: "read of prompts", tone: "second", values: rates(readings, "prompts") },
    ],
    [readings],
  );
  const queue = useMemo(
    () => [
      { label: "running", tone: "first", values: readings.map((reading) => reading.running) },
      { label: "waiting", tone: "second", values: readings.map((reading) => reading.waiting) },
    ],
    [readings],
  );
  const now = readings.at(-1);
  const speed = rates(readings, "generated").at(-1);
  const samples = metrics.data ?? [];
  const resident = [...(adapters.data?.own ?? []), ...(adapters.data?.shared ?? [])].filter(
    (adapter) => adapter.resident,
  );
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
        ? html`<dl class="figures">
            <div><dt>Answers running</dt><dd>${count(now.running)}</dd></div>
            <div><dt>Answers waiting</dt><dd>${count(now.waiting)}</dd></div>
            <div><dt>Tokens a second</dt><dd>${speed === null || speed === undefined ? "–" : count(Math.round(speed))}</dd></div>
            <div><dt>Attention cache</dt><dd>${percent(now.kv)}</dd></div>
            <div><dt>Weights of adapters</dt><dd>${count(valueOf(samples, "smolora_adapters_resident"))}</dd></div>
            <div><dt>Jobs training</dt><dd>${count(jobs("running"))}</dd></div>
            <div><dt>Jobs queued</dt><dd>${count(jobs("queued"))}</dd></div>
            <div><dt>Generated since start</dt><dd>${compact(now.generated)}</dd></div>
            ${free ? html`<div><dt>Disk free</dt><dd>${bytes(free)}</dd></div>` : null}
          </dl>
          ${
            readings.length < 2
              ? null
              : html`<div class="charts">
            <div class="card"><${Chart} title="Tokens a second" x=${x} xLabel="time" isTime series=${tokens} /></div>
            <div class="card"><${Chart} title="Answers" x=${x} xLabel="time" isTime series=${queue} /></div>
          </div>`
          }`
        : null
    }
    ${
      adapters.data
        ? html`<section class="card" aria-label="Adapters in memory">
          <h2>In memory now</h2>
          <p><small>By name${adapters.data.isCut ? ", for adapters in the list only" : ""}. Equal weights are stored once. A blend is resident if its parts are.</small></p>
          ${
            resident.length
              ? html`<ul class="plain-list">
                ${resident.map((adapter) => html`<li><a href=${to("adapters", ...adapter.name.split("/"))}>${adapter.name}</a> ${adapter.versions.filter((version) => version.resident).map((version) => html`<${Badge} tone="good">version ${version.version}<//>`)}</li>`)}
              </ul>`
              : html`<p>None of yours. An adapter's weights come when the first request needs them, and stay while there is room.</p>`
          }
        </section>`
        : null
    }`;
}
