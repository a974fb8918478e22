/** Playground: one prompt under a blend of adapters, streamed, beside the base or other blends. */
import { listAdapters } from "../lib/adapters.js";
import { Problem, ask } from "../lib/api.js";
import { parse, pinned } from "../lib/expression.js";
import { NOTHING, generate, shadesOf } from "../lib/generation.js";
import { html, useEffect, useState } from "../lib/html.js";
import { asProblem, useAction, useResource } from "../lib/resource.js";
import { to } from "../lib/route.js";
import { Store, useStore } from "../lib/store.js";
import { Check, Choice, Fault, Field, Form, NumberField, TextField } from "../parts/basics.js";
import { AnswerColumn } from "../parts/answer.js";
import { Blend } from "../parts/blend.js";

/** @import { Answer, Request } from "../lib/generation.js" */
/** @import { Shades } from "../parts/tokens.js" */

/**
 * @typedef {{expression: string, answer: Answer, isRunning: boolean, problem: Problem | null, shades: Shades | null,
 *   request: Request}} Column
 */

/** Kept while one looks at other views. @type {Store<Request>} */
const asked = new Store(
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
/** @type {Store<string>} */
export const expression = new Store("");
/** Other expressions that answer beside it. @type {Store<string[]>} */
const beside = new Store(/** @type {string[]} */ (["base"]));
/** @type {Store<Column[]>} */
const columns = new Store(/** @type {Column[]} */ ([]));
let running = new AbortController();

/** @param {string} of @param {Partial<Column>} fields */
function update(of, fields) {
  columns.set(columns.value.map((column) => (column.expression === of ? { ...column, ...fields } : column)));
}

/** Answer under one expression, then find what its adapters changed. @param {Request} request @param {string} of @param {AbortSignal} signal */
async function answer(request, of, signal) {
  let last = NOTHING;
  try {
    for await (const news of generate(request, of, signal)) {
      last = news;
      update(of, { answer: news });
    }
    update(of, { isRunning: false });
    if (last.adapters.length && last.text)
      update(of, { shades: await shadesOf(request, pinned(last.adapters), last.text, signal) });
  } catch (error) {
    // what was stopped by hand keeps what it has
    update(
      of,
      signal.aborted ? { isRunning: false } : { isRunning: false, problem: ofExpression(asProblem(error)) },
    );
  }
}

/** An adapter that isn't there, or doesn't fit: the expression is where that belongs. @param {Problem} problem */
function ofExpression(problem) {
  if (problem.errors.length || ![404, 409].includes(problem.status)) return problem;
  return new Problem(problem.status, problem.message, [{ loc: ["adapter"], message: problem.message }]);
}

/** @param {string[]} expressions */
function run(expressions) {
  running.abort();
  running = new AbortController();
  const request = asked.value;
  const { signal } = running;
  columns.set(
    expressions.map((of) => ({
      expression: of,
      answer: NOTHING,
      isRunning: true,
      problem: null,
      shades: null,
      request,
    })),
  );
  for (const of of expressions) void answer(request, of, signal);
}

export function PlaygroundView() {
  const request = useStore(asked);
  const blend = useStore(expression);
  const others = useStore(beside);
  const shown = useStore(columns);
  const adapters = useResource(listAdapters, [], 10);
  const mine = blend.trim() || "base";
  const expressions = [...new Set([...others, mine])];
  const isRunning = shown.some((column) => column.isRunning);
  const problem = shown.find((column) => column.problem)?.problem ?? null;
  const [isEmpty, setEmpty] = useState(false);
  const change = (/** @type {keyof Request} */ name) => (/** @type {any} */ value) =>
    asked.update({ [name]: value });

  useEffect(() => () => running.abort(), []);

  function submit() {
    setEmpty(!request.prompt);
    if (request.prompt) run(expressions);
  }

  return html`<h1>Playground</h1>
    <div class="sides">
      <${Form} label="Request" className="card" onSubmit=${submit}>
        <${Choice} legend="Kind of prompt" name="kind" value=${request.isChat} words=${["Question", "Text to continue"]} onChange=${change("isChat")} />
        <${Field}
          label=${request.isChat ? "Question" : "Text"}
          name="prompt"
          problem=${isEmpty && !request.prompt ? EMPTY : problem}
          hint=${request.isChat ? "Goes through the model's chat template." : "The model goes on right after its last character."}
        >
          ${(/** @type {Record<string, unknown>} */ attributes) =>
            html`<textarea
              ...${attributes}
              rows="4"
              value=${request.prompt}
              onInput=${(/** @type {Event & {currentTarget: HTMLTextAreaElement}} */ event) => asked.update({ prompt: event.currentTarget.value })}
              onKeyDown=${(/** @type {KeyboardEvent} */ event) => {
                if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
                  event.preventDefault();
                  submit();
                }
              }}
            ></textarea>`}
        <//>
        <p class="row">
          <button type="submit">Generate</button>
          <button type="button" class="plain" disabled=${!isRunning} onClick=${() => running.abort()}>Stop</button>
          <small>Ctrl + Enter</small>
        </p>
        <h2>Adapters</h2>
        <${Fault} problem=${adapters.problem} />
        <${Blend} adapters=${adapters.data} value=${blend} problem=${problem} onChange=${(/** @type {string} */ text) => expression.set(text)} />
        <fieldset>
          <legend>Answered side by side</legend>
          <${Check} checked=${others.includes("base")} onChange=${() => beside.set(others.includes("base") ? others.filter((of) => of !== "base") : ["base", ...others])}>the base<//>
          ${others
            .filter((of) => of !== "base")
            .map(
              (of) =>
                html`<${Check} checked onChange=${() => beside.set(others.filter((other) => other !== of))}><code>${of}</code><//>`,
            )}
          ${
            others.includes(mine)
              ? null
              : html`<button type="button" class="plain" onClick=${() => beside.set([...others, mine])}>Keep <code>${mine}</code> beside the next ones</button>`
          }
        </fieldset>
        ${(parse(blend) ?? []).length > 1 ? html`<${SaveBlend} blend=${blend} onSaved=${adapters.reload} />` : null}
        <details>
          <summary>Sampling</summary>
          ${
            request.isChat
              ? html`<${TextField} label="System message" value=${request.system} onChange=${change("system")} />`
              : null
          }
          <div class="fields">
            <${NumberField} label="Longest answer" name="max_tokens" hint="tokens" value=${request.maxTokens} problem=${problem} step="1" placeholder="64" onChange=${change("maxTokens")} />
            <${NumberField} label="Temperature" name="temperature" hint="0: always the likeliest token" value=${request.temperature} problem=${problem} placeholder="0.7" onChange=${change("temperature")} />
            <${NumberField} label="Top p" name="top_p" value=${request.topP} problem=${problem} placeholder="1" onChange=${change("topP")} />
            <${NumberField} label="Seed" name="seed" hint="empty: a new one each time" value=${request.seed} problem=${problem} step="1" onChange=${change("seed")} />
          </div>
        </details>
      <//>
      <section aria-label="Answers" class="answers">
        ${
          shown.length
            ? shown.map((column) => html`<${AnswerColumn} key=${column.expression} column=${column} />`)
            : html`<${Welcome} adapters=${adapters.data?.own ?? null} />`
        }
      </section>
    </div>`;
}

const EMPTY = new Problem(422, "is empty", [{ loc: ["prompt"], message: "write something first" }]);

/** @param {{adapters: Adapter[] | null}} props */
function Welcome({ adapters }) {
  const example = "What is the capital of France?";
  return html`<div class="card">
    <p>Answers appear here as they are made, those of several adapters side by side.</p>
    <p><button type="button" class="plain" onClick=${() => asked.update({ prompt: example, isChat: true })}>Try “${example}”</button></p>
    ${
      adapters && !adapters.length
        ? html`<p>There is no adapter yet. <a href=${to("train", "new")}>Train one</a> from a file of examples, or <a href=${to("adapters")}>upload one</a> that PEFT saved.</p>`
        : null
    }
  </div>`;
}

/** @param {{blend: string, onSaved: () => void}} props */
function SaveBlend({ blend, onSaved }) {
  const [name, setName] = useState("");
  const [saved, setSaved] = useState("");
  const save = useAction(async () => {
    const version = await ask("POST", `/compositions/${encodeURIComponent(name)}`, {
      json: { expression: blend },
    });
    setSaved(`${version.name}@${version.version}`);
    onSaved();
  });
  return html`<details>
    <summary>Save this blend under a name</summary>
    <div class="row end">
      <${TextField} label="Name" name="name" value=${name} onChange=${setName} />
      <button type="button" disabled=${!name || save.busy} onClick=${() => save.run()}>Save</button>
    </div>
    <${Fault} problem=${save.problem} />
    ${saved && html`<p role="status">Saved as <a href=${to("adapters", saved.split("@")[0] ?? "")}>${saved}</a>.</p>`}
  </details>`;
}
