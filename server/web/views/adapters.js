/** Adapters: the list with origins and versions in use, and upload by drop. */
import { listAdapters, madeAt, newestFirst, useSearch } from "../lib/adapters.js";
import { upload } from "../lib/api.js";
import { checked } from "../lib/expression.js";
import { html, useState } from "../lib/html.js";
import { ago, count, loss, plural } from "../lib/format.js";
import { useAction, useIsShown, useResource } from "../lib/resource.js";
import { go, to } from "../lib/route.js";
import { useStore } from "../lib/store.js";
import { Badge, Fault, Form, TextField, useInSight } from "../parts/basics.js";
import { DropZone } from "../parts/drop.js";
import { AdapterDetail, deleted } from "./adapter.js";

/** @param {{path: string[]}} props */
export function AdaptersView({ path }) {
  const adapters = useResource(listAdapters, [], 10);
  const [filter, setFilter] = useState("");
  const name = path.join("/"); // another project's has a slash
  const listed = useSearch(adapters.data, filter);
  const own = listed?.own ?? [];
  const shared = listed?.shared ?? [];
  // `Unlisted` shows and refreshes adapters that only the search finds
  const [ours, others] = [adapters.data?.own ?? [], adapters.data?.shared ?? []];
  // an adapter beyond the cut list may be the project's own although it isn't in the list
  const found = [...ours, ...(adapters.data?.isCut ? [] : others)].find((adapter) => adapter.name === name);
  const detail = useInSight(adapters.data ? name : null);
  const isLoading = !adapters.data && !adapters.problem;
  const gone = useStore(deleted);
  const matches = (/** @type {Adapter} */ adapter) => adapter.name.toLowerCase().includes(filter.toLowerCase());
  const [isNone, isUnmatched] = [!own.length && !shared.length, ![...own, ...shared].some(matches)];
  return html`<div class="row between">
      <h1>Adapters</h1>
      ${name ? html`<a class="button" href=${to("adapters")}>Upload</a>` : null}
    </div>
    <${Fault} problem=${adapters.problem} />
    <div class="sides list ${name ? "has-choice" : "has-none"}">
      <div>
        ${own.length + shared.length > 8 ? html`<${TextField} label="Find" type="search" value=${filter} onChange=${setFilter} />` : null}
        ${isLoading ? html`<p class="muted">Loading…</p>` : null}
        ${adapters.data ? html`<${Names} title="Your project's" adapters=${own.filter(matches)} chosen=${name} isCut=${adapters.data.isCut} />` : null}
        ${shared.length ? html`<${Names} title="Other projects', public" adapters=${shared.filter(matches)} chosen=${name} isCut=${adapters.data?.isCut ?? false} />` : null}
        ${adapters.data?.isCut ? html`<p><small>There are more than this page lists: find them by name.</small></p>` : null}
        ${adapters.data && isNone && !filter ? html`<p>None yet. <a href=${to("train", "new")}>Train one</a>, or upload one.</p>` : null}
        ${adapters.data && isUnmatched && filter ? html`<p>No adapter has “${filter}” in its name.</p>` : null}
      </div>
      <div class="detail ${name ? "chosen" : ""}" tabindex="-1" ref=${detail}>
        ${name ? html`<p class="back"><a href=${to("adapters")}>‹ All adapters</a></p>` : null}
        ${gone && !name ? html`<p class="done" role="status">${gone} was deleted.</p>` : null}
        ${
          found
            ? html`<${AdapterDetail} key=${name} adapter=${found} isOwn=${ours.includes(found)} onChange=${adapters.reload} />`
            : name && adapters.data
              ? html`<${Unlisted} key=${name} name=${name} />`
              : null
        }
        ${
          name
            ? null
            : html`<${Upload}
                onDone=${() => {
                  setFilter("");
                  return adapters.reload();
                }}
              />`
        }
      </div>
    </div>`;
}

/** An adapter that may be beyond the page's cut list, by its name. @param {{name: string}} props */
function Unlisted({ name }) {
  const { data, problem, reload } = useResource((signal) => listAdapters(signal, { name }), [name], 10);
  const found = data?.own[0] ?? data?.shared[0];
  if (!data) return html`<${Fault} problem=${problem} />`;
  return found
    ? html`<${AdapterDetail} adapter=${found} isOwn=${found === data.own[0]} onChange=${reload} />`
    : html`<div class="card"><p>There is no adapter ${name}, or none that you may see.</p></div>`;
}

/** @param {{title: string, adapters: Adapter[], chosen: string, isCut: boolean}} props */
function Names({ title, adapters, chosen, isCut }) {
  return html`<h2>${title} <small>${isCut ? `the first ${count(adapters.length)}` : count(adapters.length)}</small></h2>
    <ul class="names">
      ${adapters.map(
        (adapter) =>
          html`<li key=${adapter.name}>
            <a href=${to("adapters", ...adapter.name.split("/"))} aria-current=${adapter.name === chosen ? "true" : undefined}>
              <span class="name">${adapter.name}</span>
              <${Facts} adapter=${adapter} />
              ${adapter.kind === "composition" ? html`<${Badge}>blend<//>` : null}
              ${adapter.visibility === "public" ? html`<${Badge}>public<//>` : null}
              ${adapter.resident ? html`<${Badge} tone="good">in memory<//>` : null}
            </a>
          </li>`,
      )}
    </ul>`;
}

/** What tells adapters apart. @param {{adapter: Adapter}} props */
function Facts({ adapter }) {
  const held = newestFirst(adapter).find(({ version }) => version === adapter.latest)?.metrics["eval_loss"];
  return html`<small>
    ${[
      plural(adapter.versions.length, "version"),
      ...(held === undefined ? [] : [`held-out loss ${loss(held)}`]),
      madeAt(adapter) ? ago(madeAt(adapter)) : "",
    ]
      .filter(Boolean)
      .join(" · ")}
  </small>`;
}

const CONFIG = /adapter_config.*\.json$/;
const WEIGHTS = /\.safetensors$/;
const OWN_WEIGHTS = /adapter_model.*\.safetensors$/; // a folder may have other weights, too
const ARCHIVE = /\.zip$/;

/** @param {File[]} files */
const configOf = (files) => files.findLast((file) => CONFIG.test(file.name));

/** @param {File[]} files */
const weightsOf = (files) =>
  files.findLast((file) => OWN_WEIGHTS.test(file.name)) ?? files.findLast((file) => WEIGHTS.test(file.name));

/** @param {File[]} files @returns {FormData | null} null: not an adapter's files as PEFT saves them */
function formOf(files) {
  const form = new FormData();
  const archive = files.find((file) => ARCHIVE.test(file.name));
  const [config, weights] = [configOf(files), weightsOf(files)];
  if (archive && files.length === 1) form.append("archive", archive);
  else if (config && weights) {
    form.append("adapter_config", config);
    form.append("adapter_model", weights);
  } else return null;
  return form;
}

/** @param {{onDone: () => void}} props */
function Upload({ onDone }) {
  const [name, setName] = useState("");
  const [files, setFiles] = useState(/** @type {File[]} */ ([]));
  const [share, setShare] = useState(/** @type {number | null} */ (null));
  const isShown = useIsShown();
  const send = useAction(async () => {
    const form = formOf(files);
    if (!form) return;
    setShare(0);
    try {
      const version = await upload(`/adapters/${checked(name)}`, form, setShare);
      setFiles([]);
      onDone();
      if (isShown()) go("adapters", version.name);
    } finally {
      setShare(null);
    }
  });
  const isComplete = formOf(files) !== null;
  /** @param {File[]} dropped one or more files, or everything that PEFT and trainers put into a folder */
  const add = (dropped) => {
    send.clear();
    const archive = dropped.findLast((file) => ARCHIVE.test(file.name));
    const parts = [configOf(dropped) ?? configOf(files), weightsOf(dropped) ?? weightsOf(files)].filter(
      (file) => file !== undefined,
    );
    const isPair = configOf(dropped) && weightsOf(dropped);
    setFiles(archive && !isPair ? [archive] : parts.length ? parts : dropped.slice(-2));
  };
  return html`<${Form} label="Upload" className="card" onSubmit=${send.run}>
    <h2>Upload</h2>
    <${DropZone}
      label="Drop a PEFT adapter here, or choose its files"
      hint="adapter_config.json and adapter_model.safetensors, or one zip of both"
      accept=".json,.safetensors,.zip"
      multiple
      chosen=${files.map((file) => file.name).join(", ")}
      share=${share}
      onFiles=${add}
    />
    ${
      files.length && !isComplete
        ? html`<p class="warning" role="status">
          ${files.some((file) => CONFIG.test(file.name)) ? "adapter_model.safetensors is missing." : files.some((file) => WEIGHTS.test(file.name)) ? "adapter_config.json is missing." : "These aren't the files of an adapter that PEFT saved."}
        </p>`
        : null
    }
    <${TextField} label="Name" name="name" problem=${send.problem} hint="A name that exists gets a new version." value=${name} onChange=${setName} />
    <button type="submit" disabled=${!isComplete || !name || send.busy}>Upload</button>
    <${Fault} problem=${send.problem} beside=${["name"]} />
  <//>`;
}
