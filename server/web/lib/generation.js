/** A streamed answer, and the changes that an adapter made to its probabilities. */
import { Problem, ask, events } from "./api.js";

/**
 * @typedef {{prompt: string, isChat: boolean, system: string, maxTokens: number | null, temperature: number | null,
 *   topP: number | null, seed: number | null}} Request
 */

/** The prompt and sampling for /generate and /compare; missing values have the server's defaults. @param {Request} request */
export function bodyOf(request) {
  /** @type {Record<string, unknown>} */
  const body = promptOf(request);
  if (request.maxTokens !== null) body["max_tokens"] = request.maxTokens;
  if (request.temperature !== null) body["temperature"] = request.temperature;
  if (request.topP !== null) body["top_p"] = request.topP;
  if (request.seed !== null) body["seed"] = request.seed;
  return body;
}

/** @param {Request} request @returns {Record<string, unknown>} */
function promptOf({ prompt, isChat, system }) {
  if (!isChat) return { prompt };
  const turns = [{ role: "user", content: prompt }];
  return { messages: system ? [{ role: "system", content: system }, ...turns] : turns };
}

/**
 * @typedef {{text: string, adapters: Part[], seed: number | null, finishReason: string, tokens: number, cached: number,
 *   ttft: number, total: number, warnings: string[]}} Answer times in seconds
 */

/** @type {Answer} */
export const NOTHING = {
  text: "",
  adapters: [],
  seed: null,
  finishReason: "",
  tokens: 0,
  cached: 0,
  ttft: 0,
  total: 0,
  warnings: [],
};

/**
 * Yields the answer so far, after each piece of text and at its end. Throws a Problem, also if it ends early.
 * @param {Request} request
 * @param {string} expression
 * @param {AbortSignal} signal
 * @returns {AsyncGenerator<Answer>}
 */
export async function* generate(request, expression, signal) {
  const json = { ...bodyOf(request), adapter: expression || "base", stream: true };
  let answer = NOTHING;
  for await (const { data } of events("POST", "/generate", { json, signal })) {
    if (data === "[DONE]") continue;
    const news = JSON.parse(data);
    if (news.text) answer = { ...answer, text: answer.text + news.text };
    if (news.finish_reason)
      answer = {
        ...answer,
        adapters: news.adapters,
        seed: news.seed,
        finishReason: news.finish_reason,
        tokens: news.usage.completion_tokens,
        cached: news.usage.cached_tokens,
        ttft: news.timing.ttft_ms / 1000,
        total: news.timing.total_ms / 1000,
        warnings: news.warnings,
      };
    yield answer;
  }
  if (!answer.finishReason) throw new Problem(0, "the answer broke off before its end"); // such as by a proxy
}

/**
 * How likely the text's tokens are under the adapters and under the base.
 * @param {Request} request
 * @param {string} expression
 * @param {string} text
 * @param {AbortSignal} signal
 * @returns {Promise<import("../parts/tokens.js").Shades>}
 */
export async function shadesOf(request, expression, text, signal) {
  const json = {
    ...promptOf(request),
    adapters: [expression, "base"],
    score: [text],
    max_tokens: 1,
    temperature: 0,
    logprobs: 5,
  };
  const { results } = await ask("POST", "/compare", { json, signal });
  return { tuned: results[0].scores[0].logprobs, base: results[1].scores[0].logprobs };
}
