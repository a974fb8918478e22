/** Keys and usage: what was used; for admins who may what, and what was done. */
import { ask, get } from "../lib/api.js";
import { compact, count, duration } from "../lib/format.js";
import { html, useState } from "../lib/html.js";
import { useResource } from "../lib/resource.js";
import { Fault, Field, SelectField } from "../parts/basics.js";
import { Audit } from "./audit.js";
import { Keys } from "./keys.js";
import { Projects } from "./projects.js";

/** Whether a key is an admin's is told by what it may read. */
export function AccessView() {
  const keys = useResource(async (signal) => /** @type {Key[]} */ ((await get("/keys", signal)).keys), [], 15);
  const isAdmin = keys.data !== null;
  return html`<h1>Keys and usage</h1>
    <${Usage} isAdmin=${isAdmin} />
    ${keys.problem?.status === 403
      ? html`<p class="muted">Keys, projects and the audit list are for keys with the scope <code>admin</code>.</p>`
      : html`<${Fault} problem=${keys.problem} />`}
    ${keys.data ? html`<${Keys} keys=${keys.data} onChange=${keys.reload} /><${Projects} /><${Audit} />` : null}`;
}

const DAYS = 30;
/** @param {number} ago */
const dayOf = (ago) => new Date(Date.now() - ago * 86_400_000).toISOString().slice(0, 10);

/** @param {{isAdmin: boolean}} props */
function Usage({ isAdmin }) {
  const [by, setBy] = useState("day");
  const [from, setFrom] = useState(dayOf(DAYS));
  const [until, setUntil] = useState(dayOf(-1));
  const usage = useResource(
    async (signal) => /** @type {UsageRow[]} */ ((await ask("GET", `/usage?by=${by}&from=${from}&to=${until}`, { signal })).rows),
    [by, from, until],
    15,
  );
  const options = [["day", "by day"], ["adapter", "by adapter"], ["key", "by key"], ...(isAdmin ? [["project", "by project"]] : [])];
  const dateField = (/** @type {string} */ label, /** @type {string} */ name, /** @type {string} */ value, /** @type {(value: string) => void} */ onChange) =>
    html`<${Field} label=${label} name=${name} problem=${usage.problem}>
      ${(/** @type {Record<string, unknown>} */ attributes) =>
        html`<input ...${attributes} type="date" value=${value} onChange=${(/** @type {Event & {currentTarget: HTMLInputElement}} */ event) => event.currentTarget.value && onChange(event.currentTarget.value)} />`}
    <//>`;
  return html`<section class="card" aria-label="Usage">
    <div class="row between">
      <h2>Usage</h2>
      <div class="row end">
        ${dateField("From", "from", from, setFrom)} ${dateField("Before", "to", until, setUntil)}
        <${SelectField} label="Sums" value=${by} options=${options} onChange=${setBy} />
      </div>
    </div>
    <${Fault} problem=${usage.problem} beside=${["from", "to"]} />
    ${usage.data
      ? usage.data.length
        ? html`<div class="scroll" tabindex="0" role="region" aria-label="Usage, as a table">
            <table>
              <thead>
                <tr>
                  ${["What", "Requests", "Prompt tokens", "of them cached", "Generated", "Trained on", "Training time"].map((words) => html`<th scope="col">${words}</th>`)}
                </tr>
              </thead>
              <tbody>
                ${usage.data.map(
                  (row) =>
                    html`<tr>
                      <th scope="row">${row.day ?? row.adapter ?? row.key ?? row.project ?? (by === "adapter" ? "base" : "–")}</th>
                      <td class="number">${count(row.requests)}</td>
                      <td class="number">${compact(row.prompt_tokens)}</td>
                      <td class="number">${compact(row.cached_tokens)}</td>
                      <td class="number">${compact(row.completion_tokens)}</td>
                      <td class="number">${compact(row.trained_tokens)}</td>
                      <td class="number">${duration(row.job_seconds)}</td>
                    </tr>`,
                )}
              </tbody>
            </table>
          </div>`
        : html`<p>Nothing was used in these days.</p>`
      : null}
  </section>`;
}
