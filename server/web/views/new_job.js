/** A new job: rows with their faults by line, a preview of trained tokens, and settings. */
import { listAdapters } from "../lib/adapters.js";
import { ask, get, upload } from "../lib/api.js";
import { count, duration, plural } from "../lib/format.js";
import { html, useState } from "../lib/html.js";
import { BLANK, FURTHER, bodyOf, fieldsOf, filled, furtherOf, unshownOf, withFurther } from "../lib/job_form.js";
import { useAction, useIsShown, useResource } from "../lib/resource.js";
import { go, to } from "../lib/route.js";
import { key, perKey } from "../lib/session.js";
import { useStore } from "../lib/store.js";
import { Careful, Fault, Form, NumberField, SelectField, TextField, Warnings } from "../parts/basics.js";
import { Split } from "../parts/card.js";
import { DropZone } from "../parts/drop.js";
import { Settings } from "../parts/settings.js";

/** @import { Fields } from "../lib/job_form.js" */

/** @type {(keyof Fields)[]} */
const MORE = [
  "method",
  "startFrom",
  "rank",
  "alpha",
  "learningRate",
  "batchSize",
  "evalSteps",
  "publishIf",
  "rest",
];

/** Sent bodies without an answer yet, and their idempotency keys. @type {import("../lib/store.js").Store<Map<string, string>>} */
const sent = perKey(new Map());

const BESIDE = [
  "name",
  "dataset",
  "rank",
  "alpha",
  "epochs",
  "learning_rate",
  "batch_size",
  "validation",
  "eval_steps",
  "start_from",
  "publish_if",
  "method",
  ...FURTHER.map(({ name }) => name),
];

/** @param {{onQueued: () => void}} props */
export function NewJob({ onQueued }) {
  const kept = useStore(filled);
  const [dry, setDry] = useState(/** @type {DryRun | null} */ (null));
  const datasets = useResource(
    async (signal) => /** @type {DataSet[]} */ ((await get("/datasets", signal)).datasets),
    [],
  );
  const adapters = useResource(listAdapters, []);
  const startable = (adapters.data?.own ?? []).filter((adapter) => adapter.kind === "adapter");
  const form = { ...kept };
  // the chosen data set may be deleted meanwhile
  if (datasets.data?.every((set) => set.id !== form.dataset)) form.dataset = "";
  if (adapters.data && !adapters.data.isCut && !startable.some((adapter) => isOf(adapter, form.startFrom)))
    form.startFrom = "";
  const names = startable.map((adapter) => adapter.name);
  // show the value that would be sent, also while the list is loading
  if (form.startFrom && !names.includes(form.startFrom)) names.unshift(form.startFrom);
  const change = (/** @type {keyof Fields} */ name) => (/** @type {any} */ value) => {
    filled.update({ [name]: value });
    setDry(null);
  };
  const check = useAction(async () => {
    const json = bodyOf({ ...form, name: form.name || "unnamed" });
    const found = await ask("POST", "/train?dry_run=true", { json });
    if (filled.value === kept) setDry(found);
  });
  const isShown = useIsShown();
  const submit = useAction(async () => {
    // sending the same body again, as after a lost answer, gives the same job
    const json = JSON.stringify(bodyOf(form));
    const request = sent.value.get(json) ?? crypto.randomUUID?.() ?? String(Math.random());
    sent.set(new Map([...sent.value, [json, request]]));
    const job = await ask("POST", "/train", { json: bodyOf(form), headers: { "Idempotency-Key": request } });
    sent.set(new Map([...sent.value].filter(([body]) => body !== json)));
    if (filled.value === kept) filled.set(BLANK);
    onQueued();
    if (isShown()) go("train", job.id);
  });
  const problem = submit.problem ?? check.problem;
  const hasRows = Boolean(form.dataset || form.rest["data"]);
  const isReady = Boolean(form.name && hasRows);
  const unshown = unshownOf(form);
  // don't hide fields that have a value
  const [hasMore] = useState(() => MORE.some((name) => form[name] !== BLANK[name]));
  return html`<${Form} label="New job" className="card" onSubmit=${() => {
    check.clear();
    void submit.run();
  }}>
    <h2>1. Rows</h2>
    <${Rows} datasets=${datasets.data} chosen=${form.dataset} problem=${problem} onChoose=${change("dataset")} onChanged=${datasets.reload} />
    <${Fault} problem=${datasets.problem} />
    <h2>2. Adapter</h2>
    <div class="fields">
      <${TextField} label="Name" name="name" problem=${problem} hint="A name that exists gets a new version." value=${form.name} onChange=${change("name")} />
      <${NumberField} label="Epochs" name="epochs" hint="times through the rows" placeholder="auto" step="1" value=${form.epochs} problem=${problem} onChange=${change("epochs")} />
      <${NumberField} label="Validation share" name="validation" hint="rows kept aside to measure, e.g. 0.1" placeholder="0.1" value=${form.validation} problem=${problem} onChange=${change("validation")} />
    </div>
    <details open=${hasMore}>
      <summary>More settings</summary>
      <div class="fields">
        <${SelectField} label="Method" name="method" value=${form.method} problem=${problem} options=${[
          ["lora", "LoRA"],
          ["full", "full fine-tuning: to compare with, never published"],
        ]} onChange=${change("method")} />
        ${
          adapters.data?.isCut
            ? html`<${TextField} label="Start from" name="start_from" hint="an adapter's name; empty: a new one" value=${form.startFrom} problem=${problem} onChange=${change("startFrom")} />`
            : html`<${SelectField} label="Start from" name="start_from" value=${form.startFrom} problem=${problem} options=${[["", "a new adapter"], ...names.map((name) => [name, name])]} onChange=${change("startFrom")} />`
        }
        <${NumberField} label="Rank" name="rank" hint="capacity of the adapter" placeholder="16" step="1" value=${form.rank} problem=${problem} onChange=${change("rank")} />
        <${NumberField} label="Alpha" name="alpha" hint="its strength is alpha / rank" placeholder="32" value=${form.alpha} problem=${problem} onChange=${change("alpha")} />
        <${NumberField} label="Learning rate" name="learning_rate" placeholder=${form.method === "full" ? "0.00003" : "0.001"} value=${form.learningRate} problem=${problem} onChange=${change("learningRate")} />
        <${NumberField} label="Batch size" name="batch_size" hint="rows a step" placeholder="8" step="1" value=${form.batchSize} problem=${problem} onChange=${change("batchSize")} />
        <${NumberField} label="Evaluate every (steps)" name="eval_steps" hint="and keep the best checkpoint" placeholder="at the end" step="1" value=${form.evalSteps} problem=${problem} onChange=${change("evalSteps")} />
        <${SelectField} label="Publish" name="publish_if" value=${form.publishIf} problem=${problem} options=${[
          ["always", "always"],
          ["improves_base", "if better than the base"],
          ["improves_latest", "if better than the latest version"],
          ["not_worse", "unless worse than the latest version"],
        ]} onChange=${change("publishIf")} />
      </div>
      <div class="fields">
        ${FURTHER.map((setting) => html`<${Further} key=${setting.name} setting=${setting} form=${form} problem=${problem} onChange=${change("rest")} />`)}
      </div>
      ${
        !Object.keys(unshown).length
          ? null
          : html`<h3>Also as in the earlier job</h3>
            <${Settings} config=${unshown} />
            <button type="button" class="plain" onClick=${() => change("rest")(BLANK.rest)}>Leave these out</button>`
      }
    </details>
    <${RequestJson} body=${bodyOf(form)} onChange=${(/** @type {Record<string, any>} */ body) => {
      filled.set(fieldsOf(body));
      setDry(null);
    }} />
    <${Fault} problem=${problem} beside=${BESIDE} />
    <p class="row">
      <button type="button" class="plain" disabled=${!hasRows || check.busy} onClick=${() => {
        submit.clear();
        void check.run();
      }}>Dry run: see what would be learned</button>
      <button type="submit" disabled=${!isReady || submit.busy}>Train</button>
      ${isReady ? null : html`<small>${hasRows ? "A name is needed." : "Rows are needed."}</small>`}
    </p>
    ${dry ? html`<${Preview} dry=${dry} />` : null}
  <//>`;
}

/**
 * @param {{datasets: DataSet[] | null, chosen: string, problem: import("../lib/api.js").Problem | null,
 *   onChoose: (id: string) => void, onChanged: () => Promise<void>}} props
 */
function Rows({ datasets, chosen, problem, onChoose, onChanged }) {
  const [share, setShare] = useState(/** @type {number | null} */ (null));
  const [warnings, setWarnings] = useState(/** @type {string[]} */ ([]));
  const [file, setFile] = useState("");
  const [uploaded, setUploaded] = useState(""); // the data set that `file` and `warnings` belong to
  const send = useAction(async (/** @type {File} */ file) => {
    const form = new FormData();
    form.append("file", file);
    setShare(0);
    setWarnings([]);
    setFile(file.name);
    setUploaded("");
    const own = key.value;
    try {
      const stored = await upload("/datasets", form, setShare);
      setWarnings(stored.warnings);
      setFile(`${file.name}: ${plural(stored.rows, "row")}, all well formed`);
      setUploaded(stored.id);
      await onChanged();
      if (key.value === own) onChoose(stored.id);
    } finally {
      setShare(null);
    }
  });
  const remove = useAction(async (/** @type {string} */ id) => {
    try {
      await ask("DELETE", `/datasets/${encodeURIComponent(id)}`);
      if (filled.value.dataset === id) onChoose("");
      if (uploaded !== id) return;
      setFile("");
      setWarnings([]);
    } finally {
      await onChanged(); // also if it was deleted already
    }
  });
  const listed = (datasets ?? []).map((set) => [set.id, `${set.filename ?? set.id} · ${plural(set.rows, "row")}`]);
  // reserve the list's space before it is loaded, so that the fields below don't move
  if (chosen && !datasets) listed.push([chosen, chosen]);
  const words = listed.find(([id]) => id === chosen)?.[1];
  return html`<${DropZone}
      label="Drop a JSONL or CSV file here, or choose one"
      hint='One row a line: {"prompt": …, "completion": …}, {"messages": […]} or {"text": …}; a CSV has these as columns.'
      accept=".jsonl,.csv,.json,.txt"
      chosen=${send.problem ? `${file} was not taken:` : file}
      share=${share}
      onFiles=${(/** @type {File[]} */ files) => files[0] && send.run(files[0])}
    />
    <${Fault} problem=${send.problem} />
    <${Warnings} warnings=${warnings} />
    <div class="row end">
      <${SelectField}
        label="Data set"
        name="dataset"
        value=${chosen}
        className="wide"
        problem=${problem}
        options=${[["", datasets?.length === 0 ? "none yet" : "choose one"], ...listed]}
        onChange=${(/** @type {string} */ id) => {
          remove.clear();
          onChoose(id);
        }}
      />
      ${chosen ? html`<a class="beside" href=${to("train", "data", chosen)}>Look at the rows</a>` : html`<a class="beside" href=${to("train", "data")}>All data sets</a>`}
      ${words ? html`<${Careful} key=${chosen} label="Delete these rows" deed="Delete" sure="${words} will be deleted. This can't be undone; adapters trained on them stay." busy=${remove.busy} onSure=${() => remove.run(chosen)} />` : null}
    </div>
    <${Fault} problem=${remove.problem} />`;
}

/** @param {{setting: (typeof FURTHER)[0], form: Fields, problem: import("../lib/api.js").Problem | null, onChange: (rest: object) => void}} props */
function Further({ setting, form, problem, onChange }) {
  const { name, label, hint = "", empty = "", isText = false, choices } = setting;
  const value = furtherOf(form, setting);
  const about = { label, name, hint, problem };
  const set = (/** @type {any} */ next) => onChange(withFurther(form, setting, next));
  if (choices)
    return html`<${SelectField} ...${about} value=${value ?? ""} onChange=${set}
      options=${[["", `default (${choices[0]})`], ...choices.map((choice) => [choice, choice])]} />`;
  if (!isText) return html`<${NumberField} ...${about} placeholder=${empty} value=${value} onChange=${set} />`;
  const names = (/** @type {string} */ text) =>
    text.includes(",") ? text.split(",").map((one) => one.trim()) : text;
  return html`<${TextField} ...${about} placeholder=${empty} value=${Array.isArray(value) ? value.join(", ") : (value ?? "")}
    onChange=${(/** @type {string} */ text) => set(name === "target_modules" ? names(text) : text)} />`;
}

/** The request, which may be edited. @param {{body: Record<string, any>, onChange: (body: Record<string, any>) => void}} props */
function RequestJson({ body, onChange }) {
  const [text, setText] = useState(/** @type {string | null} */ (null)); // while it is edited
  const [wrong, setWrong] = useState("");
  const edit = (/** @type {string} */ value) => {
    setText(value);
    try {
      const found = JSON.parse(value);
      if (typeof found !== "object" || found === null || Array.isArray(found)) throw new Error("not an object");
      setWrong("");
      onChange(found);
    } catch (error) {
      setWrong(error instanceof Error ? error.message : String(error));
    }
  };
  return html`<details>
    <summary>The request as JSON</summary>
    <label class="hidden" for="request">Request</label>
    <textarea id="request" class="request" rows="14" spellcheck=${false} value=${text ?? JSON.stringify(body, null, 2)}
      onInput=${(/** @type {import("../parts/basics.js").Typed} */ event) => edit(event.currentTarget.value)} onBlur=${() => wrong || setText(null)}></textarea>
    ${wrong ? html`<p class="fault" role="alert">This isn't a request yet: ${wrong}.</p>` : html`<small>The body of <code>POST /train</code>. Fields and text follow each other.</small>`}
  </details>`;
}

/** Whether a reference such as codes or codes@2 means the adapter or a version of it. @param {Adapter} adapter @param {string} reference */
function isOf(adapter, reference) {
  const [name, number] = reference.split("@");
  return adapter.name === name && (!number || adapter.versions.some(({ version }) => String(version) === number));
}

/** @param {{dry: DryRun}} props */
function Preview({ dry }) {
  const { data, estimate } = dry;
  const facts = [
    `${plural(data.rows, "row")} with ${plural(data.trained_tokens, "trained-on token")} of ${count(data.tokens)}`,
    `${plural(data.validation_rows, "row")} held out`,
    ...(data.test_rows ? [plural(data.test_rows, "test row")] : []),
    `${plural(dry.steps, "step")}: about ${duration(estimate.seconds)}`,
    ...(data.truncated ? [`${plural(data.truncated, "row is", "rows are")} cut`] : []),
  ].join("; ");
  return html`<section aria-label="Dry run" class="preview" role="status">
    <h3>Nothing is trained yet. This would be:</h3>
    <p>${facts}</p>
    <${Split} data=${data} share=${dry.config["validation"]} />
    <${Warnings} warnings=${dry.warnings} />
    <p class="legend">
      The first ${dry.preview.length} of ${count(data.rows)}. Trained-on text is marked, the rest is only read; tokens in ${"<|…|>"} are
      special tokens, around the turns of a chat and at the end.
    </p>
    ${dry.preview.map(
      (row) =>
        html`<p class="tokens" dir="auto" key=${row.row}>
          ${row.tokens.map((token) => (token.trained ? html`<mark>${token.text}</mark>` : html`<span>${token.text}</span>`))}
          ${row.more ? html`<small> and ${plural(row.more, "token")} more</small>` : null}
        </p>`,
    )}
  </section>`;
}
