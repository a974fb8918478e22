/** Streamed answers of several adapters to one prompt, and the log-probabilities of their tokens. */
import { Problem, events } from "./api.js";

/**
 * @typedef {{prompt: string, isChat: boolean, system: string, maxTokens: number | null, temperature: number | null,
 *   topP: number | null, seed: number | null}} Request
 */

/**
 * @typedef {{text: string, adapters: Part[], seed: number | null, finishReason: string, tokens: number, prompt: number,
 *   cached: number, ttft: number, total: number, warnings: string[]}} Answer `tokens`, `prompt`, `cached`: numbers of
 *   tokens; times in seconds
 * @typedef {{tuned: ScoredToken[], base: ScoredToken[] | null}} Scores of an answer's tokens, under its adapters and
 *   under the base; null: they are the base's, or not known yet
 * @typedef {{asked: string, answer: Answer, scores: Scores}} Turn a question, or a text to continue, and its answer
 */

/** @type {Answer} */
const NOTHING = {
  text: "",
  adapters: [],
  seed: null,
  finishReason: "",
  tokens: 0,
  prompt: 0,
  cached: 0,
  ttft: 0,
  total: 0,
  warnings: [],
};

/** @param {string} asked @returns {Turn} */
export const turnOf = (asked) => ({ asked, answer: NOTHING, scores: { tuned: [], base: null } });

/** Sampling as the API has it; missing values have the server's defaults. @param {Request} request @param {number | null} seed */
export function samplingOf(request, seed) {
  /** @type {Record<string, unknown>} */
  const body = {};
  if (request.maxTokens !== null) body["max_tokens"] = request.maxTokens;
  if (request.temperature !== null) body["temperature"] = request.temperature;
  if (request.topP !== null) body["top_p"] = request.topP;
  if (seed !== null) body["seed"] = seed;
  return body;
}

/**
 * The prompt of a thread's last turn. If that turn has an answer, it is the prompt for more of the answer.
 * @param {Pick<Request, "isChat" | "system">} request
 * @param {Turn[]} turns
 * @returns {Record<string, unknown>}
 */
export function promptOf({ isChat, system }, turns) {
  if (!isChat) return { prompt: turns.map((turn) => turn.asked + turn.answer.text).join("") };
  const messages = turns.flatMap(({ asked, answer }) => [
    { role: "user", content: asked },
    ...(answer.text ? [{ role: "assistant", content: answer.text }] : []),
  ]);
  if (system) messages.unshift({ role: "system", content: system });
  return messages.at(-1)?.role === "assistant" ? { messages, continue_final_message: true } : { messages };
}

/**
 * The events of POST /compare: each has the `result`, an index of `adapters`. Throws a Problem, also if it ends early.
 * @param {Record<string, unknown>} prompt
 * @param {Record<string, unknown>} sampling
 * @param {string[]} adapters
 * @param {AbortSignal} signal
 * @returns {AsyncGenerator<any>}
 */
export async function* compare(prompt, sampling, adapters, signal) {
  const json = { ...prompt, ...sampling, adapters, stream: true, logprobs: 5, reference: "base" };
  let isWhole = false;
  for await (const { data } of events("POST", "/compare", { json, signal })) {
    if (data === "[DONE]") isWhole = true;
    else yield JSON.parse(data);
  }
  if (!isWhole) throw new Problem(0, "the answer broke off before its end"); // such as by a proxy
}

/** The turn with what an event adds to it. @param {Turn} turn @param {any} news @returns {Turn} */
export function grown(turn, news) {
  const { answer, scores } = turn;
  if (news.reference) return { ...turn, scores: { ...scores, base: [...(scores.base ?? []), ...news.reference] } };
  scores.tuned.push(...(news.logprobs ?? [])); // copying it at each token would take long
  const text = answer.text + (news.text ?? "");
  if (!news.finish_reason) return { ...turn, answer: { ...answer, text } };
  return {
    ...turn,
    answer: {
      text,
      adapters: news.adapters,
      seed: answer.seed,
      finishReason: news.finish_reason,
      tokens: answer.tokens + news.usage.completion_tokens,
      prompt: answer.tokens ? answer.prompt : news.usage.prompt_tokens,
      cached: answer.tokens ? answer.cached : news.usage.cached_tokens,
      ttft: answer.tokens ? answer.ttft : news.timing.ttft_ms / 1000,
      total: answer.total + news.timing.total_ms / 1000,
      warnings: news.warnings,
    },
  };
}
