/** The audit list: who did what, and when. */
import { get } from "../lib/api.js";
import { moment } from "../lib/format.js";
import { html, useState } from "../lib/html.js";
import { useResource } from "../lib/resource.js";
import { Fault, Table } from "../parts/basics.js";

/** @type {Record<string, string>} */
const WORDS = {
  "key.create": "made a key",
  "key.change": "changed a key",
  "key.revoke": "revoked a key",
  "adapter.upload": "uploaded an adapter",
  "adapter.import": "imported an adapter",
  "adapter.compose": "named a blend",
  "adapter.download": "downloaded an adapter",
  "adapter.delete": "deleted an adapter",
  "adapter.public": "made an adapter public",
  "adapter.private": "made an adapter private",
  "job.submit": "submitted a job",
  "job.pause": "paused a job",
  "job.resume": "resumed a job",
  "job.stop": "ended a job early",
  "job.cancel": "cancelled a job",
  "job.publish": "published a job's adapter",
  "job.download": "downloaded a job's model",
  "job.delete": "removed a job's files",
  "dataset.upload": "uploaded a data set",
  "dataset.delete": "deleted a data set",
  "file.upload": "uploaded a file",
  "file.download": "downloaded a file",
  "file.delete": "deleted a file",
  "alias.set": "set an alias",
  "alias.delete": "removed an alias",
  "project.limit": "set a project's limits",
  "project.delete": "deleted a project",
  refused: "was refused",
};

/** @param {{keys: Key[]}} props `keys`: for showing ids as names */
export function Audit({ keys }) {
  const names = new Map(keys.map((key) => [key.id, key.name]));
  const [before, setBefore] = useState("");
  const audit = useResource(
    (signal) => get(`/audit${before && `?after=${before}`}`, signal),
    [before, keys.map((key) => key.revoked_at).join()],
  );
  /** @type {AuditEntry[]} */
  const entries = audit.data?.entries ?? [];
  return html`<section class="card" aria-label="Audit">
    <h2>Log</h2>
    <${Fault} problem=${audit.problem} />
    ${audit.data && !entries.length ? html`<p>Nothing yet: keys, limits, uploads, downloads, jobs, deletes and refused attempts are written down here.</p>` : null}
    ${
      entries.length
        ? html`<${Table} label="Audit" columns=${["When", "Who", "What", "Of", "Project", "From"]}>
              ${entries.map(
                (entry) =>
                  html`<tr key=${entry.number}>
                    <td>${moment(entry.at)}</td>
                    <td>${names.get(entry.who) ?? entry.who}</td>
                    <td>${WORDS[entry.action] ?? entry.action}</td>
                    <td>${names.get(entry.target) ?? entry.target}${entry.action === "alias.set" ? ` → ${String(entry.detail.version)}` : ""}</td>
                    <td>${entry.project}</td>
                    <td title=${entry.request_id}>${entry.address}</td>
                  </tr>`,
              )}
            <//>`
        : null
    }
    <p class="row">
      ${audit.data?.next ? html`<button type="button" class="plain" onClick=${() => setBefore(String(audit.data.next))}>Older</button>` : null}
      ${before ? html`<button type="button" class="plain" onClick=${() => setBefore("")}>Newest</button>` : null}
    </p>
  </section>`;
}
