/** The limits of a key or a project. */
import { html, useState } from "../lib/html.js";
import { bytes } from "../lib/format.js";
import { NumberField, TextField } from "./basics.js";

/** @type {[keyof Limits, string][]} */
export const LIMITS = [
  ["requests_per_minute", "Requests a minute"],
  ["tokens_per_minute", "Tokens a minute"],
  ["max_jobs", "Jobs at once"],
  ["max_bytes", "Stored bytes"],
  ["max_versions", "Versions"],
  ["max_job_seconds", "Seconds of a job"],
];

/**
 * The bytes of a text such as 2 GiB, 500MB or 1024; null: none, undefined: it can't be read.
 * @param {string} text
 */
function bytesOf(text) {
  if (!text.trim()) return null;
  const found = /^\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*$/i.exec(text);
  if (!found) return undefined;
  const power = " kmgt".indexOf((found[2] || " ").toLowerCase());
  return Math.round(Number(found[1]) * (found[3] || !found[2] ? 1024 : 1000) ** power);
}

/** @param {{limits: Partial<Limits>, problem: import("../lib/api.js").Problem | null, onChange: (limits: Partial<Limits>) => void}} props */
export function LimitFields({ limits, problem, onChange }) {
  const [text, setText] = useState(limits.max_bytes == null ? "" : bytes(limits.max_bytes));
  const read = bytesOf(text);
  return html`<div class="fields">
    ${LIMITS.map(([name, words]) =>
      name === "max_bytes"
        ? html`<${TextField} label=${words} name=${name} placeholder="no limit" hint=${read === undefined ? "Not a size: write it as 2 GiB." : "such as 2 GiB"} value=${text} problem=${problem}
            onChange=${(/** @type {string} */ value) => {
              setText(value);
              const size = bytesOf(value);
              if (size !== undefined) onChange({ ...limits, max_bytes: size });
            }} />`
        : html`<${NumberField} label=${words} name=${name} placeholder="no limit" step="1" value=${limits[name] ?? null} problem=${problem} onChange=${(/** @type {number | null} */ value) => onChange({ ...limits, [name]: value })} />`,
    )}
  </div>`;
}
