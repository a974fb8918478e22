/** Rows of data sets, read and sent. */
import { get, upload } from "./api.js";

const PAGE = 1000;
/** Rows that are read at most to make a new data set of some of them. */
export const MOST_ROWS = 20_000;

/** @param {string} id */
export const pathOf = (id) => `/datasets/${encodeURIComponent(id)}`;

/**
 * All rows of a data set.
 * @param {string} id
 * @param {number} [validation] the share that is held out, if it isn't the default
 */
export async function allRows(id, validation) {
  /** @type {DatasetRow[]} */
  const rows = [];
  const share = validation === undefined ? "" : `&validation=${validation}`;
  for (let number = Infinity; rows.length < number;) {
    /** @type {DatasetRows} */
    const page = await get(`${pathOf(id)}/rows?offset=${rows.length}&limit=${PAGE}${share}`);
    if (!page.rows.length) break; // deleted meanwhile
    rows.push(...page.rows);
    number = page.count;
  }
  return rows;
}

/**
 * Store rows as a data set. The same rows always get the same id.
 * @param {object[]} rows
 * @param {string} name of its file
 * @returns {Promise<DataSet>}
 */
export function send(rows, name) {
  const lines = rows.map((row) => `${JSON.stringify(row)}\n`).join("");
  const form = new FormData();
  form.append("file", new File([lines], name, { type: "application/jsonl" }));
  return upload("/datasets", form, () => {});
}
