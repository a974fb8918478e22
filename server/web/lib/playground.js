/** The playground's requests and answers; they continue while other views are open. */
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
/** The other expressions to answer under. */
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
 * Answer under one expression, then compare the tokens' log-probabilities with the base's.
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

/** Whether a problem with an adapter belongs to the expression field: it is unknown or doesn't fit. @param {Problem} problem */
function ofExpression(problem) {
  if (problem.errors.length || ![404, 409].includes(problem.status)) return problem;
  return new Problem(problem.status, problem.message, [{ loc: ["adapter"], message: problem.message }]);
}

/** Answer the request under each expression, and replace earlier answers. @param {string[]} expressions */
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

/** Faults belong to a request: they vanish when it changes. */
export function forgetProblems() {
  if (columns.value.some((column) => column.problem))
    columns.set(columns.value.map((column) => ({ ...column, problem: null })));
}
