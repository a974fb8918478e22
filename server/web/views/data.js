/** Data sets: the list, and the rows of one, with search, lengths, duplicates and sides of the split. */
import { get } from "../lib/api.js";
import { MOST_ROWS, allRows, pathOf, send } from "../lib/datasets.js";
import { bytes, count, moment, plural } from "../lib/format.js";
import { html, useEffect, useState } from "../lib/html.js";
import { filled } from "../lib/job_form.js";
import { useAction, useIsShown, useResource } from "../lib/resource.js";
import { go, to } from "../lib/route.js";
import { SAMPLE_ROWS } from "../lib/sample_rows.js";
import { Badge, Check, Fault, Table, TextField } from "../parts/basics.js";

const PAGE = 50;
const MOST_LETTERS = 300;
const TYPING = 200; // ms

/** @param {{id: string | undefined, jobs: Job[] | null}} props */
export function Data({ id, jobs }) {
  return id ? html`<${Rows} key=${id} id=${id} />` : html`<${Sets} jobs=${jobs ?? []} />`;
}

/** @param {{jobs: Job[]}} props */
function Sets({ jobs }) {
  const sets = useResource(
    async (signal) => /** @type {DataSet[]} */ ((await get("/datasets", signal)).datasets),
    [],
  );
  const isShown = useIsShown();
  const sample = useAction(async () => {
    const stored = await send(SAMPLE_ROWS, "http-codes.jsonl");
    if (isShown()) go("train", "data", stored.id);
  });
  return html`<section class="card" aria-label="Data sets">
    <h2>Data sets</h2>
    <${Fault} problem=${sets.problem ?? sample.problem} />
    ${sets.data || sets.problem ? null : html`<p class="muted">Loading…</p>`}
    ${
      sets.data?.length === 0
        ? html`<p>None yet. <a href=${to("train", "new")}>Upload rows</a>, or begin with sample rows: what HTTP status codes mean.</p>
            <button type="button" disabled=${sample.busy} onClick=${() => sample.run()}>Use sample rows</button>`
        : null
    }
    ${
      sets.data?.length
        ? html`<${Table} label="Data sets" columns=${["Name", "#Rows", "Kinds", "#Size", "Made", "#Jobs"]}>
            ${sets.data.map(
              (set) =>
                html`<tr key=${set.id}>
                  <th scope="row"><a href=${to("train", "data", set.id)}>${set.filename ?? set.id}</a></th>
                  <td class="number">${count(set.rows)}</td>
                  <td>${Object.keys(set.kinds).join(", ")}</td>
                  <td class="number">${bytes(set.bytes)}</td>
                  <td>${moment(set.created_at)}</td>
                  <td class="number">${count(jobs.filter(({ config }) => config.dataset === set.id).length)}</td>
                </tr>`,
            )}
          <//>`
        : null
    }
  </section>`;
}

/** @param {{id: string}} props */
function Rows({ id }) {
  const path = pathOf(id);
  const [text, setText] = useState("");
  const [offset, setOffset] = useState(0);
  const [excluded, setExcluded] = useState(/** @type {Set<number>} */ (new Set()));
  const set = useResource(async (signal) => /** @type {DataSet} */ (await get(path, signal)), [id]);
  const rows = useResource(
    async (signal) => {
      if (text) await new Promise((resolve) => setTimeout(resolve, TYPING));
      signal.throwIfAborted();
      const query = new URLSearchParams({ offset: String(offset), limit: String(PAGE), q: text });
      return /** @type {DatasetRows} */ (await get(`${path}/rows?${query}`, signal));
    },
    [id, text, offset],
  );
  const [found, setFound] = useState(rows.data); // kept while the next page is loading
  useEffect(() => {
    if (rows.data) setFound(rows.data);
  }, [rows.data]);
  const isShown = useIsShown();
  const exclude = useAction(async () => {
    const kept = (await allRows(id)).filter(({ index }) => !excluded.has(index)).map(({ row }) => row);
    const name = (set.data?.filename ?? "rows").replace(/\.\w+$/, "");
    const stored = await send(kept, `${name}-${kept.length}-rows.jsonl`);
    if (isShown()) go("train", "data", stored.id);
  });
  const toggle = (/** @type {number} */ index) => {
    const next = new Set(excluded);
    if (!next.delete(index)) next.add(index);
    setExcluded(next);
  };
  const last = Math.min(offset + PAGE, found?.count ?? 0);
  return html`<section class="card" aria-label="Rows">
    <p><a href=${to("train", "data")}>‹ All data sets</a></p>
    <div class="row between">
      <h2 class="big">${set.data?.filename ?? id}</h2>
      <button
        type="button"
        onClick=${() => {
          filled.update({ dataset: id });
          go("train", "new");
        }}
      >
        Train on these rows
      </button>
    </div>
    <${Fault} problem=${set.problem ?? rows.problem ?? exclude.problem} />
    ${set.data && found ? html`<p>${plural(set.data.rows, "row")}, ${plural(found.duplicates, "duplicate")}, ${bytes(set.data.bytes)}</p>` : null}
    <${TextField}
      label="Search in rows"
      type="search"
      value=${text}
      onChange=${(/** @type {string} */ value) => {
        setText(value);
        setOffset(0);
      }}
      onEnter=${() => {}}
    />
    ${found || rows.problem ? null : html`<p class="muted">Loading…</p>`}
    ${found?.count === 0 ? html`<p>No row has “${text}” in it.</p>` : null}
    ${
      found?.count
        ? html`<${Table} label="Rows" columns=${["#Row", "Text", "#Tokens", "Used for", "Exclude"]}>
            ${found.rows.map((one) => html`<${OneRow} key=${one.index} row=${one} isExcluded=${excluded.has(one.index)} onToggle=${() => toggle(one.index)} />`)}
          <//>`
        : null
    }
    <p class="row">
      <button type="button" class="plain" disabled=${!offset} onClick=${() => setOffset(Math.max(0, offset - PAGE))}>Previous</button>
      <span>${found?.count ? `${count(offset + 1)}–${count(last)} of ${count(found.count)}` : null}</span>
      <button type="button" class="plain" disabled=${!found || last >= found.count} onClick=${() => setOffset(offset + PAGE)}>Next</button>
    </p>
    ${
      excluded.size
        ? html`<p class="row" role="status">
            ${plural(excluded.size, "row")} excluded.
            <button type="button" disabled=${exclude.busy || !set.data || set.data.rows > MOST_ROWS || excluded.size >= set.data.rows} onClick=${() => exclude.run()}>Make a data set without ${excluded.size === 1 ? "it" : "them"}</button>
            ${set.data && set.data.rows > MOST_ROWS ? html`<small>Only for up to ${count(MOST_ROWS)} rows.</small>` : null}
          </p>`
        : null
    }
  </section>`;
}

/** @param {{row: DatasetRow, isExcluded: boolean, onToggle: () => void}} props */
function OneRow({ row: { index, row, tokens, split, copies }, isExcluded, onToggle }) {
  return html`<tr class=${isExcluded ? "excluded" : ""}>
    <th scope="row" class="number">${count(index + 1)}</th>
    <td class="wraps" dir="auto">${partsOf(row).map(([name, text]) => html`<div><small>${name}</small> ${text.length > MOST_LETTERS ? `${text.slice(0, MOST_LETTERS)}…` : text}</div>`)}</td>
    <td class="number">${count(tokens)}</td>
    <td>
      ${split === "validation" ? html`<${Badge} tone="busy">validation<//>` : "training"}
      ${copies > 1 ? html` <${Badge}>${count(copies)} copies<//>` : null}
    </td>
    <td><${Check} checked=${isExcluded} onChange=${onToggle}><span class="hidden">Exclude row ${index + 1}</span><//></td>
  </tr>`;
}

/** A row's texts and their names. @param {Record<string, any>} row @returns {[string, string][]} */
function partsOf(row) {
  if (Array.isArray(row["messages"]))
    return row["messages"].map((/** @type {any} */ turn) => [turn.role, String(turn.content)]);
  return Object.entries(row).map(([name, value]) => [
    name,
    typeof value === "string" ? value : JSON.stringify(value),
  ]);
}
