/** Playground: one prompt under a blend of adapters, streamed, next to the base or other blends. */
import { listAdapters } from "../lib/adapters.js";
import { Problem, ask, get } from "../lib/api.js";
import { checked, parse } from "../lib/expression.js";
import { html, useEffect, useRef, useState } from "../lib/html.js";
import { asked, beside, columns, expression, forgetProblems, run, stop } from "../lib/playground.js";
import { useAction, useResource } from "../lib/resource.js";
import { to } from "../lib/route.js";
import { useStore } from "../lib/store.js";
import { AnswerColumn } from "../parts/answer.js";
import { Check, Choice, Fault, Field, Form, NumberField, TextField } from "../parts/basics.js";
import { Blend } from "../parts/blend.js";

/** @import { Request } from "../lib/generation.js" */
/** @import { Typed } from "../parts/basics.js" */

const EMPTY = new Problem(422, "is empty", [{ loc: ["prompt"], message: "write something first" }]);

export function PlaygroundView() {
  const request = useStore(asked);
  const blend = useStore(expression);
  const others = useStore(beside);
  const shown = useStore(columns);
  const adapters = useResource(listAdapters, [], 10);
  const base = useResource((signal) => get("/ready", signal), []);
  const hasTurns = base.data?.chat_template ?? true;
  useEffect(() => {
    if (!hasTurns) asked.update({ isChat: false });
  }, [hasTurns]);
  const answers = useRef(/** @type {HTMLElement | null} */ (null));
  const mine = blend.trim() || "base";
  const isRunning = shown.some((column) => column.state === "running");
  const problem = shown.find((column) => column.problem)?.problem ?? null;
  const [isEmpty, setEmpty] = useState(false);
  const change = (/** @type {keyof Request} */ name) => (/** @type {any} */ value) => {
    asked.update({ [name]: value });
    forgetProblems();
  };

  function submit() {
    setEmpty(!request.prompt);
    if (!request.prompt) return;
    run([...new Set([mine, ...others])]);
    // on a phone the answers are below the form
    if (matchMedia("(max-width: 52rem)").matches) answers.current?.scrollIntoView({ block: "start" });
  }

  /** @param {KeyboardEvent} event */
  function onKeyDown(event) {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    submit();
  }

  return html`<h1>Playground</h1>
    <p class="muted">${base.data?.model ?? "The model"}, as it is (the base) or with any of your adapters.</p>
    <div class="sides">
      <div onKeyDown=${onKeyDown}>
        <${Form} label="Request" className="card" onSubmit=${submit}>
          ${hasTurns ? html`<${Choice} legend="Kind of prompt" name="kind" value=${request.isChat} words=${["Question", "Text to continue"]} onChange=${change("isChat")} />` : null}
          <${Field}
            label=${request.isChat ? "Question" : "Text"}
            name="prompt"
            problem=${isEmpty && !request.prompt ? EMPTY : problem}
            hint=${request.isChat ? "Sent as a turn of a chat." : "The model continues right after its last character."}
          >
            ${(/** @type {object} */ attributes) =>
              html`<textarea ...${attributes} dir="auto" rows="4" value=${request.prompt} onInput=${(/** @type {Typed} */ event) => change("prompt")(event.currentTarget.value)}></textarea>`}
          <//>
          <p class="row">
            <button type="submit">Generate</button>
            <button type="button" class="plain" disabled=${!isRunning} onClick=${stop}>Stop</button>
            <small class="wide-only">Ctrl + Enter</small>
          </p>
          <h2>Adapters</h2>
          <${Fault} problem=${adapters.problem} />
          <${Blend} adapters=${adapters.data} value=${blend} problem=${problem} onChange=${(
            /** @type {string} */ text,
          ) => {
            expression.set(text);
            forgetProblems();
          }} />
          <${SideBySide} mine=${mine} others=${others} />
          ${(parse(blend) ?? []).length > 1 ? html`<${SaveBlend} blend=${blend} onSaved=${adapters.reload} />` : null}
          <details>
            <summary>Sampling</summary>
            ${request.isChat ? html`<${TextField} label="System message" value=${request.system} onChange=${change("system")} />` : null}
            <div class="fields">
              <${NumberField} label="Longest answer" name="max_tokens" hint="tokens" value=${request.maxTokens} problem=${problem} step="1" placeholder="64" onChange=${change("maxTokens")} />
              <${NumberField} label="Temperature" name="temperature" hint="0: always the likeliest token" value=${request.temperature} problem=${problem} placeholder="0.7" onChange=${change("temperature")} />
              <${NumberField} label="Top p" name="top_p" value=${request.topP} problem=${problem} placeholder="1" onChange=${change("topP")} />
              <${NumberField} label="Seed" name="seed" hint="empty: a new one each time" value=${request.seed} problem=${problem} step="1" onChange=${change("seed")} />
            </div>
          </details>
        <//>
      </div>
      <section aria-label="Answers" class="answers" ref=${answers}>
        ${
          shown.length
            ? shown.map((column) => html`<${AnswerColumn} key=${column.expression} column=${column} />`)
            : html`<${Welcome} adapters=${adapters.data?.own ?? null} example=${hasTurns ? QUESTION : TEXT} />`
        }
      </section>
    </div>`;
}

const QUESTION = { prompt: "What is the capital of France?", isChat: true };
/** For a base without a chat template. */
const TEXT = { prompt: "The capital of France is", isChat: false };

/** @param {{adapters: Adapter[] | null, example: typeof QUESTION}} props */
function Welcome({ adapters, example }) {
  const tryExample = () => {
    asked.update(example);
    run(["base"]);
  };
  return html`<div class="card">
    <p>Answers appear here as they are generated, with several adapters side by side.</p>
    <p><button type="button" class="plain" onClick=${tryExample}>${example.isChat ? "Ask" : "Continue"} “${example.prompt}”</button></p>
    ${
      adapters && !adapters.length
        ? html`<p>There is no adapter yet. <a href=${to("train", "new")}>Train one</a> from a file of examples, or <a href=${to("adapters")}>upload one</a> that PEFT saved.</p>`
        : null
    }
  </div>`;
}

/**
 * The other expressions to answer under: the base, each adapter of the expression alone, and any added ones.
 * @param {{mine: string, others: string[]}} props
 */
function SideBySide({ mine, others }) {
  const terms = parse(mine) ?? [];
  const alone = terms.length > 1 ? terms.map(({ name, pin }) => name + (pin && `@${pin}`)) : [];
  const offered = [...new Set(["base", ...alone, ...others])].filter((of) => of !== mine);
  const toggle = (/** @type {string} */ of) =>
    beside.set(others.includes(of) ? others.filter((other) => other !== of) : [...others, of]);
  return html`<fieldset>
    <legend>Answered side by side</legend>
    <span class="check"><input type="checkbox" checked disabled aria-label="the blend set above" /><code>${mine}</code></span>
    ${offered.map(
      (of) =>
        html`<${Check} key=${of} checked=${others.includes(of)} onChange=${() => toggle(of)}>
          ${of === "base" ? "the base" : alone.includes(of) ? `${of} alone` : html`<code>${of}</code>`}
        <//>`,
    )}
    ${others.includes(mine) || mine === "base" ? null : html`<p><button type="button" class="plain" onClick=${() => toggle(mine)}>Keep <code>${mine}</code> to compare others with</button></p>`}
  </fieldset>`;
}

/** @param {{blend: string, onSaved: () => void}} props */
function SaveBlend({ blend, onSaved }) {
  const [name, setName] = useState("");
  const [saved, setSaved] = useState("");
  const save = useAction(async () => {
    const version = await ask("POST", `/compositions/${checked(name)}`, {
      json: { expression: blend },
    });
    setSaved(`${version.name}@${version.version}`);
    onSaved();
  });
  return html`<details>
    <summary>Save this blend under a name</summary>
    <div class="row end">
      <${TextField} label="Name" name="name" problem=${save.problem} value=${name} onChange=${setName} onEnter=${() => name && save.run()} />
      <button type="button" disabled=${!name || save.busy} onClick=${() => save.run()}>Save</button>
    </div>
    <${Fault} problem=${save.problem} beside=${["name"]} />
    ${saved && html`<p role="status">Saved as <a href=${to("adapters", saved.split("@")[0] ?? "")}>${saved}</a>.</p>`}
  </details>`;
}
