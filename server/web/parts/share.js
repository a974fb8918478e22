/** A request as code, and a run as a file. */
import { linkTo } from "../lib/api.js";
import { promptOf, samplingOf, turnOf } from "../lib/generation.js";
import { html, useState } from "../lib/html.js";
import { key } from "../lib/session.js";
import { useStore } from "../lib/store.js";

/** @import { Request } from "../lib/generation.js" */
/** @import { Run } from "../lib/playground.js" */

const LANGUAGES = /** @type {const} */ (["curl", "Python", "openai"]);

/** @param {Request} request */
const parts = (request) => ({
  prompt: promptOf(request, [turnOf(request.prompt)]),
  sampling: samplingOf(request, request.seed),
});

/** As Python writes it. @param {unknown} value @returns {string} */
function python(value) {
  if (Array.isArray(value)) return `[${value.map(python).join(", ")}]`;
  if (value && typeof value === "object")
    return `{${Object.entries(value)
      .map(([name, of]) => `${JSON.stringify(name)}: ${python(of)}`)
      .join(", ")}}`;
  return JSON.stringify(value); // of strings and numbers alone
}

/**
 * A program that asks for the answer of each adapter. The key isn't in it, but the name of a variable that has it.
 * @param {typeof LANGUAGES[number]} language
 * @param {Request} request
 * @param {string[]} adapters
 * @param {boolean} hasKey
 */
function codeOf(language, request, adapters, hasKey) {
  const { prompt, sampling } = parts(request);
  if (language === "curl") {
    const header = hasKey ? '  -H "Authorization: Bearer $SMOLORA_API_KEY" \\\n' : "";
    const call = (/** @type {string} */ adapter) => {
      const json = JSON.stringify({ ...prompt, adapter, ...sampling }, null, 2).replaceAll("'", "'\\''");
      return `curl ${linkTo("generate")} \\\n${header}  -H "Content-Type: application/json" \\\n  -d '${json}'\n`;
    };
    return adapters.map(call).join("echo\n");
  }
  const [first = ""] = adapters;
  const isOne = adapters.length === 1;
  // a loop over the adapters, unless there is only one
  const each = (/** @type {string} */ code) =>
    isOne ? code : `for adapter in ${python(adapters)}:\n${code.replace(/(^|\n)(?=[^\n])/g, "$1    ")}`;
  const named = (/** @type {object} */ fields) =>
    Object.entries(fields).map(([name, value]) => /** @type {const} */ ([name, python(value)]));
  const own = isOne ? python(first) : "adapter";
  const lines = (
    /** @type {Iterable<readonly [string, string]>} */ fields,
    /** @type {string} */ between,
    quotes = "",
  ) => [...fields].map(([name, value]) => `    ${quotes}${name}${quotes}${between}${value},\n`).join("");
  if (language === "Python") {
    const header = hasKey ? 'headers = {"Authorization": f"Bearer {os.environ[\'SMOLORA_API_KEY\']}"}\n' : "";
    const body = lines([...named(prompt), ["adapter", own], ...named(sampling)], ": ", '"');
    const call = `body = {
${body}}
response = httpx.post("${linkTo("generate")}", json=body, ${hasKey ? "headers=headers, " : ""}timeout=60)
response.raise_for_status()
print(response.json()["choices"][0]["text"])
`;
    return `${hasKey ? "import os\n\n" : ""}import httpx

${header}${each(call)}`;
  }
  const { max_tokens = 64, ...rest } = sampling; // OpenAI's default is another one
  const given = lines([["model", own], ...named({ ...prompt, max_tokens, ...rest })], "=");
  const [make, text] = request.isChat ? ["chat.completions", "message.content"] : ["completions", "text"];
  const call = `answer = client.${make}.create(
${given})
print(answer.choices[0].${text})
`;
  return `${hasKey ? "import os\n\n" : ""}from openai import OpenAI

client = OpenAI(base_url="${linkTo("v1")}", api_key=${hasKey ? 'os.environ["SMOLORA_API_KEY"]' : '"any"'})
${each(call)}`;
}

/** @param {{request: Request, adapters: string[]}} props */
export function Code({ request, adapters }) {
  const [language, setLanguage] = useState(/** @type {typeof LANGUAGES[number]} */ ("curl"));
  const hasKey = Boolean(useStore(key));
  const [isCopied, setCopied] = useState(false);
  const code = codeOf(language, request, adapters, hasKey);
  const copy = () =>
    navigator.clipboard?.writeText(code).then(
      () => setCopied(true),
      () => {},
    );
  return html`<div class="snippet">
    <p class="row" role="group" aria-label="Language">
      ${LANGUAGES.map(
        (of) =>
          html`<button type="button" class="plain" aria-pressed=${of === language} onClick=${() => {
            setLanguage(of);
            setCopied(false);
          }}>${of}</button>`,
      )}
      ${navigator.clipboard ? html`<button type="button" class="link" onClick=${copy}>${isCopied ? "Copied" : "Copy code"}</button>` : null}
    </p>
    <pre tabindex="0" role="region" aria-label="Code"><code>${code}</code></pre>
  </div>`;
}

/** A run without what only the page needs. @param {Run} run */
const plain = ({ at, request, seed, columns }) => ({
  at: new Date(at).toISOString(),
  request: { ...parts(request).sampling, seed, is_chat: request.isChat, system: request.system },
  answers: columns.map(({ expression, turns }) => ({
    expression,
    turns: turns.map(({ asked, answer: { adapters, text, seed: own, finishReason, tokens, warnings } }) => ({
      asked,
      text,
      adapters,
      seed: own,
      finish_reason: finishReason,
      tokens,
      warnings,
    })),
  })),
});

/** @param {string} text */
const quoted = (text) => text.replace(/^/gm, "> ");

/** @param {Run} run */
function markdownOf({ at, request, seed, columns }) {
  const settings = Object.entries(samplingOf(request, seed)).map(([name, value]) => `${name} ${value}`);
  const head = [`# Playground, ${new Date(at).toISOString()}`, settings.join(", ")];
  if (request.isChat && request.system) head.push(`System message:\n\n${quoted(request.system)}`);
  const answers = columns.map(({ expression, turns }) =>
    [`## \`${expression}\``, ...turns.flatMap(({ asked, answer }) => [quoted(asked), answer.text])].join("\n\n"),
  );
  return `${[...head, ...answers].join("\n\n")}\n`;
}

/** Make the browser save a run, or several. @param {Run | Run[]} of @param {"md" | "json"} kind */
export function save(of, kind) {
  const all = Array.isArray(of) ? of : [of];
  const json = () => JSON.stringify(Array.isArray(of) ? of.map(plain) : plain(of), null, 2);
  const text = kind === "md" ? all.map(markdownOf).join("\n") : `${json()}\n`;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(
    new Blob([text], { type: kind === "md" ? "text/markdown" : "application/json" }),
  );
  link.download = `playground-${new Date(all[0]?.at ?? 0).toISOString().slice(0, 19).replaceAll(":", "-")}.${kind}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
