/** Which adapters, how much of each: sliders, and the expression that they make. Either changes the other. */
import { format, parse } from "../lib/expression.js";
import { newestFirst, useSearch, versionOf } from "../lib/adapters.js";
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
  const unused = matching.filter((adapter) => !used.has(adapter.name)).slice(0, SHOWN);

  /** @param {number} place of a term, or after the last @param {Term | null} term null: take it out */
  function change(place, term) {
    const next = [...(terms ?? [])];
    next.splice(place, 1, ...(term ? [term] : []));
    onChange(format(next));
  }

  // terms come first, so that a filter can't hide them
  const rows = (terms ?? []).map((term, place) => {
    const adapter = seen.current.get(term.name);
    const isOnly = terms?.filter((other) => other.name === term.name).length === 1;
    const nth = terms?.slice(0, place).filter((other) => other.name === term.name).length; // the first keeps its row
    const label = isOnly || !term.pin ? term.name : `${term.name}@${term.pin}`;
    return adapter
      ? html`<${Row} key=${nth ? `${term.name} ${nth}` : term.name} adapter=${adapter} label=${label} term=${term} further=${furtherOf(adapter, terms ?? [])} change=${(/** @type {Term | null} */ next) => change(place, next)} onAdd=${(/** @type {Term} */ next) => change(terms?.length ?? 0, next)} />`
      : null;
  });
  for (const adapter of unused)
    rows.push(
      html`<${Row} key=${adapter.name} adapter=${adapter} label=${adapter.name} term=${null} change=${(/** @type {Term | null} */ next) => change(terms?.length ?? 0, next)} />`,
    );
  return html`${
    all.length > SHOWN
      ? html`<${TextField} label="Find" type="search" value=${filter} onChange=${setFilter} onEnter=${() => {}} />`
      : null
  }
    ${
      all.length
        ? html`<ul class="blend">
      ${rows}
    </ul>`
        : null
    }
    ${adapters && all.length && !matching.length ? html`<p>No adapter has “${filter}” in its name.</p>` : null}
    ${unused.length + used.size < all.length || adapters?.isCut ? html`<small>More exist: find them by name, or write them below.</small>` : null}
    <${TextField} label="Expression" name="adapter" problem=${problem} hint="Weight 1 = as trained, 0 = off. Leave empty for the base model."
      className="code" placeholder="base" value=${value} onChange=${onChange} />`;
}

/** The newest version that no term means; undefined: all are there. @param {Adapter} adapter @param {Term[]} terms */
const furtherOf = (adapter, terms) =>
  newestFirst(adapter).find((version) =>
    terms.every(({ name, pin }) => name !== adapter.name || versionOf(adapter, pin) !== version),
  );

/**
 * @param {{adapter: Adapter, label: string, term: Term | null, further?: Version | undefined,
 *   change: (term: Term | null) => void, onAdd?: (term: Term) => void}} props `further`: a version that may be added
 */
function Row({ adapter, label, term, further, change, onAdd }) {
  const { name } = adapter;
  return html`<li class=${term ? "used" : ""}>
    <label class="check">
      <input type="checkbox" checked=${term !== null} onChange=${() => change(term ? null : { name, pin: "", weight: 1 })} />
      <span class="name">${label}</span>
      ${adapter.kind === "composition" ? html`<${Badge}>blend<//>` : null}
    </label>
    ${
      term
        ? html`<select aria-label="Version of ${label}" value=${term.pin} onChange=${(/** @type {Typed} */ event) => change({ ...term, pin: event.currentTarget.value })}>
            <option value="" selected=${term.pin === ""}>in use (${adapter.latest})</option>
            ${Object.keys(adapter.aliases).map((alias) => html`<option value=${alias} selected=${term.pin === alias}>${alias} (${adapter.aliases[alias]})</option>`)}
            ${newestFirst(adapter).map(({ version }) => html`<option value=${String(version)} selected=${term.pin === String(version)}>version ${version}</option>`)}
          </select>
          <${Slider} label=${label} weight=${term.weight} onChange=${(/** @type {number} */ weight) => change({ ...term, weight })} />
          ${further && onAdd ? html`<button type="button" class="link more" aria-label="Add version ${further.version} of ${name}" onClick=${() => onAdd({ name, pin: String(further.version), weight: 1 })}>Add version ${further.version}</button>` : null}`
        : null
    }
  </li>`;
}

const [LEAST, MOST] = [-1, 2];

/**
 * A weight as a slider, filled from 0, and as a number. The slider's ends follow a weight beyond them; a double click sets 1.
 * @param {{label: string, weight: number, onChange: (weight: number) => void}} props
 */
function Slider({ label, weight, onChange }) {
  const set = (/** @type {Typed} */ event) => {
    if (event.currentTarget.value !== "") onChange(event.currentTarget.valueAsNumber);
  };
  const [least, most] = [Math.min(LEAST, Math.floor(weight)), Math.max(MOST, Math.ceil(weight))];
  const share = (/** @type {number} */ of) => (of - least) / (most - least);
  const places = {
    "--zero": share(0),
    "--one": share(1),
    "--from": share(Math.min(0, weight)),
    "--to": share(Math.max(0, weight)),
  };
  return html`<div class="slider" style=${places}>
      <input type="range" min=${least} max=${most} step="0.05" value=${weight} aria-label="Weight of ${label}" onInput=${set} onDblClick=${() => onChange(1)} />
      <span class="tick zero" aria-hidden="true">0</span>
      <span class="tick one" aria-hidden="true">1</span>
    </div>
    <input type="number" min="-100" max="100" step="0.05" value=${weight} aria-label="Weight of ${label}, as a number" onInput=${set} />`;
}
