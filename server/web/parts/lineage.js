/** A picture of a version's lineage: the base, the adapters that it was trained from or blended of, itself. */
import { listAdapters, placeOf } from "../lib/adapters.js";
import { get } from "../lib/api.js";
import { parse } from "../lib/expression.js";
import { html } from "../lib/html.js";
import { useResource } from "../lib/resource.js";
import { to } from "../lib/route.js";

/** @typedef {{id: string, name: string, from: {id: string, weight: number}[], kind: string}} Node */

const MOST_NODES = 32;
const [WIDTH, HEIGHT, GAP_X, GAP_Y] = [132, 34, 56, 14];

/** @param {{name: string, version: number | string}} of */
const idOf = ({ name, version }) => `${name}@${version}`;

/** @param {Version} of */
function originsOf({ parts, parent }) {
  const terms = parts ?? ((parent && parse(parent)) || []).map((term) => ({ ...term, version: term.pin }));
  return terms.map(({ name, version, weight }) => ({
    id: idOf({ name, version }),
    name,
    version: String(version),
    weight,
  }));
}

/**
 * Another project's are in lists alone.
 * @param {string} name
 * @param {string} version
 * @param {AbortSignal} signal
 * @returns {Promise<Version | null>}
 */
async function loadVersion(name, version, signal) {
  if (!name.includes("/")) return get(`${placeOf(name).path}/${encodeURIComponent(version)}`, signal);
  const { own, shared } = await listAdapters(signal, { name });
  return [...own, ...shared][0]?.versions.find((one) => String(one.version) === version) ?? null;
}

/**
 * The version and all its ancestors. A branch ends at a deleted adapter, or one that this project can't see.
 * @param {Version} first
 * @param {AbortSignal} signal
 */
async function loadNodes(first, signal) {
  /** @type {Map<string, Node>} */
  const nodes = new Map();
  /** @type {{id: string, name: string, version: Version | null}[]} */
  let level = [{ id: idOf(first), name: first.name, version: first }];
  while (level.length && nodes.size < MOST_NODES) {
    /** @type {Map<string, {name: string, version: string}>} */
    const next = new Map();
    for (const { id, name, version } of level) {
      const origins = version ? originsOf(version) : [];
      const from = origins.length
        ? origins.map(({ id, weight }) => ({ id, weight }))
        : version
          ? [{ id: "base", weight: 1 }]
          : [];
      nodes.set(id, { id, name, from, kind: version ? version.kind : "gone" });
      for (const origin of origins)
        if (!nodes.has(origin.id)) next.set(origin.id, { name: origin.name, version: origin.version });
    }
    level = await Promise.all(
      [...next]
        .filter(([id]) => !nodes.has(id))
        .map(async ([id, { name, version }]) => {
          try {
            return { id, name, version: await loadVersion(name, version, signal) };
          } catch {
            return { id, name, version: null };
          }
        }),
    );
  }
  nodes.set("base", { id: "base", name: "base", from: [], kind: "base" });
  return [...nodes.values()];
}

/** Each node's distance from its root. @param {Node[]} nodes */
function depthsOf(nodes) {
  const byId = new Map(nodes.map((node) => [node.id, node]));
  /** @type {Map<string, number>} */
  const depths = new Map();
  /** @param {string} id @returns {number} */
  const depth = (id) => {
    const known = depths.get(id);
    if (known !== undefined) return known;
    depths.set(id, 0);
    const found = Math.max(
      0,
      ...(byId.get(id)?.from ?? []).filter((origin) => byId.has(origin.id)).map((origin) => depth(origin.id) + 1),
    );
    depths.set(id, found);
    return found;
  };
  for (const node of nodes) depth(node.id);
  return depths;
}

/** @param {{version: Version}} props */
export function Lineage({ version }) {
  const nodes = useResource((signal) => loadNodes(version, signal), [version.digest, version.version]);
  if (!nodes.data) return html`<p class="muted">…</p>`;
  const depths = depthsOf(nodes.data);
  /** @type {Map<number, number>} */
  const rows = new Map();
  /** @type {Map<string, {x: number, y: number}>} */
  const places = new Map();
  for (const node of nodes.data) {
    const column = depths.get(node.id) ?? 0;
    const row = rows.get(column) ?? 0;
    rows.set(column, row + 1);
    places.set(node.id, { x: column * (WIDTH + GAP_X), y: row * (HEIGHT + GAP_Y) });
  }
  const width = (Math.max(...rows.keys()) + 1) * (WIDTH + GAP_X) - GAP_X;
  const height = Math.max(...rows.values()) * (HEIGHT + GAP_Y) - GAP_Y;
  const edges = nodes.data.flatMap((node) =>
    node.from.flatMap(({ id, weight }) => {
      const [start, end] = [places.get(id), places.get(node.id)];
      return start && end ? [{ start, end, weight, key: `${id} ${node.id}` }] : [];
    }),
  );
  return html`<div class="scroll" tabindex="0" role="region" aria-label="Lineage">
      <svg class="lineage" width=${width + 2} height=${height + 2} viewBox="-1 -1 ${width + 2} ${height + 2}" aria-hidden="true">
        ${edges.map(({ start, end, weight, key }) => {
          const [x1, y1, x2, y2] = [start.x + WIDTH, start.y + HEIGHT / 2, end.x, end.y + HEIGHT / 2];
          const middle = (x1 + x2) / 2;
          return html`<g key=${key}>
            <path d="M${x1} ${y1} C${middle} ${y1} ${middle} ${y2} ${x2} ${y2}" />
            ${weight === 1 ? null : html`<text class="weight" x=${middle} y=${(y1 + y2) / 2 - 4}>× ${Number(weight.toFixed(3))}</text>`}
          </g>`;
        })}
        ${nodes.data.map((node) => {
          const { x, y } = places.get(node.id) ?? { x: 0, y: 0 };
          return html`<g key=${node.id} class="node ${node.kind} ${node.id === idOf(version) ? "self" : ""}">
            <rect x=${x} y=${y} width=${WIDTH} height=${HEIGHT} rx="7" />
            <text x=${x + WIDTH / 2} y=${y + HEIGHT / 2 + 4.5}>${node.id.length > 17 ? `${node.id.slice(0, 16)}…` : node.id}</text>
          </g>`;
        })}
      </svg>
    </div>
    <ul class="hidden">
      ${nodes.data.map((node) => html`<li>${node.id}${node.from.length ? ` comes from ${node.from.map(({ id }) => id).join(" and ")}` : node.kind === "gone" ? " was deleted" : ""}</li>`)}
    </ul>
    <p class="row">
      ${nodes.data
        .filter((node) => node.kind !== "base" && node.kind !== "gone" && node.name !== version.name)
        .map((node) => html`<a href=${to("adapters", ...node.name.split("/"))}>${node.id}</a>`)}
    </p>`;
}
