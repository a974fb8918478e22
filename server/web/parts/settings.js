/** Settings of a job, by their names in the API. */
import { html } from "../lib/html.js";

/** Settings that say nothing about how a job trains. */
export const HIDDEN = new Set(["name", "start_from_digest"]);

/** @param {{config: Record<string, any>}} props */
export function Settings({ config }) {
  return html`<dl>
    ${flat(config)
      .filter(([name, value]) => !HIDDEN.has(name) && value !== "")
      .map(
        ([name, value]) =>
          html`<dt>${words(name)}</dt>
            <dd>${shown(value)}</dd>`,
      )}
  </dl>`;
}

/** The entries, with those of `lora` and `training` in their places. @param {Record<string, any>} config @returns {[string, any][]} */
export const flat = (config) =>
  Object.entries(config).flatMap(([name, value]) =>
    value && typeof value === "object" && !Array.isArray(value) ? flat(value) : [[name, value]],
  );

/** @param {string} name */
export const words = (name) => (name.charAt(0).toUpperCase() + name.slice(1)).replaceAll("_", " ");

/** @param {any} value */
export function shown(value) {
  if (value === null) return "–";
  if (typeof value === "boolean") return value ? "yes" : "no";
  return Array.isArray(value) ? value.join(", ") : String(value);
}
