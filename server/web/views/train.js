/** Train: the list of jobs, a new job, one job. */
import { get } from "../lib/api.js";
import { ago, loss } from "../lib/format.js";
import { html, useRef } from "../lib/html.js";
import { lazy } from "../lib/lazy.js";
import { useAction, useResource } from "../lib/resource.js";
import { to } from "../lib/route.js";
import { Bar, Fault, useInSight } from "../parts/basics.js";
import { Status } from "../parts/status.js";
import { JobDetail } from "./job.js";
import { NewJob } from "./new_job.js";

/**
 * Running jobs, then `pages` pages of the newest jobs. If many jobs wait, running ones aren't among the newest.
 * @param {number} pages
 * @param {AbortSignal} signal
 * @returns {Promise<{jobs: Job[], isCut: boolean}>} `isCut`: there are older jobs
 */
async function newest(pages, signal) {
  const { jobs, next } = await get("/train", signal);
  let after = next;
  for (let page = 1; page < pages && after; page += 1) {
    const older = await get(`/train?after=${encodeURIComponent(after)}`, signal);
    jobs.push(...older.jobs);
    after = older.next;
  }
  const running = after ? (await get("/train?status=running", signal)).jobs : [];
  const ids = new Set(running.map((/** @type {Job} */ job) => job.id));
  return {
    jobs: [...running, ...jobs.filter((/** @type {Job} */ job) => !ids.has(job.id))],
    isCut: Boolean(after),
  };
}

const Data = lazy(async () => (await import("./data.js")).Data);
const Runs = lazy(async () => (await import("./runs.js")).Runs);

/** @param {{path: string[]}} props */
export function TrainView({ path: [id, ...others] }) {
  const pages = useRef(1);
  const jobs = useResource((signal) => newest(pages.current, signal), [], 5);
  const older = useAction(() => {
    pages.current += 1;
    return jobs.reload();
  });
  const listed = jobs.data?.jobs;
  const detail = useInSight(listed ? (id ?? "") : null);
  const isOffered = useRef(false); // then the form stays, though a poll lists the job before its POST is answered
  if (id) isOffered.current = false;
  else if (listed?.length === 0) isOffered.current = true;
  const hasListed = useRef(false); // then a passing 403, as of a proxy, takes nothing away
  if (listed) hasListed.current = true;
  const isForbidden = jobs.problem?.status === 403 && !hasListed.current;
  const more = jobs.data?.isCut
    ? html`<button type="button" class="plain" disabled=${older.busy} onClick=${older.run}>Older jobs</button>`
    : null;
  const heading = html`<div class="row between">
      <h1>Train</h1>
      <p class="row">
        ${id === "runs" || id === "data" ? html`<a href=${to("train")}>Jobs</a>` : null}
        ${id === "runs" ? null : html`<a href=${to("train", "runs")}>Compare runs</a>`}
        ${id === "data" ? null : html`<a href=${to("train", "data")}>Data</a>`}
        ${id === "new" || isForbidden ? null : html`<a class="button" href=${to("train", "new")}>New job</a>`}
      </p>
    </div>
    ${
      isForbidden
        ? html`<div class="card"><p>Your key may not train. Ask for a key with the scope <code>train</code> to train adapters and to see jobs.</p></div>`
        : html`<${Fault} problem=${jobs.problem} />`
    }`;
  if (isForbidden) return heading;
  if (id === "runs") return html`${heading}<${Runs} jobs=${listed ?? null} ids=${others} more=${more} />`;
  if (id === "data") return html`${heading}<${Data} id=${others[0]} jobs=${listed ?? null} />`;
  return html`${heading}
    <div class="sides list ${id ? "has-choice" : ""}">
      <nav aria-label="Jobs">
        ${listed || jobs.problem ? null : html`<p class="muted">Loading…</p>`}
        ${listed?.length === 0 ? html`<p>No job yet.</p>` : null}
        <ul class="names">
          ${listed?.map(
            (job) =>
              html`<li key=${job.id}>
                <a href=${to("train", job.id)} aria-current=${job.id === id ? "true" : undefined}>
                  <span class="name">${job.name}</span>
                  <${Status} job=${job} />
                  ${job.project === "default" ? null : html`<small>of ${job.project}</small>`}
                  ${job.adapter ? html`<small>version ${job.adapter.version}</small>` : job.config.training ? html`<small>learning rate ${job.config.training["learning_rate"]}</small>` : null}
                  ${typeof job.metrics["eval_loss"] === "number" ? html`<small>held-out loss ${loss(job.metrics["eval_loss"])}</small>` : null}
                  <small>${ago(job.created_at)}</small>
                  ${job.status === "running" ? html`<${Bar} label="progress" value=${job.progress.step} most=${job.progress.total_steps ?? 0} />` : null}
                </a>
              </li>`,
          )}
        </ul>
        ${more}
      </nav>
      <div class=${id ? "chosen" : ""} tabindex="-1" ref=${detail}>
        ${id ? html`<p class="back"><a href=${to("train")}>‹ All jobs</a></p>` : null}
        ${
          id === "new" || isOffered.current
            ? html`<${NewJob} onQueued=${jobs.reload} />`
            : id
              ? html`<${JobDetail} key=${id} id=${id} onChange=${jobs.reload} />`
              : listed &&
                html`<div class="card"><p>Choose a job, or <a href=${to("train", "new")}>start a new one</a>.</p></div>`
        }
      </div>
    </div>`;
}
