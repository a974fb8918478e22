/** The limits of a key or a project. */
import { html } from "../lib/html.js";
import { NumberField } from "./basics.js";

/** @type {[keyof Limits, string][]} */
export const LIMITS = [
  ["requests_per_minute", "Requests a minute"],
  ["tokens_per_minute", "Tokens a minute"],
  ["max_jobs", "Jobs at once"],
  ["max_bytes", "Stored bytes"],
  ["max_versions", "Versions"],
  ["max_job_seconds", "Seconds of a job"],
];

/** @param {{limits: Partial<Limits>, problem: import("../lib/api.js").Problem | null, onChange: (limits: Partial<Limits>) => void}} props */
export function LimitFields({ limits, problem, onChange }) {
  return html`<div class="fields">
    ${LIMITS.map(
      ([name, words]) =>
        html`<${NumberField} label=${words} name=${name} placeholder="no limit" step="1" value=${limits[name] ?? null} problem=${problem} onChange=${(/** @type {number | null} */ value) => onChange({ ...limits, [name]: value })} />`,
    )}
  </div>`;
}
