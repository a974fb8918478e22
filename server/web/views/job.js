/** One job: its live curves, log, actions and result. */
import { Problem, ask, download, events, get } from "../lib/api.js";
import { pointsOf, pointsOfEvents } from "../lib/curves.js";
import { ago, count, duration, loss, moment, plural } from "../lib/format.js";
import { html, useEffect, useMemo, useState } from "../lib/html.js";
import { filled, formOf } from "../lib/job_form.js";
import { useAction, useIsShown, useResource } from "../lib/resource.js";
import { go, to } from "../lib/route.js";
import { Bar, Careful, Fault, Warnings } from "../parts/basics.js";
import { Card } from "../parts/card.js";
import { LossChart } from "../parts/loss.js";
import { Samples } from "../parts/samples.js";
import { Settings } from "../parts/settings.js";
import { Status } from "../parts/status.js";
import { TryIt } from "../parts/try_it.js";

/** @import { Point } from "../lib/curves.js" */

const ENDED = new Set(["succeeded", "failed", "cancelled"]);
const RETRY_SECONDS = 2;
const GATHER_SECONDS = 0.25;
const MOST_LINES = 500;

/** Wait until the tab is visible, or `signal` aborts. @param {AbortSignal} signal */
const seen = (signal) =>
  new Promise((resolve) => {
    if (!document.hidden || signal.aborted) return resolve(null);
    document.addEventListener("visibilitychange", resolve, { once: true, signal });
    return signal.addEventListener("abort", resolve, { once: true });
  });

/**
 * The job's events, live. After a broken connection they continue where it broke. Events that arrive together are
 * delivered together; for an ended job these are all events. A browser allows few connections to a server for all
 * tabs together, so a hidden tab keeps none.
 * @param {string} id
 * @param {() => Promise<void>} onNews called once at a time, and once more if events arrived meanwhile
 */
function useEvents(id, onNews) {
  const [found, setFound] = useState(/** @type {JobEvent[]} */ ([]));
  useEffect(() => {
    const controller = new AbortController();
    const { signal } = controller;
    let last = "";
    /** @type {JobEvent[]} */
    let fresh = [];
    let [isWanted, isAsking] = [false, false];
    const tell = () => {
      const news = fresh;
      fresh = [];
      if (signal.aborted) return;
      setFound((before) => [...before, ...news]);
      isWanted = true;
      if (!isAsking) void askOn();
    };
    const askOn = async () => {
      isAsking = true;
      while (isWanted && !signal.aborted) {
        isWanted = false;
        await onNews();
      }
      isAsking = false;
    };
    const follow = async () => {
      for (;;) {
        await seen(signal);
        if (signal.aborted) return;
        const connection = new AbortController();
        const leave = () => (document.hidden || signal.aborted) && connection.abort();
        document.addEventListener("visibilitychange", leave);
        signal.addEventListener("abort", leave);
        try {
          const headers = last ? { "Last-Event-ID": last } : {};
          for await (const { id: seq, data } of events("GET", `/train/${encodeURIComponent(id)}/events`, {
            headers,
            signal: connection.signal,
          })) {
            last = seq;
            if (fresh.push(JSON.parse(data)) === 1) setTimeout(tell, GATHER_SECONDS * 1000);
          }
          // a server that shuts down closes its streams, too
          if (ENDED.has((await get(`/train/${encodeURIComponent(id)}`, signal)).status)) return;
        } catch (error) {
          // the job doesn't exist, or this key may not see it
          if (error instanceof Problem && [403, 404].includes(error.status)) return;
        } finally {
          document.removeEventListener("visibilitychange", leave);
          signal.removeEventListener("abort", leave);
        }
        if (!connection.signal.aborted) await new Promise((resolve) => setTimeout(resolve, RETRY_SECONDS * 1000));
      }
    };
    void follow();
    return () => controller.abort();
  }, [id]);
  return found;
}

/** @param {{id: string, onChange: () => void}} props */
export function JobDetail({ id, onChange }) {
  const path = `/train/${encodeURIComponent(id)}`;
  const job = useResource(async (signal) => /** @type {Job} */ (await get(path, signal)), [id], 3);
  const found = useEvents(id, () => job.reload());
  const hasReport = job.data?.status === "succeeded";
  const report = useResource(
    async (signal) => (hasReport ? get(`${path}/report`, signal) : null),
    [id, hasReport],
  );
  const points = useMemo(() => {
    const live = pointsOfEvents(found);
    return live.length ? live : pointsOf(report.data?.curves);
  }, [found, report.data]);
  const steer = useAction(async (/** @type {string} */ what) => {
    await ask("POST", `${path}/${what}`);
    await job.reload();
    onChange();
  });
  const save = useAction(() => download(`${path}/download`, `${id}.zip`));
  const isShown = useIsShown();
  const remove = useAction(async () => {
    await ask("DELETE", path);
    onChange();
    if (isShown()) go("train");
  });
  if (!job.data)
    return job.problem ? html`<${Fault} problem=${job.problem} />` : html`<p class="muted">Loading…</p>`;
  const { kind, name, status, progress, metrics, adapter, error, config } = job.data;
  const isOver = ENDED.has(status);
  const isMerge = kind === "merge";
  const step = Math.max(progress.step, points.at(-1)?.step ?? 0); // events come sooner
  return html`<article class="card" aria-label="Job ${name}">
    <div class="row between">
      <h2 class="big">${name} <${Status} job=${job.data} /></h2>
      <p class="row">
        ${
          status === "running" || status === "queued"
            ? html`<button type="button" class="plain" disabled=${steer.busy || job.data.pausing} onClick=${() => steer.run("pause")}>Pause</button>`
            : null
        }
        ${status === "paused" ? html`<button type="button" disabled=${steer.busy} onClick=${() => steer.run("resume")}>Resume</button>` : null}
        ${isOver || isMerge || !progress.step ? null : html`<${Careful} label="Stop and keep the best" deed="Stop" keep="Keep training" sure="Training ends after step ${count(step)}, and the best weights so far are measured and published, as at the job's end." busy=${steer.busy} onSure=${() => steer.run("stop")} />`}
        ${
          isMerge
            ? null
            : html`<button
                type="button"
                class="plain"
                onClick=${() => {
                  filled.set(formOf(config));
                  go("train", "new");
                }}
              >
                Train again
              </button>`
        }
        ${
          isOver
            ? html`<${Careful} key="delete" label="Delete" sure="Its rows, checkpoints and log will be deleted; its adapters stay." busy=${remove.busy} onSure=${() => remove.run()} />`
            : html`<${Careful} key="cancel" label="Cancel" deed="End the job" keep="Keep training" sure="Cancel ${name}? Its progress is lost. Pause it instead to continue later." busy=${steer.busy} onSure=${() => steer.run("cancel")} />`
        }
      </p>
    </div>
    <${Fault} problem=${steer.problem ?? remove.problem ?? save.problem ?? job.problem} />
    ${config.start_from ? html`<p class="muted">Went on from ${config.start_from}.</p>` : null}
    ${error ? html`<div class="fault" role="alert"><p>${error}</p></div>` : null}
    ${
      isOver
        ? null
        : html`<${Bar} label="progress of ${name}" value=${step} most=${progress.total_steps ?? 0} />
          <p>${standing(job.data, step)}</p>
          <p role="status" class="hidden">${announced(job.data, step)}</p>`
    }
    <${Warnings} warnings=${[...new Set(found.filter((event) => event.level === "warning").map((event) => event.message))]} />
    ${
      isMerge
        ? null
        : html`<${Figures} job=${job.data} report=${report.data} points=${points} />
            <details>
              <summary>Settings</summary>
              <${Settings} config=${config} />
            </details>`
    }
    ${adapter ? html`<p class="done">Published as <a href=${to("adapters", adapter.name)}>${adapter.name}@${adapter.version}</a>.</p>` : null}
    ${
      status === "succeeded" && config.method === "full"
        ? html`<p class="done">
            Full fine-tuning is there to compare with, so it publishes no adapter.
            <button type="button" class="link" disabled=${save.busy} onClick=${() => save.run()}>Download the model</button>
          </p>`
        : null
    }
    <${Fault} problem=${report.problem} />
    ${report.data ? html`<${Card} report=${report.data} points=${points} />` : null}
    <${LossChart} points=${points} kept=${report.data?.kept_step ?? null} base=${metrics["base_eval_loss"] ?? null} />
    <${Samples} events=${found} kept=${report.data?.kept_step ?? null} />
    ${adapter ? html`<h3>What it changed</h3> <${TryIt} job=${job.data} />` : null}
    <details>
      <summary>${plural(found.length, "event")}</summary>
      <ol class="log">
        ${found
          .slice(-MOST_LINES)
          .reverse()
          .map(
            (event) =>
              html`<li key=${event.seq} class=${event.level}><time datetime=${event.at} title=${moment(event.at)}>${ago(event.at)}</time> ${event.message}</li>`,
          )}
      </ol>
      ${found.length > MOST_LINES ? html`<small>The newest ${count(MOST_LINES)}; all of them: <code>GET ${path}/events</code></small>` : null}
    </details>
  </article>`;
}

/** How far a job is. @param {Job} job @param {number} step */
function standing({ status, kind, progress }, step) {
  if (status === "queued")
    return step ? `Queued at step ${count(step)}: waits for a worker.` : "Waits for a worker.";
  const at = `tep ${count(step)} of ${count(progress.total_steps ?? 0)}`;
  if (status === "paused") return `Paused at s${at}. If resumed, it returns to its old place in the queue.`;
  if (progress.eta_seconds) return `S${at}, about ${duration(progress.eta_seconds)} to go`;
  return `S${at}${step || kind === "merge" ? "" : ": the base is measured first, which takes a while"}`;
}

/** What a screen reader says of it: no more than each tenth. @param {Job} job @param {number} step */
function announced({ status, progress }, step) {
  const tenths = progress.total_steps ? Math.floor((10 * step) / progress.total_steps) : 0;
  return status === "running" ? `${10 * tenths} % trained` : status;
}

/**
 * The losses of one step: the one whose weights were kept, or else the newest one that was measured on held-out rows.
 * @param {{job: Job, report: any, points: Point[]}} props
 */
function Figures({ job: { metrics, progress }, report, points }) {
  const step = report?.kept_step ?? points.findLast((point) => point.held !== null)?.step ?? null;
  const isLast = step === null || step === report?.steps;
  const point = points.find((one) => one.step === step);
  const train = point?.train ?? (isLast ? metrics["train_loss"] : null);
  const held = report?.evaluation?.tuned?.loss ?? point?.held ?? metrics["eval_loss"];
  const at = step === null ? null : html`<small>step ${count(step)}${report ? ", kept" : ""}</small>`;
  return html`<dl class="figures">
    <div><dt>Training loss</dt><dd>${loss(train)} ${at}</dd></div>
    <div><dt>Held-out loss</dt><dd>${loss(held)} ${held === null || held === undefined ? null : at}</dd></div>
    <div><dt>Base's held-out loss</dt><dd>${loss(metrics["base_eval_loss"])}</dd></div>
    <div><dt>Tokens a second</dt><dd>${progress.tokens_per_second ? count(Math.round(progress.tokens_per_second)) : "–"}</dd></div>
  </dl>`;
}
