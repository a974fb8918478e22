/** API keys: the list, creating a key, whose secret is shown once, and revoking. */
import { ask } from "../lib/api.js";
import { ago, bytes, compact, moment } from "../lib/format.js";
import { html, useState } from "../lib/html.js";
import { useAction } from "../lib/resource.js";
import { perKey, signIn } from "../lib/session.js";
import { useStore } from "../lib/store.js";
import { Badge, Check, Fault, Form, Table, TextField } from "../parts/basics.js";
import { LIMITS, LimitFields } from "../parts/limits.js";
import { Menu } from "../parts/menu.js";

const SCOPES = /** @type {const} */ ([
  ["generate", "generate"],
  ["train", "train, upload and delete"],
  ["metrics", "read the metrics"],
  ["manage", "manage its project's keys and limits"],
  ["admin", "everything, in all projects (admin)"],
]);

/** @param {{keys: Key[], isOpen: boolean, onChange: () => Promise<void>}} props `isOpen`: no key is needed yet */
export function Keys({ keys, isOpen, onChange }) {
  const revoke = useAction(async (/** @type {string} */ id) => {
    await ask("DELETE", `/keys/${encodeURIComponent(id)}`);
    await onChange();
  });
  const [changed, setChanged] = useState(/** @type {string | null} */ (null)); // the key whose limits are being changed
  const edited = keys.find(({ id }) => id === changed);
  const actionsOf = (/** @type {Key} */ key) => [
    { label: "Change limits", onRun: () => setChanged(key.id) },
    {
      label: "Revoke…",
      deed: "Revoke",
      sure: `Revoke “${key.name}”? Requests with this key fail immediately.`,
      onRun: () => void revoke.run(key.id),
    },
  ];
  return html`<section class="card" aria-label="Keys">
    <h2>Keys</h2>
    ${
      keys.length
        ? html`<${Table} label="Keys" columns=${["Name", "Project", "May", "State", "", "Limits", "Made", "Last used"]}>
              ${keys.map(
                (key) =>
                  html`<tr key=${key.id}>
                    <th scope="row">${key.name}<br /><small><code>${key.id}</code></small></th>
                    <td>${key.project}</td>
                    <td>${key.scopes.join(", ")}</td>
                    <td>${stateOf(key)}</td>
                    <td>${key.revoked_at ? null : html`<${Menu} label="Actions for ${key.name}" busy=${revoke.busy} items=${actionsOf(key)} />`}</td>
                    <td>${limitsOf(key)}</td>
                    <td>${moment(key.created_at)}</td>
                    <td>${key.last_used_at ? ago(key.last_used_at) : "never"}</td>
                  </tr>`,
              )}
            <//>`
        : !isOpen
          ? html`<p>None yet, except the operator's keys in the server's settings (<code>SMOLORA_API_KEYS</code>).</p>`
          : html`<p>None yet: everyone who reaches this server may do everything. After the first key is created, everyone needs a key; this can't be undone.</p>`
    }
    <${Fault} problem=${revoke.problem} />
    ${
      edited
        ? html`<${KeyLimits} key=${edited.id} of=${edited} onDone=${async () => {
            setChanged(null);
            await onChange();
          }} />`
        : null
    }
    <${Secret} />
    <${NewKey} isFirst=${isOpen} onMade=${onChange} />
  </section>`;
}

/** @param {Key} key */
const limitsOf = (key) =>
  LIMITS.flatMap(([name, words]) =>
    typeof key[name] === "number"
      ? [`${words.toLowerCase()}: ${name === "max_bytes" ? bytes(key[name]) : compact(key[name])}`]
      : [],
  ).join(", ") || "none";

/** @param {{of: Key, onDone: () => Promise<void>}} props */
function KeyLimits({ of, onDone }) {
  const [limits, setLimits] = useState(
    /** @type {Partial<Limits>} */ (Object.fromEntries(LIMITS.map(([name]) => [name, of[name] ?? null]))),
  );
  const save = useAction(async () => {
    await ask("PATCH", `/keys/${encodeURIComponent(of.id)}`, { json: limits });
    await onDone();
  });
  return html`<${Form} label="Limits of ${of.name}" onSubmit=${save.run}>
    <h3>Limits of ${of.name}</h3>
    <${LimitFields} limits=${limits} problem=${save.problem} onChange=${setLimits} />
    <${Fault} problem=${save.problem} beside=${LIMITS.map(([name]) => name)} />
    <p class="row">
      <button type="submit" disabled=${save.busy}>Save</button>
      <button type="button" class="plain" onClick=${() => onDone()}>Discard</button>
    </p>
  <//>`;
}

/** @param {Key} key */
function stateOf(key) {
  if (key.revoked_at) return html`<${Badge} tone="bad">revoked<//>`;
  if (key.expires_at && Date.parse(key.expires_at) < Date.now()) return html`<${Badge} tone="bad">expired<//>`;
  return key.expires_at ? `until ${moment(key.expires_at)}` : "valid";
}

/** The newest key, until its secret is dismissed. */
const made = perKey(/** @type {(Key & {secret: string}) | null} */ (null));

/**
 * After the first key is created, every client needs one. So it must be an admin's, and the page continues with it.
 * @param {{isFirst: boolean, onMade: () => Promise<void>}} props
 */
function NewKey({ isFirst, onMade }) {
  const [name, setName] = useState("");
  const [project, setProject] = useState("");
  const [scopes, setScopes] = useState(/** @type {string[]} */ (isFirst ? ["admin"] : ["generate", "train"]));
  const [expires, setExpires] = useState("");
  const [limits, setLimits] = useState(/** @type {Partial<Limits>} */ ({}));
  const [cleared, setCleared] = useState(0); // how often, so that no field keeps what was typed
  const create = useAction(async () => {
    const expires_at = expires ? new Date(expires).toISOString() : null;
    const key = await ask("POST", "/keys", {
      json: { name, project: project || null, scopes, expires_at, ...limits },
    });
    setName("");
    setExpires("");
    setLimits({});
    setCleared((before) => before + 1);
    if (isFirst) signIn(key.secret);
    made.set(key);
    if (!isFirst) await onMade();
  });
  const isShutOut = isFirst && !scopes.includes("admin");
  const about = { problem: create.problem };
  return html`<details open=${isFirst}>
    <summary>New key</summary>
    <${Form} label="New key" onSubmit=${create.run}>
      <div class="fields">
        <${TextField} label="Name" name="name" hint="for people, such as laptop" value=${name} onChange=${setName} ...${about} />
        <${TextField} label="Project" name="project" hint="The key sees this project's adapters and jobs. Empty: default, or that of your managing key." value=${project} onChange=${setProject} ...${about} />
        <${TextField} label="Expires" name="expires_at" type="date" hint="empty: never" value=${expires} onChange=${setExpires} ...${about} />
      </div>
      <fieldset>
        <legend>This key may</legend>
        ${SCOPES.map(
          ([scope, words]) =>
            html`<${Check} checked=${scopes.includes(scope)} onChange=${() => setScopes(scopes.includes(scope) ? scopes.filter((of) => of !== scope) : [...scopes, scope])}>${words}<//>`,
        )}
      </fieldset>
      <details>
        <summary>Limits</summary>
        <${LimitFields} key=${cleared} limits=${limits} onChange=${setLimits} ...${about} />
      </details>
      <${Fault} problem=${create.problem} beside=${["name", "project", "expires_at", ...LIMITS.map(([name]) => name)]} />
      ${isShutOut ? html`<p class="warning">The first key has to be allowed everything: the others are made with it.</p>` : null}
      <button type="submit" disabled=${!name || !scopes.length || isShutOut || create.busy}>Make the key</button>
    <//>
  </details>`;
}

function Secret() {
  const key = useStore(made);
  const [isCopied, setCopied] = useState(false);
  const copy = useAction(async () => {
    await navigator.clipboard.writeText(key?.secret ?? ""); // browsers refuse this without TLS
    setCopied(true);
  });
  if (!key) return null;
  return html`<div class="secret" role="status">
    <p>The secret of the key “${key.name}”. It is shown this once: copy it now.</p>
    <p class="row">
      <code>${key.secret}</code>
      <button type="button" class="plain" onClick=${() => copy.run()}>${isCopied ? "Copied" : "Copy"}</button>
      <button type="button" class="plain" onClick=${() => made.set(null)}>Done</button>
    </p>
    ${copy.problem ? html`<p>This browser doesn't let the page copy: select it and copy it by hand.</p>` : null}
  </div>`;
}
