/** Adapters: the list with origins and versions in use, and upload by drop. */
import { listAdapters, useSearch } from "../lib/adapters.js";
import { upload } from "../lib/api.js";
import { checked } from "../lib/expression.js";
import { html, useState } from "../lib/html.js";
import { plural } from "../lib/format.js";
import { useAction, useIsShown, useResource } from "../lib/resource.js";
import { go, to } from "../lib/route.js";
import { Badge, Fault, Form, TextField, useInSight } from "../parts/basics.js";
import { DropZone } from "../parts/drop.js";
import { AdapterDetail } from "./adapter.js";

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
  const matches = (/** @type {Adapter} */ adapter) => adapter.name.toLowerCase().includes(filter.toLowerCase());
  return html`<h1>Adapters</h1>
    <${Fault} problem=${adapters.problem} />
    <div class="sides list">
      <div>
        ${
          own.length + shared.length > 8
            ? html`<${TextField} label="Find" type="search" value=${filter} onChange=${setFilter} />`
            : null
        }
        <${Names} title="Your project's" adapters=${own.filter(matches)} chosen=${name} />
        ${shared.length ? html`<${Names} title="Other projects', public" adapters=${shared.filter(matches)} chosen=${name} />` : null}
        ${adapters.data?.isCut ? html`<p><small>There are more than this page lists: find them by name.</small></p>` : null}
        ${
          adapters.data && !own.length && !shared.length
            ? html`<p>None yet. <a href=${to("train", "new")}>Train one</a>, or upload one below.</p>`
            : null
        }
      </div>
      <div class="detail ${name ? "chosen" : ""}" tabindex="-1" ref=${detail}>
        ${
          found
            ? html`<${AdapterDetail} key=${name} adapter=${found} isOwn=${ours.includes(found)} onChange=${adapters.reload} />`
            : name && adapters.data
              ? html`<${Unlisted} key=${name} name=${name} />`
              : own.length
                ? html`<div class="card"><p>Choose an adapter to see its versions and where they come from.</p></div>`
                : null
        }
      </div>
      <div class="below"><${Upload} onDone=${adapters.reload} /></div>
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

/** @param {{title: string, adapters: Adapter[], chosen: string}} props */
function Names({ title, adapters, chosen }) {
  return html`<h2>${title}</h2>
    <ul class="names">
      ${adapters.map(
        (adapter) =>
          html`<li>
            <a href=${to("adapters", ...adapter.name.split("/"))} aria-current=${adapter.name === chosen ? "true" : undefined}>
              <span class="name">${adapter.name}</span>
              <small>${plural(adapter.versions.length, "version")}</small>
              ${adapter.kind === "composition" ? html`<${Badge}>blend<//>` : null}
              ${adapter.visibility === "public" ? html`<${Badge}>public<//>` : null}
              ${adapter.resident ? html`<${Badge} tone="good">in memory<//>` : null}
            </a>
          </li>`,
      )}
    </ul>`;
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
