/** Playground: one prompt under a blend of adapters, streamed, next to the base or other blends. */
import { isOfChats, listAdapters, versionOf } from "../lib/adapters.js";
import { Problem, ask, get } from "../lib/api.js";
import { checked, parse } from "../lib/expression.js";
import { count, plural } from "../lib/format.js";
import { promptOf, turnOf } from "../lib/generation.js";
import { html, useEffect, useRef, useState } from "../lib/html.js";
import { lazy } from "../lib/lazy.js";
import {
  asked,
  beside,
  expression,
  forgetProblems,
  reply,
  retry,
  run,
  runOf,
  runs,
  show,
  shown,
  stop,
  writeAddress,
} from "../lib/playground.js";
import { useAction, useResource } from "../lib/resource.js";
import { to } from "../lib/route.js";
import { useStore } from "../lib/store.js";
import { AnswerColumn } from "../parts/answer.js";
import { Check, Choice, Fault, Field, Form, NumberField, SelectField, TextField } from "../parts/basics.js";
import { Blend } from "../parts/blend.js";

/** @import { Listed } from "../lib/adapters.js" */
/** @import { Request } from "../lib/generation.js" */
/** @import { Run } from "../lib/playground.js" */
/** @import { Typed } from "../parts/basics.js" */

const EMPTY = new Problem(422, "is empty", [{ loc: ["prompt"], message: "write something first" }]);
const KINDS = /** @type {[string, string]} */ (["Question", "Text to continue"]);
const IS_MAC = /^Mac/.test(navigator.platform);

export function PlaygroundView() {
  const request = useStore(asked);
  const blend = useStore(expression);
  const others = useStore(beside);
  const current = runOf(useStore(runs), useStore(shown));
  const adapters = useResource(listAdapters, [], 10);
  const base = useResource((signal) => get("/ready", signal), []);
  const hasTurns = base.data?.chat_template ?? true;
  useEffect(() => {
    if (!hasTurns) asked.update({ isChat: false });
  }, [hasTurns]);
  const board = useRef(/** @type {HTMLElement | null} */ (null));
  const mine = blend.trim() || "base";
  const isRunning = current?.columns.some((column) => column.state === "running") ?? false;
  const problem = current?.columns.find((column) => column.problem)?.problem ?? null;
  const [isEmpty, setEmpty] = useState(false);
  const expressions = [...new Set([...(others.includes("base") ? ["base"] : []), mine, ...others])];
  const change = (/** @type {keyof Request} */ name) => (/** @type {any} */ value) => {
    asked.update({ [name]: value });
    forgetProblems();
  };

  function submit() {
    setEmpty(!request.prompt);
    if (!request.prompt) return;
    run(expressions);
    if (board.current) board.current.scrollTop = 0;
    // on a phone the answers are below the form
    if (matchMedia("(max-width: 52rem)").matches) board.current?.scrollIntoView({ block: "start" });
  }

  /** @param {KeyboardEvent} event */
  function onKeyDown(event) {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    submit();
  }

  return html`<h1>Playground</h1>
    <p class="muted">${base.data?.model ?? "The model"}, as it is (the base) or with any of your adapters.</p>
    <div class="playground">
      <div class="ask" tabindex="-1" onKeyDown=${onKeyDown}>
        <${Form} label="Request" className="card" onSubmit=${submit}>
          ${
            hasTurns
              ? html`<${Choice} legend="Kind of prompt" name="kind" value=${request.isChat} words=${KINDS} onChange=${change("isChat")} />
            <${Mismatch} blend=${blend} adapters=${adapters.data} isChat=${request.isChat} onChange=${change("isChat")} />`
              : null
          }
          ${request.isChat ? html`<${TextField} label="System message" value=${request.system} placeholder="none" onChange=${change("system")} />` : null}
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
            <small class="wide-only">${IS_MAC ? "⌘" : "Ctrl"} + Enter</small>
            <${TokenCount} request=${request} />
          </p>
          <${Share} expressions=${expressions} />
          <h2>Adapters</h2>
          <${Fault} problem=${adapters.problem} />
          ${adapters.data || adapters.problem ? null : html`<p class="muted">Loading…</p>`}
          <${Blend} adapters=${adapters.data} value=${blend} problem=${problem} onChange=${(
            /** @type {string} */ text,
          ) => {
            expression.set(text);
            forgetProblems();
          }} />
          <${SideBySide} mine=${mine} others=${others} />
          ${(parse(blend) ?? []).length > 1 ? html`<${SaveBlend} blend=${blend} onSaved=${adapters.reload} />` : null}
          ${parse(blend)?.length ? html`<${BlendLab} blend=${blend} />` : null}
          <details>
            <summary>Settings</summary>
            <div class="fields">
              <${NumberField} label="Max tokens" name="max_tokens" value=${request.maxTokens} problem=${problem} step="1" placeholder="64" onChange=${change("maxTokens")} />
              <${NumberField} label="Temperature" name="temperature" hint="0: always the likeliest token" value=${request.temperature} problem=${problem} placeholder="0.7" onChange=${change("temperature")} />
              <${NumberField} label="Top p" name="top_p" value=${request.topP} problem=${problem} placeholder="1" onChange=${change("topP")} />
              <${NumberField} label="Seed" name="seed" hint="empty: a new one each time" value=${request.seed} problem=${problem} step="1" onChange=${change("seed")} />
            </div>
          </details>
        <//>
        <${History} current=${current} />
      </div>
      <section aria-label="Answers" class="answers" tabindex="0" ref=${board}>
        ${
          current
            ? html`<${Board} key=${current.id} run=${current} isRunning=${isRunning} problem=${problem} />`
            : html`<${Welcome} adapters=${adapters.data?.own ?? null} example=${hasTurns ? QUESTION : TEXT} />`
        }
      </section>
    </div>`;
}

/** The length of the prompt, on demand: counting takes from the key's limits. @param {{request: Request}} props */
function TokenCount({ request }) {
  const prompt = JSON.stringify(promptOf(request, [turnOf(request.prompt)]));
  const [counted, setCounted] = useState({ prompt: "", words: "" });
  const tell = useAction(async () => {
    const { count: number, max_model_len: most } = await ask("POST", "/tokenize", { json: JSON.parse(prompt) });
    setCounted({
      prompt,
      words: `${plural(number, "token")}; prompt and answer together may have ${count(most)}`,
    });
  });
  const isCounted = counted.prompt === prompt;
  return html`<span>
    <span aria-live="polite">${isCounted ? html`<small>${counted.words}</small>` : null}</span>
    ${isCounted ? null : html`<button type="button" class="link" disabled=${!request.prompt || tell.busy} onClick=${() => tell.run()}>Count tokens</button>`}
    <${Fault} problem=${tell.problem} />
  </span>`;
}

/**
 * A hint if an adapter of the blend learned from the other kind of prompt.
 * @param {{blend: string, adapters: Listed | null, isChat: boolean, onChange: (isChat: boolean) => void}} props
 */
function Mismatch({ blend, adapters, isChat, onChange }) {
  const all = [...(adapters?.own ?? []), ...(adapters?.shared ?? [])];
  const versionAt = (/** @type {string} */ name, /** @type {string} */ pin) => {
    const adapter = all.find((one) => one.name === name);
    return adapter && versionOf(adapter, pin);
  };
  const parts = (parse(blend) ?? []).flatMap(({ name, pin }) => {
    const version = versionAt(name, pin);
    return version?.parts ?? (version ? [{ name, version: version.version }] : []);
  });
  const kinds = parts.map(({ name, version }) => isOfChats(versionAt(name, String(version))?.config.kinds));
  const others = parts.filter((_, place) => kinds[place] === !isChat);
  if (!others.length || kinds.includes(isChat)) return null; // parts of both kinds always differ from the prompt
  const names = [...new Set(others.map(({ name }) => name))].join(", ");
  const change = (/** @type {Typed} */ event) => {
    /** @type {HTMLElement | null} */ (event.currentTarget.closest(".ask"))?.focus(); // this button goes away
    onChange(!isChat);
  };
  return html`<p class="warning" role="status">
    ${names} learned from ${isChat ? "plain prompts" : "questions of a chat"}:
    <button type="button" class="link" onClick=${change}>use ${KINDS[isChat ? 1 : 0]}</button>
  </p>`;
}

/** The answers of a run, in equal columns. @param {{run: Run, isRunning: boolean, problem: Problem | null}} props */
function Board({ run: of, isRunning, problem }) {
  const [how, setHow] = useState("tokens");
  const { columns } = of;
  const done = columns.filter((column) => column.state === "done" && !column.problem);
  const canReply = of.request.isChat && !isRunning && columns.every((column) => column.turns.at(-1)?.answer.text);
  return html`<p class="hidden" aria-live="polite">${done.map((column) => `${column.expression} has answered. `)}</p>
    ${problem ? html`<${Fault} problem=${problem} onRetry=${() => retry(of)} />` : null}
    ${
      columns.some((column) => column.turns[0]?.answer.text)
        ? html`<div class="row tools">
            <${SelectField} label="Show" value=${how} onChange=${setHow} options=${[
              ["tokens", "changes of tokens"],
              ["plain", "plain text"],
              ...(columns.length > 1
                ? columns.map((column, place) => [String(place), `differences from ${column.expression}`])
                : []),
            ]} />
            <${Export} of=${of} label="Export" />
          </div>
          ${
            how === "tokens"
              ? html`<p class="legend">
                  <span class="token down-4">less</span> and <span class="token up-4">more</span> likely than under the base.
                  Point at a token to see its likeliest alternatives.
                </p>`
              : null
          }`
        : null
    }
    <div class="board">
      ${columns.map((column, place) => html`<${AnswerColumn} key=${column.expression} run=${of} place=${place} show=${how} />`)}
    </div>
    ${canReply ? html`<${Reply} run=${of} />` : null}`;
}

/** @param {{run: Run}} props */
function Reply({ run: of }) {
  const [text, setText] = useState("");
  const send = () => {
    if (text) reply(of, text);
    setText("");
  };
  return html`<${Form} label="Reply" className="card row end" onSubmit=${send}>
    <${TextField} label="Reply" hint="Goes to each column, which answers in its own thread." className="wide" value=${text} onChange=${setText} />
    <button type="submit" disabled=${!text}>Send</button>
  <//>`;
}

const share = () => import("../parts/share.js");
const Code = lazy(async () => (await share()).Code);

/** @param {{of: Run | Run[], label: string}} props */
function Export({ of, label }) {
  const save = useAction(async (/** @type {"md" | "json"} */ kind) => (await share()).save(of, kind));
  return html`<button type="button" class="plain" onClick=${() => save.run("md")}>${label} Markdown</button>
    <button type="button" class="plain" onClick=${() => save.run("json")}>${label} JSON</button>
    <${Fault} problem=${save.problem} />`;
}

/** The request as a link and as code. @param {{expressions: string[]}} props */
function Share({ expressions }) {
  const [link, setLink] = useState("");
  const [isCode, setCode] = useState(false);
  const request = useStore(asked);
  useEffect(() => setLink(""), [request, expressions.join()]);
  const copy = async () => {
    writeAddress();
    try {
      await navigator.clipboard.writeText(location.href); // browsers refuse this without TLS
      setLink("copied");
    } catch {
      setLink(location.href);
    }
  };
  return html`<p class="row">
      <button type="button" class="plain" onClick=${copy}>Copy link</button>
      <button type="button" class="plain" onClick=${() => setCode(!isCode)} aria-expanded=${isCode}>View code</button>
    </p>
    ${
      link === "copied"
        ? html`<p class="muted" aria-live="polite">Copied. The prompt is in the link itself, and the server doesn't see it.</p>`
        : link
          ? html`<${TextField} label="Link" hint="This browser doesn't let the page copy: select the link and copy it by hand." value=${link} onChange=${() => {}} />`
          : null
    }
    ${isCode ? html`<${Code} request=${request} adapters=${expressions} />` : null}`;
}

/** @param {{current: Run | null}} props */
function History({ current }) {
  const all = useStore(runs);
  if (!all.length) return null;
  return html`<details class="card">
    <summary>History (${count(all.length)})</summary>
    <p class="muted">The last 50 runs, until this page is reloaded or closed.</p>
    <p class="row"><${Export} of=${all} label="Export all as" /></p>
    <ul class="names">
      ${all.map(
        (one) =>
          html`<li key=${one.id}>
            <button type="button" class="past" aria-current=${one === current ? "true" : undefined} onClick=${() => show(one)}>
              <span class="cut">${one.request.prompt}</span>
              <small>${new Date(one.at).toLocaleTimeString()} · ${one.columns.map((column) => column.expression).join(", ")}${(one.columns[0]?.turns.length ?? 0) > 1 ? ` · ${plural(one.columns[0]?.turns.length ?? 0, "turn")}` : ""}</small>
            </button>
          </li>`,
      )}
    </ul>
  </details>`;
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
    <p>Ask once, and compare the answers of the base, of your adapters and of blends of them.</p>
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
    ${others.includes(mine) || mine === "base" ? null : html`<p><button type="button" class="plain" onClick=${() => toggle(mine)}>Pin <code>${mine}</code> as a column</button></p>`}
  </fieldset>`;
}

const Lab = lazy(async () => (await import("../parts/lab.js")).Lab);

/** @param {{blend: string}} props */
function BlendLab({ blend }) {
  const [isOpen, setOpen] = useState(false);
  const toggle = (/** @type {Event & {currentTarget: HTMLDetailsElement}} */ event) =>
    setOpen(event.currentTarget.open);
  return html`<details onToggle=${toggle}>
    <summary>Find the best weights</summary>
    ${isOpen ? html`<${Lab} terms=${parse(blend) ?? []} value=${blend.trim()} />` : null}
  </details>`;
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
  useEffect(() => setSaved(""), [blend, name]);
  return html`<details>
    <summary>Save this blend under a name</summary>
    <div class="row end">
      <${TextField} label="Name" name="name" problem=${save.problem} value=${name} onChange=${setName} onEnter=${() => name && save.run()} />
      <button type="button" disabled=${!name || save.busy || Boolean(saved)} onClick=${() => save.run()}>Save</button>
    </div>
    <${Fault} problem=${save.problem} beside=${["name"]} />
    ${saved && html`<p role="status">Saved as <a href=${to("adapters", saved.split("@")[0] ?? "")}>${saved}</a>.</p>`}
  </details>`;
}
