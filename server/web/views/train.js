/** Train: the jobs there are, a new one, one of them. */
import { get } from "../lib/api.js";
import { ago } from "../lib/format.js";
import { html } from "../lib/html.js";
import { useResource } from "../lib/resource.js";
import { to } from "../lib/route.js";
import { Badge, Bar, Fault } from "../parts/basics.js";
import { JobDetail } from "./job.js";
import { NewJob } from "./new_job.js";

/** @param {{path: string[]}} props */
export function TrainView({ path: [id] }) {
  const jobs = useResource(
    async (signal) => /** @type {Job[]} */ ((await get("/train?limit=100", signal)).jobs),
    [],
    5,
  );
  return html`<div class="row between">
      <h1>Train</h1>
      ${id === "new" ? null : html`<a class="button" href=${to("train", "new")}>New job</a>`}
    </div>
    <${Fault} problem=${jobs.problem} />
    <div class="sides list">
      <nav aria-label="Jobs">
        ${jobs.data?.length === 0 ? html`<p>No job yet.</p>` : null}
        <ul class="names">
          ${jobs.data?.map(
            (job) =>
              html`<li key=${job.id}>
                <a href=${to("train", job.id)} aria-current=${job.id === id ? "true" : undefined}>
                  <span class="name">${job.name}</span>
                  <${Status} job=${job} />
                  ${job.adapter ? html`<small>version ${job.adapter.version}</small>` : null}
                  <small>${ago(job.created_at)}</small>
                  ${job.status === "running" ? html`<${Bar} label="progress" value=${job.progress.step} most=${job.progress.total_steps ?? 0} />` : null}
                </a>
              </li>`,
          )}
        </ul>
      </nav>
      <div>
        ${
          id === "new" || (!id && jobs.data?.length === 0)
            ? html`<${NewJob} onQueued=${jobs.reload} />`
            : id
              ? html`<${JobDetail} key=${id} id=${id} onChange=${jobs.reload} />`
              : html`<div class="card"><p>Choose a job, or <a href=${to("train", "new")}>start a new one</a>.</p></div>`
        }
      </div>
    </div>`;
}

const TONES = { queued: "", running: "busy", paused: "", succeeded: "good", failed: "bad", cancelled: "" };

/** @param {{job: Job}} props */
export function Status({ job }) {
  const words = job.pausing
    ? "pausing"
    : job.status === "queued" && job.position
      ? `queued, number ${job.position}`
      : job.status;
  return html`<${Badge} tone=${TONES[job.status]}>${words}<//>`;
}
