/** Which adapters, how much of each: sliders, and the expression that they make. Either changes the other. */
import { format, parse } from "../lib/expression.js";
import { newestFirst, useSearch } from "../lib/adapters.js";
import { html, useRef, useState } from "../lib/html.js";
import { Badge, TextField } from "./basics.js";

/** @import { Listed } from "../lib/adapters.js" */
/** @import { Problem } from "../lib/api.js" */
/** @import { Typed } from "./basics.js" */
/** @import { Term } from "../lib/expression.js" */

const SHOWN = 12;

/**
 * @param {{adapters: Listed | null, value: string, problem: Problem | null, onChange: (expression: string) => void}} props
 */
export function Blend({ adapters, value, problem, onChange }) {
  const [filter, setFilter] = useState("");
  const terms = parse(value);
  const listed = useSearch(adapters, filter);
  const all = listed ? [...listed.own, ...listed.shared] : [];
  const seen = useRef(/** @type {Map<string, Adapter>} */ (new Map()));
  for (const adapter of all) seen.current.set(adapter.name, adapter);
  const used = new Set((terms ?? []).map((term) => term.name));
  const matching = all.filter((adapter) => adapter.name.toLowerCase().includes(filter.toLowerCase()));
  // adapters in use come first, so that a filter can't hide them
  const rows = [
    ...[...seen.current.values()].filter((adapter) => used.has(adapter.name)),
    ...matching.filter((adapter) => !used.has(adapter.name)).slice(0, SHOWN),
  ];

  /** @param {string} name @param {Partial<Term> | null} change null: take it out */
  function change(name, change) {
    const next = [...(terms ?? [])];
    const place = next.findIndex((term) => term.name === name); // of two versions the first one's
    const term = next[place] ?? { name, pin: "", weight: 1 };
    next.splice(place < 0 ? next.length : place, 1, ...(change ? [{ ...term, ...change }] : []));
    onChange(format(next));
  }

  return html`${
    all.length > SHOWN
      ? html`<${TextField} label="Find" type="search" value=${filter} onChange=${setFilter} onEnter=${() => {}} />`
      : null
  }
    <datalist id="weights"><option value="-1"></option><option value="0"></option><option value="1"></option><option value="2"></option></datalist>
    ${
      all.length
        ? html`<ul class="blend">
      ${rows.map(
        (adapter) =>
          html`<${Row} key=${adapter.name} adapter=${adapter} term=${(terms ?? []).find((term) => term.name === adapter.name) ?? null} change=${change} />`,
      )}
    </ul>`
        : null
    }
    ${rows.length < all.length || adapters?.isCut ? html`<small>More exist: find them by name, or write them below.</small>` : null}
    <${TextField} label="Expression" name="adapter" problem=${problem} hint="Strength 1 is the adapter as trained, 0 is without it. Empty means the base."
      className="code" placeholder="base" value=${value} onChange=${onChange} />`;
}

/**
 * @param {{adapter: Adapter, term: Term | null, change: (name: string, change: Partial<Term> | null) => void}} props
 */
function Row({ adapter, term, change }) {
  const { name } = adapter;
  const weight = term?.weight ?? 1;
  const set = (/** @type {Typed} */ event) => {
    if (event.currentTarget.value !== "") change(name, { weight: event.currentTarget.valueAsNumber });
  };
  return html`<li class=${term ? "used" : ""}>
    <label class="check">
      <input type="checkbox" checked=${term !== null} onChange=${() => change(name, term ? null : {})} />
      <span class="name">${name}</span>
      ${adapter.kind === "composition" ? html`<${Badge}>blend<//>` : null}
    </label>
    ${
      term
        ? html`<select aria-label="Version of ${name}" value=${term.pin} onChange=${(/** @type {Typed} */ event) => change(name, { pin: event.currentTarget.value })}>
            <option value="" selected=${term.pin === ""}>latest (${adapter.latest})</option>
            ${Object.keys(adapter.aliases).map((alias) => html`<option value=${alias} selected=${term.pin === alias}>${alias} (${adapter.aliases[alias]})</option>`)}
            ${newestFirst(adapter).map(({ version }) => html`<option value=${String(version)} selected=${term.pin === String(version)}>version ${version}</option>`)}
          </select>
          <input type="range" min="-1" max="2" step="0.05" list="weights" value=${weight} aria-label="Weight of ${name}" onInput=${set} />
          <input type="number" min="-100" max="100" step="0.05" value=${weight} aria-label="Weight of ${name}, as a number" onInput=${set} />`
        : null
    }
  </li>`;
}
