/** The playground: what is asked, its address, and the runs so far. Runs continue while other views are open. */
import { Problem } from "./api.js";
import { compare, grown, promptOf, samplingOf, turnOf } from "./generation.js";
import { asProblem } from "./resource.js";
import { query, route, setQuery } from "./route.js";
import { key, perPerson } from "./session.js";

/** @import { Request, Turn } from "./generation.js" */

/**
 * @typedef {{expression: string, turns: Turn[], state: "running" | "done" | "stopped", problem: Problem | null}} Column
 *   one expression's thread; a text to continue has one turn
 * @typedef {{id: number, at: number, request: Request, seed: number | null, columns: Column[]}} Run `at`: ms since 1970
 */

/** @type {Request} */
const BLANK = {
  prompt: "",
  isChat: true,
  system: "",
  maxTokens: 256,
  temperature: 0,
  topP: null,
  seed: null,
};
const MOST_RUNS = 50;
const MOST_SEEDS = 2 ** 32;

export const asked = perPerson(BLANK);
export const expression = perPerson("");
/** The other expressions to answer under. */
export const beside = perPerson(/** @type {string[]} */ (["base"]));
/** The newest first. */
export const runs = perPerson(/** @type {Run[]} */ ([]));
/** The id of the run that is shown, or 0. */
export const shown = perPerson(0);

let running = new AbortController();
let last = 0; // id of a run
key.listeners.add(() => stop());

// ---- the address

/** @type {[keyof Request, string, (text: string) => any][]} */
const FIELDS = [
  ["prompt", "p", String],
  ["isChat", "chat", (text) => text !== "0"],
  ["system", "s", String],
  ["maxTokens", "n", Number],
  ["temperature", "t", Number],
  ["topP", "top", Number],
  ["seed", "seed", Number],
];
const TYPING = 300; // ms: browsers limit how often an address may change
const MOST_LETTERS = 30_000;

/** What the address says of the request; "" if that is as it is at first. */
function written() {
  const found = new URLSearchParams();
  for (const [name, short] of FIELDS) {
    const value = asked.value[name];
    if (value === BLANK[name]) continue;
    found.set(short, value === null ? "" : typeof value === "boolean" ? String(Number(value)) : String(value));
  }
  if (expression.value) found.set("e", expression.value);
  if (beside.value.join() !== "base")
    for (const of of beside.value.length ? beside.value : [""]) found.append("b", of);
  const text = found.toString();
  return text.length > MOST_LETTERS ? "" : text;
}

/** @param {string} text */
function read(text) {
  const given = new URLSearchParams(text);
  /** @type {any} */
  const request = { ...BLANK };
  for (const [name, short, of] of FIELDS) {
    const value = given.get(short);
    if (value === null) continue;
    request[name] = value === "" && BLANK[name] !== "" ? null : of(value);
    if (Number.isNaN(request[name])) request[name] = BLANK[name];
  }
  asked.set(request);
  expression.set(given.get("e") ?? "");
  beside.set(given.has("b") ? given.getAll("b").filter(Boolean) : ["base"]);
}

const isHere = () => (route.value[0] ?? "playground") === "playground";
let timer = 0;

/** Write the request into the address. @param {boolean} [isNew] whether the Back button returns to the one before */
export function writeAddress(isNew = false) {
  clearTimeout(timer);
  if (isHere()) setQuery(written(), isNew);
}

for (const store of [asked, expression, beside])
  store.listeners.add(() => {
    clearTimeout(timer);
    timer = setTimeout(writeAddress, TYPING);
  });
/** The address is another one: by a link, or the Back button. Without a state, it gets the one that there is. */
function follow() {
  if (!isHere()) return;
  if (!query.value) writeAddress();
  else if (query.value !== written()) read(query.value);
}
route.listeners.add(follow);
follow();

// ---- runs

/** The run that is shown. @param {Run[]} all @param {number} id */
export const runOf = (all, id) => all.find((run) => run.id === id) ?? null;

/** @param {number} id @param {(run: Run) => Run} change */
const changeRun = (id, change) => runs.set(runs.value.map((run) => (run.id === id ? change(run) : run)));

/** @param {number} id @param {number[]} places @param {(column: Column) => Partial<Column>} change */
const changeColumns = (id, places, change) =>
  changeRun(id, (run) => ({
    ...run,
    columns: run.columns.map((column, place) =>
      places.includes(place) ? { ...column, ...change(column) } : column,
    ),
  }));

/** @param {Turn[]} turns @param {Turn} turn */
const withLast = (turns, turn) => [...turns.slice(0, -1), turn];

/** Answer the last turns of some columns: with one request if their threads are the same. @param {Run} run @param {number[]} places */
function answer(run, places) {
  running.abort();
  running = new AbortController();
  const { signal } = running;
  changeColumns(run.id, places, () => ({ state: "running", problem: null }));
  /** @type {Map<string, number[]>} */
  const groups = new Map();
  for (const place of places) {
    const prompt = JSON.stringify(promptOf(run.request, run.columns[place]?.turns ?? []));
    groups.set(prompt, [...(groups.get(prompt) ?? []), place]);
  }
  for (const [prompt, group] of groups) void follows(run, JSON.parse(prompt), group, signal);
}

/** @param {Run} run @param {Record<string, unknown>} prompt @param {number[]} places @param {AbortSignal} signal */
async function follows({ id, request, seed, columns }, prompt, places, signal) {
  const adapters = places.map((place) => columns[place]?.expression ?? "base");
  try {
    for await (const news of compare(prompt, samplingOf(request, seed), adapters, signal))
      changeColumns(id, places.slice(news.result, news.result + 1), ({ turns, state }) => {
        const turn = turns.at(-1);
        return {
          state: news.finish_reason ? "done" : state,
          turns: turn ? withLast(turns, grown(turn, news)) : turns,
        };
      });
  } catch (error) {
    const problem = signal.aborted ? null : readable(asProblem(error), adapters);
    changeColumns(id, places, ({ state }) =>
      state === "running" ? { state: signal.aborted ? "stopped" : "done", problem } : {},
    );
  }
}

/**
 * The problem with one message, at the field to change: a prompt that is too long is a fault of `max_tokens`, too, and a
 * problem with an adapter is one with the expression.
 * @param {Problem} problem
 * @param {string[]} adapters
 */
function readable({ status, message, errors, retryAfter }, adapters) {
  const placed = errors.map(({ loc, message: of }) => {
    if (loc[0] === "messages") return { loc: ["prompt"], message: of };
    if (loc[0] !== "adapters") return { loc, message: of };
    const [, place, rest] = /^item (\d+): (.*)$/s.exec(of) ?? [];
    const which = place === undefined ? undefined : adapters[Number(place)];
    const isTyped = which === undefined || which === expression.value.trim();
    return { loc: ["adapter"], message: isTyped ? (rest ?? of) : `${which}: ${rest}` };
  });
  const ofPrompt = placed.filter(({ loc }) => loc[0] === "prompt");
  const found = ofPrompt.length ? ofPrompt : placed;
  if (!found.length && [404, 409].includes(status)) found.push({ loc: ["adapter"], message });
  const only = found.length === 1 ? found[0] : undefined;
  const words = only && errors.length ? only.message : message;
  return new Problem(status, words, found, retryAfter);
}

const drawn = () => Math.floor(Math.random() * MOST_SEEDS);

/** Answer the request under each expression, side by side. All columns have one seed. @param {string[]} expressions */
export function run(expressions) {
  const request = asked.value;
  const seed = request.seed ?? (request.temperature === 0 ? null : drawn());
  const columns = expressions.map((of) => blank(of, [turnOf(request.prompt)]));
  /** @type {Run} */
  const made = { id: (last += 1), at: Date.now(), request, seed, columns: seeded(columns, seed) };
  runs.set([made, ...runs.value].slice(0, MOST_RUNS));
  shown.set(made.id);
  writeAddress(true);
  answer(made, [...columns.keys()]);
}

/** @param {string} of @param {Turn[]} turns @returns {Column} */
const blank = (of, turns) => ({ expression: of, turns, state: "running", problem: null });

/** The columns with the seed that the last turn's answers are drawn with. @param {Column[]} columns @param {number | null} seed */
const seeded = (columns, seed) =>
  columns.map((column) => {
    const turn = column.turns.at(-1);
    return turn
      ? { ...column, turns: withLast(column.turns, { ...turn, answer: { ...turn.answer, seed } }) }
      : column;
  });

/** @param {Run} run @param {number[]} places @param {(turns: Turn[]) => Turn[]} change @param {number | null} seed */
function again(run, places, change, seed) {
  const columns = run.columns.map((column, place) => {
    if (!places.includes(place)) return column;
    const [one] = seeded([{ ...column, turns: change(column.turns) }], seed);
    return one ?? column;
  });
  const next = { ...run, seed, columns };
  changeRun(run.id, () => next);
  answer(next, places);
}

/** Ask each column's thread one more question. @param {Run} run @param {string} text */
export const reply = (run, text) =>
  again(run, [...run.columns.keys()], (turns) => [...turns, turnOf(text)], run.seed);

/** Ask a question of all threads in other words, and drop what followed. @param {Run} run @param {number} place @param {string} text */
export const edit = (run, place, text) =>
  again(run, [...run.columns.keys()], (turns) => [...turns.slice(0, place), turnOf(text)], run.seed);

/** Answer a column's last turn again, with another seed. @param {Run} run @param {number} place */
export const regenerate = (run, place) =>
  again(
    run,
    [place],
    (turns) => turns.slice(0, -1).concat(turns.slice(-1).map((turn) => turnOf(turn.asked))),
    run.request.temperature === 0 ? run.seed : drawn(),
  );

/** Go on with a column's answer where it was cut off. @param {Run} run @param {number} place */
export const goOn = (run, place) => again(run, [place], (turns) => turns, run.seed);

/** Answer the columns that have a problem again. @param {Run} run */
export const retry = (run) =>
  answer(
    run,
    [...run.columns.keys()].filter((place) => run.columns[place]?.problem),
  );

/** The answers so far stay. */
export const stop = () => running.abort();

/** Show an earlier run, and its request. @param {Run} run */
export function show(run) {
  asked.set(run.request);
  const all = run.columns.map((column) => column.expression);
  const mine = all.find((of) => of !== "base");
  expression.set(mine ?? "");
  beside.set(mine ? all.filter((of) => of !== mine) : ["base"]);
  shown.set(run.id);
  writeAddress(true);
}

/** Show no run, and ask under an expression. @param {string} of @param {boolean | null} isChat null: as it is */
export function begin(of, isChat) {
  if (isChat !== null) asked.update({ isChat });
  expression.set(of);
  shown.set(0);
}

/** Faults belong to a request: they vanish when it changes, and so do columns without an answer. */
export function forgetProblems() {
  const run = runOf(runs.value, shown.value);
  if (!run?.columns.some((column) => column.problem)) return;
  const columns = run.columns.filter((column) => column.turns.some((turn) => turn.answer.text));
  if (columns.length)
    changeRun(run.id, () => ({ ...run, columns: columns.map((one) => ({ ...one, problem: null })) }));
  else {
    runs.set(runs.value.filter((one) => one !== run));
    shown.set(0);
  }
}
