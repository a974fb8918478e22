/** API keys: those there are, a new one, whose secret is shown once, and revoking. */
import { ask } from "../lib/api.js";
import { ago, moment } from "../lib/format.js";
import { html, useState } from "../lib/html.js";
import { useAction } from "../lib/resource.js";
import { Badge, Careful, Check, Fault, Form, Table, TextField } from "../parts/basics.js";
import { LimitFields, UNLIMITED } from "../parts/limits.js";

const SCOPES = /** @type {const} */ ([
  ["generate", "generate"],
  ["train", "train, upload and delete"],
  ["metrics", "read the metrics"],
  ["admin", "everything, in all projects"],
]);

/** @param {{keys: Key[], onChange: () => Promise<void>}} props */
export function Keys({ keys, onChange }) {
  const revoke = useAction(async (/** @type {string} */ id) => {
    await ask("DELETE", `/keys/${encodeURIComponent(id)}`);
    await onChange();
  });
  return html`<section class="card" aria-label="Keys">
    <h2>Keys</h2>
    ${
      keys.length
        ? html`<${Table} label="Keys" columns=${["Name", "Project", "May", "Made", "Last used", "State", ""]}>
              ${keys.map(
                (key) =>
                  html`<tr key=${key.id}>
                    <th scope="row">${key.name}<br /><small><code>${key.id}</code></small></th>
                    <td>${key.project}</td>
                    <td>${key.scopes.join(", ")}</td>
                    <td>${moment(key.created_at)}</td>
                    <td>${key.last_used_at ? ago(key.last_used_at) : "never"}</td>
                    <td>${stateOf(key)}</td>
                    <td>${key.revoked_at ? null : html`<${Careful} label="Revoke" sure="Whoever uses ${key.name} is shut out at once." busy=${revoke.busy} onSure=${() => revoke.run(key.id)} />`}</td>
                  </tr>`,
              )}
            <//>`
        : html`<p>None yet: whoever may connect may do everything. With the first key that ends, for good, and this page asks for one.</p>`
    }
    <${Fault} problem=${revoke.problem} />
    <${NewKey} isFirst=${keys.length === 0} onMade=${onChange} />
  </section>`;
}

/** @param {Key} key */
function stateOf(key) {
  if (key.revoked_at) return html`<${Badge} tone="bad">revoked<//>`;
  if (key.expires_at && Date.parse(key.expires_at) < Date.now()) return html`<${Badge} tone="bad">expired<//>`;
  return key.expires_at ? `until ${moment(key.expires_at)}` : "valid";
}

/** @param {{isFirst: boolean, onMade: () => Promise<void>}} props */
function NewKey({ isFirst, onMade }) {
  const [name, setName] = useState("");
  const [project, setProject] = useState("default");
  const [scopes, setScopes] = useState(/** @type {string[]} */ (isFirst ? ["admin"] : ["generate", "train"]));
  const [expires, setExpires] = useState("");
  const [limits, setLimits] = useState(UNLIMITED);
  const [made, setMade] = useState(/** @type {(Key & {secret: string}) | null} */ (null));
  const create = useAction(async () => {
    const json = {
      name,
      project,
      scopes,
      expires_at: expires ? new Date(expires).toISOString() : null,
      ...limits,
    };
    setMade(await ask("POST", "/keys", { json }));
    setName("");
    if (!isFirst) await onMade(); // the first one ends that nobody needs a key: its secret is read before the page asks for it
  });
  const text = (
    /** @type {string} */ label,
    /** @type {string} */ field,
    /** @type {string} */ value,
    /** @type {(value: string) => void} */ set,
    /** @type {string} */ hint,
  ) =>
    html`<${TextField} label=${label} name=${field} problem=${create.problem} hint=${hint} value=${value} onChange=${set} />`;
  return html`<details open=${isFirst}>
    <summary>New key</summary>
    <${Form} label="New key" onSubmit=${create.run}>
      <div class="fields">
        ${text("Name", "name", name, setName, "for people, such as laptop")} ${text("Project", "project", project, setProject, "whose adapters and jobs it sees")}
        <${TextField} label="Expires" name="expires_at" type="date" problem=${create.problem} hint="empty: never" value=${expires} onChange=${setExpires} />
      </div>
      <fieldset>
        <legend>May</legend>
        ${SCOPES.map(
          ([scope, words]) =>
            html`<${Check} checked=${scopes.includes(scope)} onChange=${() => setScopes(scopes.includes(scope) ? scopes.filter((of) => of !== scope) : [...scopes, scope])}>${words}<//>`,
        )}
      </fieldset>
      <details>
        <summary>Limits</summary>
        <${LimitFields} limits=${limits} problem=${create.problem} onChange=${setLimits} />
      </details>
      <${Fault} problem=${create.problem} beside=${["name", "project", "expires_at", ...Object.keys(UNLIMITED)]} />
      <button type="submit" disabled=${!name || !scopes.length || create.busy}>Make the key</button>
    <//>
    ${
      made
        ? html`<div class="secret" role="status">
          <p>This is the secret of ${made.name}. It is shown this once: copy it now.</p>
          <p class="row"><code>${made.secret}</code> <button type="button" class="plain" onClick=${() => navigator.clipboard?.writeText(made.secret)}>Copy</button></p>
        </div>`
        : null
    }
  </details>`;
}
