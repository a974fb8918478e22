/** One adapter: its versions and aliases, rollback, lineage, and the card of each version. */
import { isOfChats, newestFirst, placeOf } from "../lib/adapters.js";
import { ask, download, get } from "../lib/api.js";
import { pointsOf } from "../lib/curves.js";
import { ago, bytes, compact, loss, moment, percent, plural } from "../lib/format.js";
import { html, useEffect, useMemo, useState } from "../lib/html.js";
import { begin } from "../lib/playground.js";
import { useAction, useIsShown, useResource } from "../lib/resource.js";
import { go, to } from "../lib/route.js";
import { perKey } from "../lib/session.js";
import { Badge, Fault, Form, SelectField, Table, TextField, Warnings } from "../parts/basics.js";
import { Card } from "../parts/card.js";
import { Decide } from "../parts/decisions.js";
import { Lineage } from "../parts/lineage.js";
import { LossChart } from "../parts/loss.js";
import { Menu } from "../parts/menu.js";

/** The name of the adapter that was deleted last, until another is chosen. */
export const deleted = perKey("");

/** @typedef {ReturnType<typeof useAction<[string, string, unknown, string?]>>} Change its last argument: what to say then */

/** @param {{adapter: Adapter, isOwn: boolean, onChange: () => Promise<void>}} props */
export function AdapterDetail({ adapter, isOwn, onChange }) {
  const { path, headers } = placeOf(adapter.name);
  const change = /** @type {Change} */ (
    useAction(async (method, of, json, said = "") => {
      await ask(method, of, json === undefined ? { headers } : { json, headers });
      setDone(said);
      setFormer(0);
      await onChange();
    })
  );
  const use = async (/** @type {number} */ version) => {
    const before = adapter.latest;
    await change.run(
      "PUT",
      `${path}/aliases/latest`,
      { version },
      `${adapter.name} now means version ${version}.`,
    );
    choose(version);
    setFormer(before);
  };
  const isShown = useIsShown();
  const remove = useAction(async () => {
    await ask("DELETE", path, { headers });
    deleted.set(adapter.name);
    if (isShown()) go("adapters");
    await onChange();
  });
  const [number, choose] = useState(adapter.latest);
  const [done, setDone] = useState("");
  const [former, setFormer] = useState(0); // the version that was used before
  useEffect(() => deleted.set(""), []);
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
            begin(adapter.name, isChat); // as in its rows
            go("playground");
          }}
        >
          Try it
        </button>
        ${isOwn ? html`<${Menu} label="More actions for ${adapter.name}" busy=${change.busy || remove.busy} items=${actionsOf(adapter, path, change, remove.run)} />` : null}
      </p>
    </div>
    <${Fault} problem=${change.problem ?? remove.problem} />
    ${
      done && !change.problem
        ? html`<p class="done" role="status">
            ${done} ${former ? html`<button type="button" class="link" disabled=${change.busy} onClick=${() => use(former)}>Undo</button>` : null}
          </p>`
        : null
    }
    <${Table} label="Versions of ${adapter.name}" columns=${["Version", "#Held-out loss", "#Recall", "Than before", "Aliases", "", "Made", "#Rank", "#Size"]}>
      ${versions.map((one) => html`<${VersionRow} key=${one.version} adapter=${adapter} version=${one} isOwn=${isOwn} isChosen=${one === version} path=${path} change=${change} onUse=${() => use(one.version)} onChoose=${() => choose(one.version)} />`)}
    <//>
    ${adapter.next ? html`<p class="muted">Older versions than ${adapter.next} aren't shown.</p>` : null}
    ${isOwn ? html`<${NewAlias} adapter=${adapter} path=${path} change=${change} />` : null}
    ${version ? html`<${VersionDetail} key=${version.digest + version.version} version=${version} />` : null}
  </article>`;
}

/** @param {Adapter} adapter @param {string} path @param {Change} change @param {() => void} onDelete @returns {import("../parts/menu.js").Item[]} */
function actionsOf(adapter, path, change, onDelete) {
  const show = (/** @type {"public" | "private"} */ visibility) => () =>
    void change.run("PUT", `${path}/visibility`, { visibility }, `${adapter.name} is ${visibility} now.`);
  return [
    adapter.visibility === "public"
      ? { label: "Make private", onRun: show("private") }
      : {
          label: "Make public…",
          deed: "Make public",
          sure: `Every project on this server will be able to use ${adapter.name} and to build blends of it.`,
          onRun: show("public"),
        },
    {
      label: "Delete adapter…",
      deed: "Delete",
      sure: `All versions of ${adapter.name} will be deleted. This can't be undone.`,
      onRun: onDelete,
    },
  ];
}

/**
 * @param {{adapter: Adapter, version: Version, isOwn: boolean, isChosen: boolean, path: string, change: Change,
 *   onUse: () => void, onChoose: () => void}} props
 */
function VersionRow({ adapter, version, isOwn, isChosen, path, change, onUse, onChoose }) {
  const { recall, eval_loss: held, base_eval_loss: base } = version.metrics;
  const number = version.version;
  const save = useAction(() =>
    download(
      `${path}/${number}/download`,
      `${adapter.name.replace("/", "-")}-${number}.zip`,
      placeOf(adapter.name).headers,
    ),
  );
  const remove = () => change.run("DELETE", `${path}/${number}`, undefined, `Version ${number} was deleted.`);
  /** @type {import("../parts/menu.js").Item[]} */
  const items = [
    ...(number === adapter.latest ? [] : [{ label: "Use this version", onRun: onUse }]),
    ...(version.kind === "adapter" ? [{ label: "Download", onRun: () => void save.run() }] : []),
    {
      label: `Delete version ${number}…`,
      deed: "Delete",
      sure: `Version ${number} of ${adapter.name} will be deleted. This can't be undone.`,
      onRun: () => void remove(),
    },
  ];
  return html`<tr class=${isChosen ? "chosen" : ""}>
    <th scope="row"><button type="button" class="link" aria-pressed=${isChosen} onClick=${onChoose}>${number}</button></th>
    <td class="number">${loss(held)} ${held !== undefined && base !== undefined ? html`<${Against} held=${held} base=${base} />` : null}</td>
    <td class="number">${recall === undefined ? "–" : percent(recall)}</td>
    <td>${version.verdict === "can't tell" ? "no clear difference" : (version.verdict ?? "–")}</td>
    <td class="wraps">
      ${number === adapter.latest ? html`<${Badge} tone="good">in use<//>` : null}
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
    <td>
      ${isOwn ? html`<${Menu} label="Actions for version ${number}" busy=${change.busy || save.busy} items=${items} />` : null}
      <${Fault} problem=${save.problem} />
    </td>
    <td><time datetime=${version.created_at} title=${moment(version.created_at)}>${ago(version.created_at)}</time></td>
    <td class="number">${version.rank}</td>
    <td class="number">${version.bytes ? bytes(version.bytes) : "–"}</td>
  </tr>`;
}

/** How a held-out loss compares with the base's. @param {{held: number, base: number}} props */
function Against({ held, base }) {
  const change = held - base;
  return html`<small class=${change < 0 ? "gain" : "loss"} title="Against the base's ${loss(base)}">${change < 0 ? "−" : "+"}${loss(Math.abs(change))}</small>`;
}

/** @param {{adapter: Adapter, path: string, change: Change}} props */
function NewAlias({ adapter, path, change }) {
  const [alias, setAlias] = useState("");
  const [chosen, setNumber] = useState(String(adapter.latest)); // it may be deleted meanwhile
  const isThere = adapter.versions.some(({ version }) => String(version) === chosen);
  const number = isThere ? chosen : String(adapter.latest);
  return html`<details>
    <summary>Add alias</summary>
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
      ${version.config.evaluation?.results.map(
        (result) =>
          html`<dt>Measured</dt>
            <dd>${result.metric.replaceAll("_", " ")} ${loss(result.value)} on ${plural(result.n, "row")} of ${result.dataset}</dd>`,
      )}
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
    <h3>Evaluation</h3>
    <${Fault} problem=${report.problem} />
    ${
      report.data
        ? html`<${Card} report=${report.data} points=${points} />
            <${LossChart} points=${points} kept=${report.data.kept_step ?? null} base=${report.data.evaluation?.base?.loss ?? null} />`
        : null
    }`;
}
