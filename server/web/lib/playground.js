/** What the playground asks and is answered; it goes on while one looks at other views. */
import { Problem } from "./api.js";
import { pinned } from "./expression.js";
import { NOTHING, generate, shadesOf } from "./generation.js";
import { asProblem } from "./resource.js";
import { key, perKey } from "./session.js";

/** @import { Answer, Request } from "./generation.js" */
/** @import { Shades } from "../parts/tokens.js" */

/**
 * @typedef {{expression: string, answer: Answer, state: "running" | "done" | "stopped", problem: Problem | null,
 *   shades: Shades | null}} Column
 */

export const asked = perKey(
  /** @type {Request} */ ({
    prompt: "",
    isChat: true,
    system: "",
    maxTokens: 64,
    temperature: 0,
    topP: null,
    seed: null,
  }),
);
export const expression = perKey("");
/** Other expressions that answer beside it. */
export const beside = perKey(/** @type {string[]} */ (["base"]));
export const columns = perKey(/** @type {Column[]} */ ([]));
let running = new AbortController();
key.listeners.add(() => stop());

/** @param {string} of @param {Partial<Column>} fields @param {AbortSignal} signal of the run that has news */
function update(of, fields, signal) {
  if (signal !== running.signal) return; // another one has taken its place
  columns.set(columns.value.map((column) => (column.expression === of ? { ...column, ...fields } : column)));
}

/**
 * Answer under one expression, then find what its adapters changed.
 * @param {Request} request
 * @param {string} of
 * @param {AbortSignal} signal
 */
async function answer(request, of, signal) {
  let last = NOTHING;
  try {
    for await (const news of generate(request, of, signal)) {
      last = news;
      update(of, { answer: news }, signal);
    }
    update(of, { state: "done" }, signal);
    if (last.adapters.length && last.text)
      update(of, { shades: await shadesOf(request, pinned(last.adapters), last.text, signal) }, signal);
  } catch (error) {
    if (signal.aborted) update(of, { state: last.finishReason ? "done" : "stopped" }, signal);
    else update(of, { state: "done", problem: ofExpression(asProblem(error)) }, signal);
  }
}

/** An adapter that isn't there, or doesn't fit: the expression is where that belongs. @param {Problem} problem */
function ofExpression(problem) {
  if (problem.errors.length || ![404, 409].includes(problem.status)) return problem;
  return new Problem(problem.status, problem.message, [{ loc: ["adapter"], message: problem.message }]);
}

/** Answer what is asked under each of these, in the place of what was answered before. @param {string[]} expressions */
export function run(expressions) {
  running.abort();
  running = new AbortController();
  const { signal } = running;
  columns.set(
    expressions.map((of) => ({ expression: of, answer: NOTHING, state: "running", problem: null, shades: null })),
  );
  for (const of of expressions) void answer(asked.value, of, signal);
}

/** What there is of the answers stays. */
export const stop = () => running.abort();

/** Faults are those of what was asked: they go when it changes. */
export function forgetProblems() {
  if (columns.value.some((column) => column.problem))
    columns.set(columns.value.map((column) => ({ ...column, problem: null })));
}
