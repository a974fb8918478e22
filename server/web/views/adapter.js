/** One adapter: its versions and aliases, rollback, lineage, and the card of each version. */
import { isOfChats, newestFirst, placeOf } from "../lib/adapters.js";
import { ask, download, get } from "../lib/api.js";
import { pointsOf } from "../lib/curves.js";
import { bytes, compact, moment, percent } from "../lib/format.js";
import { html, useMemo, useState } from "../lib/html.js";
import { asked, columns, expression } from "../lib/playground.js";
import { useAction, useIsShown, useResource } from "../lib/resource.js";
import { go, to } from "../lib/route.js";
import { Badge, Careful, Fault, Form, SelectField, Table, TextField, Warnings } from "../parts/basics.js";
import { Card } from "../parts/card.js";
import { Decide } from "../parts/decisions.js";
import { Lineage } from "../parts/lineage.js";
import { LossChart } from "../parts/loss.js";

/** @param {{adapter: Adapter, isOwn: boolean, onChange: () => Promise<void>}} props */
export function AdapterDetail({ adapter, isOwn, onChange }) {
  const { path, headers } = placeOf(adapter.name);
  const change = useAction(
    async (/** @type {string} */ method, /** @type {string} */ of, /** @type {unknown} */ json) => {
      await ask(method, of, json === undefined ? { headers } : { json, headers });
      setDone(
        /** @type {any} */ (json)?.version && of.endsWith("/latest")
          ? `${adapter.name} now means version ${/** @type {any} */ (json).version}.`
          : "",
      );
      await onChange();
    },
  );
  const isShown = useIsShown();
  const remove = useAction(async () => {
    await ask("DELETE", path, { headers });
    if (isShown()) go("adapters");
    await onChange();
  });
  const [number, choose] = useState(adapter.latest);
  const [done, setDone] = useState("");
  const versions = newestFirst(adapter);
  const version = versions.find((one) => one.version === number) ?? versions[0];
  return html`<article class="card" aria-label=${adapter.name}>
    <div class="row between">
      <h2 class="big">${adapter.name}</h2>
      <p class="row">
        <button
          type="button"
          onClick=${() => {
            const isChat = isOfChats(versions.find((one) => one.version === adapter.latest)?.config.kinds);
            if (isChat !== null) asked.update({ isChat }); // as in its rows
            expression.set(adapter.name);
            columns.set([]);
            go("playground");
          }}
        >
          Try it
        </button>
        ${
          isOwn
            ? html`${
                adapter.visibility === "public"
                  ? html`<button type="button" class="plain" disabled=${change.busy} onClick=${() => change.run("PUT", `${path}/visibility`, { visibility: "private" })}>Make private</button>`
                  : html`<${Careful} label="Make public" sure="Every project on this server can use ${adapter.name} then, and build blends of it." busy=${change.busy} onSure=${() => change.run("PUT", `${path}/visibility`, { visibility: "public" })} />`
              }
              <${Careful} label="Delete" sure="All versions of ${adapter.name} will be deleted. This can't be undone." busy=${change.busy} onSure=${() => remove.run()} />`
            : null
        }
      </p>
    </div>
    <${Fault} problem=${change.problem ?? remove.problem} />
    ${done ? html`<p class="done" role="status">${done}</p>` : null}
    <${Table} label="Versions of ${adapter.name}" columns=${["Version", "Names", "#Recall", "Than before", "", "Made", "#Rank", "#Size"]}>
          ${versions.map((one) => html`<${VersionRow} key=${one.version} adapter=${adapter} version=${one} isOwn=${isOwn} isChosen=${one === version} path=${path} change=${change} onChoose=${() => choose(one.version)} />`)}
        <//>
    ${adapter.next ? html`<p class="muted">Older versions than ${adapter.next} aren't shown.</p>` : null}
    ${isOwn ? html`<${NewAlias} adapter=${adapter} path=${path} change=${change} />` : null}
    ${version ? html`<${VersionDetail} key=${version.digest + version.version} version=${version} />` : null}
  </article>`;
}

/**
 * @param {{adapter: Adapter, version: Version, isOwn: boolean, isChosen: boolean, path: string,
 *   change: ReturnType<typeof useAction<[string, string, unknown]>>, onChoose: () => void}} props
 */
function VersionRow({ adapter, version, isOwn, isChosen, path, change, onChoose }) {
  const { recall } = version.metrics;
  const number = version.version;
  const save = useAction(() =>
    download(
      `${path}/${number}/download`,
      `${adapter.name.replace("/", "-")}-${number}.zip`,
      placeOf(adapter.name).headers,
    ),
  );
  return html`<tr class=${isChosen ? "chosen" : ""}>
    <th scope="row"><button type="button" class="link" aria-pressed=${isChosen} onClick=${onChoose}>${number}</button></th>
    <td>
      ${number === adapter.latest ? html`<${Badge} tone="good">latest<//>` : null}
      ${Object.entries(adapter.aliases)
        .filter(([, of]) => of === number)
        .map(
          ([alias]) =>
            html`<span class="badge"
              >${alias}${
                isOwn
                  ? html`<button type="button" class="link" aria-label="Remove the alias ${alias}" disabled=${change.busy} onClick=${() => change.run("DELETE", `${path}/aliases/${encodeURIComponent(alias)}`, undefined)}>×</button>`
                  : null
              }</span
            >`,
        )}
      ${version.resident ? html`<${Badge}>in memory<//>` : null} ${version.warnings.length ? html`<${Badge} tone="bad">warning<//>` : null}
    </td>
    <td class="number">${recall === undefined ? "–" : percent(recall)}</td>
    <td>${version.verdict ?? "–"}</td>
    <td>
      <div class="row">
      ${
        isOwn && number !== adapter.latest
          ? html`<button type="button" class="plain" disabled=${change.busy} onClick=${() => change.run("PUT", `${path}/aliases/latest`, { version: number })}>
            ${number < adapter.latest ? "Roll back to it" : "Make it the latest"}
          </button>`
          : null
      }
      ${isOwn && version.kind === "adapter" ? html`<button type="button" class="plain" disabled=${save.busy} onClick=${() => save.run()}>Download</button>` : null}
      ${isOwn ? html`<${Careful} label="Delete" sure="Version ${number} will be deleted. This can't be undone." busy=${change.busy} onSure=${() => change.run("DELETE", `${path}/${number}`, undefined)} />` : null}
      </div>
      <${Fault} problem=${save.problem} />
    </td>
    <td>${moment(version.created_at)}</td>
    <td class="number">${version.rank}</td>
    <td class="number">${version.bytes ? bytes(version.bytes) : "–"}</td>
  </tr>`;
}

/** @param {{adapter: Adapter, path: string, change: ReturnType<typeof useAction<[string, string, unknown]>>}} props */
function NewAlias({ adapter, path, change }) {
  const [alias, setAlias] = useState("");
  const [chosen, setNumber] = useState(String(adapter.latest)); // it may be deleted meanwhile
  const isThere = adapter.versions.some(({ version }) => String(version) === chosen);
  const number = isThere ? chosen : String(adapter.latest);
  return html`<details>
    <summary>Give a version a name</summary>
    <${Form} label="Alias of ${adapter.name}" className="row end" onSubmit=${() => {
      if (alias)
        void change.run("PUT", `${path}/aliases/${encodeURIComponent(alias)}`, { version: Number(number) });
    }}>
      <${TextField} label="Alias" name="alias" hint="such as prod; then ${adapter.name}@prod means that version" value=${alias} onChange=${setAlias} />
      <${SelectField} label="Version" value=${number} options=${newestFirst(adapter).map(({ version }) => [String(version), String(version)])} onChange=${setNumber} />
      <button type="submit" disabled=${!alias || change.busy}>Set</button>
    <//>
  </details>`;
}

/** @param {{version: Version}} props */
function VersionDetail({ version }) {
  return html`<section aria-label="Version ${version.version}">
    <h3>Version ${version.version}</h3>
    <${Warnings} warnings=${version.warnings} />
    <dl>
      <dt>Digest</dt>
      <dd><code class="digest">${version.digest.slice(0, 16)}…</code></dd>
      ${version.alpha === null ? null : html`<dt>Rank, alpha</dt><dd>${version.rank}, ${version.alpha}</dd>`}
      <dt>Layers</dt>
      <dd>${version.target_modules.join(", ")}</dd>
      <dt>Parameters</dt>
      <dd>${compact(version.parameters)}</dd>
      ${version.base_model ? html`<dt>Made for</dt><dd>${version.base_model}</dd>` : null}
      ${version.job_id ? html`<dt>Made by</dt><dd><a href=${to("train", version.job_id)}>${version.job_id}</a></dd>` : null}
    </dl>
    <h3>Origin</h3>
    <${Lineage} version=${version} />
    ${version.job_id ? html`<${CardOfJob} id=${version.job_id} version=${version} />` : null}
  </section>`;
}

/** @param {{id: string, version: Version}} props */
function CardOfJob({ id, version }) {
  const report = useResource((signal) => get(`/train/${encodeURIComponent(id)}/report`, signal), [id]);
  const points = useMemo(() => pointsOf(report.data?.curves), [report.data]);
  const adapter = `${version.name}@${version.version}`;
  const decide = version.config.decisions
    ? html`<${Decide} adapter=${adapter} reports=${report.data?.decisions ?? {}} />`
    : null;
  if (report.problem?.status === 403 || report.problem?.status === 404) return decide; // not this key's to read, or not kept
  return html`${decide}
    <h3>Card</h3>
    <${Fault} problem=${report.problem} />
    ${
      report.data
        ? html`<${Card} report=${report.data} points=${points} />
            <${LossChart} points=${points} kept=${report.data.kept_step ?? null} base=${report.data.evaluation?.base?.loss ?? null} />`
        : null
    }`;
}
