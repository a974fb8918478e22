/** What every view is made of: problems, labelled fields, badges, bars. */
import { html, useId } from "../lib/html.js";
import { duration } from "../lib/format.js";

/** @import { Problem } from "../lib/api.js" */

/**
 * A problem in the server's words, with each field at fault but those that are told beside their fields.
 * @param {{problem: Problem | null, beside?: string[]}} props
 */
export function Fault({ problem, beside = [] }) {
  if (!problem) return null;
  const rest = problem.errors.filter((error) => !error.loc.some((part) => beside.includes(String(part))));
  if (problem.errors.length && !rest.length) return html`<div class="fault" role="alert">See the fields marked above.</div>`;
  return html`<div class="fault" role="alert">
    ${rest.length > 1
      ? html`<strong>${rest.length} things are wrong:</strong>
          <ul>
            ${rest.map((error) => html`<li>${error.message}</li>`)}
          </ul>`
      : html`<p>${sentence(rest.length ? whole(problem, rest[0]) : problem.message)}</p>`}
    ${problem.retryAfter === null ? null : html`<p>Try again in ${duration(problem.retryAfter)}.</p>`}
  </div>`;
}

/** @param {Problem} problem @param {{message: string} | undefined} error */
function whole(problem, error) {
  return problem.errors.length === 1 || !error ? problem.message : error.message;
}

/** @param {string} text */
const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (/[.?!]$/.test(text) ? "" : ".");

/**
 * A labelled control, with a hint, and with what is wrong with it. `children` gets the attributes that tie them.
 * @param {{label: string, name?: string, hint?: string, problem?: Problem | null, className?: string,
 *   children: (attributes: Record<string, unknown>) => unknown}} props
 */
export function Field({ label, name = "", hint = "", problem = null, className = "", children }) {
  const id = useId();
  const wrong = name && problem ? problem.of(name) : "";
  const described = [hint && `${id}-hint`, wrong && `${id}-wrong`].filter(Boolean).join(" ");
  /** @type {Record<string, unknown>} */
  const attributes = { id };
  if (name) attributes["name"] = name;
  if (described) attributes["aria-describedby"] = described;
  if (wrong) attributes["aria-invalid"] = "true";
  return html`<div class="field ${className}">
    <label for=${id}>${label}</label>
    ${children(attributes)} ${hint && html`<small id="${id}-hint">${hint}</small>`}
    ${wrong && html`<small class="wrong" id="${id}-wrong">${sentence(wrong)}</small>`}
  </div>`;
}

/**
 * A number that may be left out.
 * @param {{label: string, name: string, value: number | null, hint?: string, problem?: Problem | null,
 *   onChange: (value: number | null) => void, step?: string, placeholder?: string}} props
 */
export function NumberField({ value, onChange, step = "any", placeholder = "", ...field }) {
  return html`<${Field} ...${field}>
    ${(/** @type {Record<string, unknown>} */ attributes) =>
      html`<input
        ...${attributes}
        type="number"
        step=${step}
        placeholder=${placeholder}
        value=${value ?? ""}
        onInput=${(/** @type {InputEvent & {currentTarget: HTMLInputElement}} */ event) =>
          onChange(event.currentTarget.value === "" ? null : event.currentTarget.valueAsNumber)}
      />`}
  <//>`;
}

/**
 * @param {{label: string, name?: string, value: string, options: [string, string][], hint?: string,
 *   problem?: Problem | null, onChange: (value: string) => void}} props `options`: a value and its words each
 */
export function SelectField({ value, options, onChange, ...field }) {
  return html`<${Field} ...${field}>
    ${(/** @type {Record<string, unknown>} */ attributes) =>
      html`<select
        ...${attributes}
        value=${value}
        onChange=${(/** @type {Event & {currentTarget: HTMLSelectElement}} */ event) => onChange(event.currentTarget.value)}
      >
        ${options.map(([of, words]) => html`<option value=${of} selected=${of === value}>${words}</option>`)}
      </select>`}
  <//>`;
}

/** @param {{tone?: string, children: unknown}} props `tone`: good, bad, busy or none */
export const Badge = ({ tone = "", children }) => html`<span class="badge ${tone}">${children}</span>`;

/** @param {{label: string, value: number, most: number}} props */
export function Bar({ label, value, most }) {
  return html`<progress aria-label=${label} value=${Math.min(value, most)} max=${most || 1}></progress>`;
}

/**
 * Something that costs a second click, since it can't be undone.
 * @param {{label: string, sure: string, busy?: boolean, onSure: () => void}} props
 */
export function Careful({ label, sure, busy = false, onSure }) {
  return html`<details class="careful">
    <summary>${label}</summary>
    <div class="menu">
      <p>${sure}</p>
      <button
        type="button"
        class="danger"
        disabled=${busy}
        onClick=${(/** @type {Event & {currentTarget: HTMLElement}} */ event) => {
          event.currentTarget.closest("details")?.removeAttribute("open");
          onSure();
        }}
      >
        ${label}
      </button>
    </div>
  </details>`;
}

/** @param {{warnings: string[]}} props */
export function Warnings({ warnings }) {
  return warnings.map((warning) => html`<p class="warning"><span aria-hidden="true">⚠ </span>${sentence(warning)}</p>`);
}
