/** Keys and usage; for admins and managers also projects, keys and the audit list. */
import { ask, get, isOpen } from "../lib/api.js";
import { compact, count, duration } from "../lib/format.js";
import { html, useState } from "../lib/html.js";
import { useResource } from "../lib/resource.js";
import { Fault, SelectField, Table, TextField } from "../parts/basics.js";
import { Audit } from "./audit.js";
import { Keys } from "./keys.js";
import { Projects } from "./projects.js";

/** A key is an admin's, or its project's manager's, if it may list keys. */
export function AccessView() {
  const keys = useResource(
    async (signal) => {
      const found = /** @type {Key[]} */ ((await get("/keys", signal)).keys);
      return { found, isOpen: !found.length && (await isOpen(signal)) };
    },
    [],
    15,
  );
  const isAdmin = keys.data !== null;
  return html`<h1>Keys and usage</h1>
    <${Usage} isAdmin=${isAdmin} keys=${keys.data?.found ?? []} />
    ${
      keys.problem?.status === 403
        ? html`<p class="muted">Keys, projects and the audit list are for keys with the scope <code>manage</code> or <code>admin</code>.</p>`
        : html`<${Fault} problem=${keys.problem} />`
    }
    ${keys.data ? html`<${Keys} keys=${keys.data.found} isOpen=${keys.data.isOpen} onChange=${keys.reload} /><${Projects} keys=${keys.data.found} /><${Audit} keys=${keys.data.found} />` : null}`;
}

const DAYS = 30;
/** @param {number} ago */
const dayOf = (ago) => new Date(Date.now() - ago * 86_400_000).toISOString().slice(0, 10);

/** @param {{isAdmin: boolean, keys: Key[]}} props `keys`: for showing ids as names, if the key may list them */
function Usage({ isAdmin, keys }) {
  const names = new Map(keys.map((key) => [key.id, key.name]));
  const [by, setBy] = useState("day");
  const [from, setFrom] = useState(dayOf(DAYS));
  const [until, setUntil] = useState(dayOf(-1));
  const usage = useResource(
    async (signal) =>
      /** @type {UsageRow[]} */ ((await ask("GET", `/usage?by=${by}&from=${from}&to=${until}`, { signal })).rows),
    [by, from, until],
    15,
  );
  const options = [
    ["day", "day"],
    ["adapter", "adapter"],
    ["key", "key"],
    ...(isAdmin ? [["project", "project"]] : []),
  ];
  return html`<section class="card" aria-label="Usage">
    <div class="row between">
      <h2>Usage</h2>
      <div class="row end">
        <${TextField} label="From" name="from" type="date" problem=${usage.problem} value=${from} onChange=${setFrom} />
        <${TextField} label="To (excluded)" name="to" type="date" problem=${usage.problem} value=${until} onChange=${setUntil} />
        <${SelectField} label="Group by" value=${by} options=${options} onChange=${setBy} />
      </div>
    </div>
    <${Fault} problem=${usage.problem} beside=${["from", "to"]} />
    ${usage.data || usage.problem ? null : html`<p class="muted">Loading…</p>`}
    ${
      usage.data
        ? usage.data.length
          ? html`<${Table} label="Usage" columns=${["What", "#Requests", "#Prompt tokens", "#Cached", "#Generated", "#Trained on", "#Training time"]}>
                ${usage.data.map(
                  (row) =>
                    html`<tr>
                      <th scope="row" title=${row.key}>${row.day ?? row.adapter ?? names.get(row.key ?? "") ?? row.key ?? row.project ?? (by === "adapter" ? "base" : "–")}</th>
                      <td class="number">${count(row.requests)}</td>
                      <td class="number">${compact(row.prompt_tokens)}</td>
                      <td class="number">${compact(row.cached_tokens)}</td>
                      <td class="number">${compact(row.completion_tokens)}</td>
                      <td class="number">${compact(row.trained_tokens)}</td>
                      <td class="number">${duration(row.job_seconds)}</td>
                    </tr>`,
                )}
              <//>`
          : html`<p>Nothing was used in these days.</p>`
        : null
    }
  </section>`;
}
