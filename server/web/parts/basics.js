/** Building blocks of all views: problems, labelled fields, badges, bars. */
import { html, useEffect, useId, useLayoutEffect, useRef, useState } from "../lib/html.js";
import { duration } from "../lib/format.js";

/** @import { Problem } from "../lib/api.js" */
/** @typedef {Event & {currentTarget: HTMLInputElement}} Typed */

/**
 * A problem's message from the server, with all faulty fields, except those that show it themselves (`beside`).
 * @param {{problem: Problem | null, beside?: string[], onRetry?: () => void}} props `onRetry`: what to do again, if the
 *   problem may pass
 */
export function Fault({ problem, beside = [], onRetry }) {
  if (!problem) return null;
  if (onRetry && (problem.status === 0 || problem.status === 429 || problem.status >= 500))
    return html`<div class="fault"><p role="alert">${sentence(problem.message)}</p><${Retry} seconds=${problem.retryAfter ?? 0} onRetry=${onRetry} /></div>`;
  const rest = problem.errors.filter((error) => !error.loc.some((part) => beside.includes(String(part))));
  if (problem.errors.length && !rest.length)
    return html`<div class="fault" role="alert">See the fields marked above.</div>`;
  return html`<div class="fault" role="alert">
    ${
      rest.length > 1
        ? html`<strong>${rest.length} things are wrong:</strong>
          <ul>
            ${rest.map((error) => html`<li>${error.message}</li>`)}
          </ul>`
        : html`<p>${sentence(rest.length ? whole(problem, rest[0]) : problem.message)}</p>`
    }
    ${problem.retryAfter === null ? null : html`<p>Try again in ${duration(problem.retryAfter)}.</p>`}
  </div>`;
}

/** @param {{seconds: number, onRetry: () => void}} props `seconds`: until it may succeed */
function Retry({ seconds, onRetry }) {
  const [end] = useState(Date.now() + 1000 * seconds);
  const [left, setLeft] = useState(seconds);
  useEffect(() => {
    const timer = setInterval(() => setLeft(Math.max(0, Math.ceil((end - Date.now()) / 1000))), 500);
    return () => clearInterval(timer);
  }, []);
  return html`<p class="row"><button type="button" class="plain" disabled=${left > 0} onClick=${onRetry}>${left ? `Retry in ${duration(left)}` : "Retry"}</button></p>`;
}

/** @param {Problem} problem @param {{message: string} | undefined} error */
function whole(problem, error) {
  return problem.errors.length === 1 || !error ? problem.message : error.message;
}

/** Capitalize a sentence, unless it begins with an adapter's name such as `codes@1`. @param {string} text */
const sentence = (text) =>
  (/^\S+@/.test(text) ? text : text.charAt(0).toUpperCase() + text.slice(1)) + (/[.?!]$/.test(text) ? "" : ".");

/**
 * A labelled control with a hint and its fault. `children` gets the attributes that connect them.
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
 * @typedef {{label: string, name?: string, hint?: string, problem?: Problem | null, className?: string}} About
 *   props of all fields
 */

/**
 * @param {About & {value: string, type?: string, placeholder?: string, onChange: (value: string) => void,
 *   onEnter?: () => void}} props `onEnter`: action of the Enter key, if it shouldn't submit the form
 */
export function TextField({ value, type = "text", placeholder = "", onChange, onEnter, ...about }) {
  /** @param {KeyboardEvent} event */
  function onKeyDown(event) {
    if (!onEnter || event.key !== "Enter" || event.isComposing || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    onEnter();
  }
  return html`<${Field} ...${about}>
    ${(/** @type {object} */ attributes) =>
      html`<input ...${attributes} type=${type} autocomplete="off" spellcheck=${false} placeholder=${placeholder} value=${value}
        onInput=${(/** @type {Typed} */ event) => onChange(event.currentTarget.value)} onKeyDown=${onKeyDown} />`}
  <//>`;
}

/**
 * A number field that may be empty.
 * @param {About & {value: number | null, step?: string, placeholder?: string, onChange: (value: number | null) => void}} props
 */
export function NumberField({ value, step = "any", placeholder = "", onChange, ...about }) {
  return html`<${Field} ...${about}>
    ${(/** @type {object} */ attributes) =>
      html`<input ...${attributes} type="number" step=${step} placeholder=${placeholder} value=${value ?? ""}
        onInput=${(/** @type {Typed} */ { currentTarget: input }) => onChange(input.value === "" ? null : input.valueAsNumber)} />`}
  <//>`;
}

/**
 * @param {About & {value: string, options: [string, string][], onChange: (value: string) => void}} props `options`: a
 *   value and its words each
 */
export function SelectField({ value, options, onChange, ...about }) {
  return html`<${Field} ...${about}>
    ${(/** @type {object} */ attributes) =>
      html`<select ...${attributes} value=${value} onChange=${(/** @type {Typed} */ event) => onChange(event.currentTarget.value)}>
        ${options.map(([of, words]) => html`<option value=${of} selected=${of === value}>${words}</option>`)}
      </select>`}
  <//>`;
}

/** @param {{checked: boolean, onChange: () => void, children: unknown}} props */
export const Check = ({ checked, onChange, children }) =>
  html`<label class="check"><input type="checkbox" checked=${checked} onChange=${onChange} />${children}</label>`;

/**
 * A choice of two.
 * @param {{legend: string, name: string, value: boolean, words: [string, string], onChange: (value: boolean) => void}} props
 *   `words`: the labels of true and false
 */
export function Choice({ legend, name, value, words, onChange }) {
  return html`<fieldset class="choice">
    <legend class="hidden">${legend}</legend>
    ${[true, false].map(
      (of) =>
        html`<label><input type="radio" name=${name} checked=${value === of} onChange=${() => onChange(of)} />${words[of ? 0 : 1]}</label>`,
    )}
  </fieldset>`;
}

/**
 * A form that leaves validation to the server: a browser would reject numbers between a slider's steps. Only text that
 * isn't a number is rejected here, since its field would be left out.
 * @param {{label: string, className?: string, onSubmit: () => void, children: unknown}} props
 */
export function Form({ label, className = "", onSubmit, children }) {
  const submit = (/** @type {Event & {currentTarget: HTMLFormElement}} */ event) => {
    event.preventDefault();
    const inputs = [...event.currentTarget.querySelectorAll("input")];
    const unread = inputs.find((input) => input.validity.badInput);
    if (unread) unread.reportValidity();
    else onSubmit();
  };
  return html`<form class=${className} aria-label=${label} noValidate onSubmit=${submit}>${children}</form>`;
}

/**
 * A table that scrolls on narrow screens, also by keys.
 * @param {{label: string, columns: string[], children: unknown}} props a column of numbers begins with "#"; "" has buttons
 */
export const Table = (props) =>
  html`<${SortedTable} ...${props} sortable=${[]} order=${{ by: "", isDown: false }} onOrder=${() => {}} />`;

/**
 * A table that is sorted by the column whose heading is pressed. It scrolls like `Table`.
 * @param {{label: string, columns: string[], sortable: string[], order: {by: string, isDown: boolean},
 *   onOrder: (column: string) => void, children: unknown}} props `sortable`: columns without their "#"; `order`: the
 *   present one
 */
export function SortedTable({ label, columns, sortable, order, onOrder, children }) {
  const headOf = (/** @type {string} */ column) => {
    const words = column.replace(/^#/, "");
    const direction = words !== order.by ? "none" : order.isDown ? "descending" : "ascending";
    const sign = { none: "", ascending: " ↑", descending: " ↓" }[direction];
    const isSortable = sortable.includes(words);
    return html`<th scope="col" class=${words === column ? "" : "number"} aria-sort=${isSortable ? direction : undefined}>
      ${
        isSortable
          ? html`<button type="button" class="sort" onClick=${() => onOrder(words)}>${words}<span aria-hidden="true">${sign}</span></button>`
          : words || html`<span class="hidden">What to do</span>`
      }
    </th>`;
  };
  return html`<div class="scroll" tabindex="0" role="region" aria-label="${label}, as a table">
    <table>
      <thead>
        <tr>${columns.map(headOf)}</tr>
      </thead>
      <tbody>${children}</tbody>
    </table>
  </div>`;
}

/** @param {{tone?: string, children: unknown}} props `tone`: good, bad, busy or none */
export const Badge = ({ tone = "", children }) => html`<span class="badge ${tone}">${children}</span>`;

/** @param {{label: string, value: number, most: number}} props */
export function Bar({ label, value, most }) {
  return html`<progress aria-label=${label} value=${Math.min(value, most)} max=${most || 1}></progress>`;
}

/**
 * A button that asks for confirmation, since its action can't be undone.
 * @param {{label: string, sure: string, deed?: string, keep?: string, busy?: boolean, onSure: () => void}} props as
 *   those of `Confirm`
 */
export function Careful({ label, busy = false, ...about }) {
  const [isAsked, setAsked] = useState(false);
  return html`<button type="button" class="plain risky" disabled=${busy} onClick=${() => setAsked(true)}>${label}</button>
    ${isAsked ? html`<${Confirm} label=${label} ...${about} onClose=${() => setAsked(false)} />` : null}`;
}

/**
 * A question whether to go on.
 * @param {{label: string, sure: string, deed?: string, keep?: string, onClose: () => void, onSure: () => void}} props
 *   `deed` and `keep`: the labels of the buttons that go on and that don't
 */
export function Confirm({ label, sure, deed = label, keep = "Keep it", onClose, onSure }) {
  const dialog = useRef(/** @type {HTMLDialogElement | null} */ (null));
  // before the next key: after the paint, a quick Enter would press the button that asked
  useLayoutEffect(() => dialog.current?.showModal(), []);
  const close = () => dialog.current?.close();
  return html`<dialog ref=${dialog} aria-label="${label}?" onClose=${onClose}>
    <p>${sure}</p>
    <p class="row">
      <button
        type="button"
        class="danger"
        onClick=${() => {
          close();
          onSure();
        }}
      >
        ${deed}
      </button>
      <button type="button" class="plain" onClick=${close}>${keep}</button>
    </p>
  </dialog>`;
}

/**
 * A ref for the element that shows the item chosen in a list. The page scrolls to it if it is out of sight, once for
 * each choice, so that reading and typing in it aren't interrupted.
 * @param {string | null} chosen "": nothing; null: the list isn't loaded, so the choice is unknown
 */
export function useInSight(chosen) {
  const place = useRef(/** @type {HTMLElement | null} */ (null));
  const last = useRef(/** @type {string | null} */ (null));
  useEffect(() => {
    if (chosen === null || chosen === last.current) return;
    const hasBegun = last.current === null && scrollY > 0; // before the list was there
    last.current = chosen;
    const top = place.current?.getBoundingClientRect().top ?? 0;
    if (chosen && !hasBegun && (top < 0 || top > innerHeight / 2))
      place.current?.scrollIntoView({ block: "start" });
  }, [chosen]);
  return place;
}

/** @param {{warnings: string[]}} props */
export function Warnings({ warnings }) {
  return warnings.map(
    (warning) => html`<p class="warning"><span aria-hidden="true">⚠ </span>${sentence(warning)}</p>`,
  );
}
