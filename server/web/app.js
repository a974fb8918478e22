/** The page: its frame, navigation and sign-in. */
import { get, linkTo } from "./lib/api.js";
import { moment } from "./lib/format.js";
import { html, render, useEffect, useRef, useState } from "./lib/html.js";
import { lazy } from "./lib/lazy.js";
import { useResource } from "./lib/resource.js";
import { route, to } from "./lib/route.js";
import { asksForKey, isRemembered, key, signIn } from "./lib/session.js";
import { useStore } from "./lib/store.js";
import { Check, Form } from "./parts/basics.js";
import { PlaygroundView } from "./views/playground.js";

/** @type {[string, string, (props: {path: string[]}) => unknown][]} */
const VIEWS = [
  ["playground", "Playground", PlaygroundView],
  ["adapters", "Adapters", lazy(async () => (await import("./views/adapters.js")).AdaptersView)],
  ["train", "Train", lazy(async () => (await import("./views/train.js")).TrainView)],
  ["engine", "Engine", lazy(async () => (await import("./views/engine.js")).EngineView)],
  ["access", "Keys and usage", lazy(async () => (await import("./views/access.js")).AccessView)],
];

function App() {
  const [name = "playground", ...path] = useStore(route);
  const asks = useStore(asksForKey);
  const secret = useStore(key);
  const main = useRef(/** @type {HTMLElement | null} */ (null));
  const isFirst = useRef(true);
  const wasShown = useRef(false);
  const [, title, View] = VIEWS.find(([of]) => of === name) ?? /** @type {(typeof VIEWS)[0]} */ (VIEWS[0]);

  useEffect(() => {
    document.title = `${title} · smolora`;
    // users of a keyboard or a screen reader continue in the new view
    if (!isFirst.current) main.current?.focus({ preventScroll: true });
    isFirst.current = false;
    scrollTo(0, 0);
  }, [title]);
  useEffect(() => {
    // the pressed button may be gone with its view, such as the form of a new job
    if (wasShown.current && path.length && document.activeElement === document.body)
      /** @type {HTMLElement | null | undefined} */ (main.current?.querySelector(".sides > .chosen"))?.focus({
        preventScroll: true,
      });
    wasShown.current = true;
  }, [path.join("/")]);

  return html`<a class="skip" href="#main" onClick=${(/** @type {Event} */ event) => {
    event.preventDefault();
    main.current?.focus();
  }}>Skip to the content</a>
    <header class="top">
      <a class="mark" href=${to("playground")}>smo<b>lora</b></a>
      <nav aria-label="Views">
        ${VIEWS.map(
          ([of, words]) => html`<a href=${to(of)} aria-current=${of === name ? "page" : undefined}>${words}</a>`,
        )}
      </nav>
      <${Identity} />
    </header>
    <main id="main" tabindex="-1" ref=${main}>
      ${asks ? html`<${SignIn} />` : html`<${View} path=${path} key=${`${name} ${secret}`} />`}
    </main>
    <footer><a href=${linkTo("docs")}>API documentation</a></footer>`;
}

function Identity() {
  const secret = useStore(key);
  const isIn = useStore(asksForKey) !== "needed" && secret;
  const own = useResource(
    async (signal) => (secret ? /** @type {OwnKeyAnswer} */ (await get("/keys/self", signal)) : null),
    [],
  ).data;
  const name = own?.name || `key …${secret.slice(-4)}`; // the keys of a setting have no name
  const about = [
    ...(own ? [`May ${own.scopes.join(", ")}`] : []),
    ...(own?.expires_at ? [`Expires ${moment(own.expires_at)}`] : []),
    isRemembered() ? "Remembered on this device" : "Kept until this tab is closed",
  ];
  return html`<div class="identity">
    ${
      isIn
        ? html`<span class="muted" title=${about.join(". ")}>${own ? `${name} · ${own.project}` : name}</span>
          <button type="button" class="plain" onClick=${() => signIn("")}>Sign out</button>`
        : html`<button type="button" class="plain" onClick=${() => asksForKey.set("offered")}>Use a key</button>`
    }
  </div>`;
}

/** Characters that a header can have: for others, fetch would throw the same error as if no server answered. */
const PRINTABLE = /^[!-~]+$/;

function SignIn() {
  const [secret, setSecret] = useState("");
  const [isWrong, setWrong] = useState(false);
  const [remembers, setRemembers] = useState(false);
  const submit = () => {
    const given = secret.trim();
    setWrong(given !== "" && !PRINTABLE.test(given));
    if (PRINTABLE.test(given)) signIn(given, remembers);
  };
  const had = useStore(key);
  const isNeeded = useStore(asksForKey) === "needed";
  const field = useRef(/** @type {HTMLInputElement | null} */ (null));
  useEffect(() => field.current?.focus(), []);
  return html`<section class="card narrow">
    <h1>API key</h1>
    ${
      had && isNeeded
        ? html`<p class="fault" role="alert">The server rejects this key: it may be mistyped, expired or revoked.</p>`
        : html`<p>${isNeeded ? "This server answers only with a key. " : ""}Your key decides what you can see and do here. The server's operator creates keys with <code>smolora keys create</code>.</p>`
    }
    <${Form} label="API key" onSubmit=${submit}>
      <label for="secret">Key</label>
      <input
        id="secret"
        ref=${field}
        type="password"
        autocomplete="off"
        spellcheck=${false}
        placeholder="sk-smolora-…"
        value=${secret}
        onInput=${(/** @type {import("./parts/basics.js").Typed} */ event) => setSecret(event.currentTarget.value)}
      />
      ${isWrong ? html`<p class="fault" role="alert">A key can't contain such characters: copy the whole key, as it was shown when it was created.</p>` : null}
      <p><${Check} checked=${remembers} onChange=${() => setRemembers(!remembers)}>Remember on this device<//></p>
      <small>${remembers ? "It is kept in this browser until you sign out, for all tabs. Leave this off on a shared device." : "It is kept in this tab until you close it, and nowhere else."}</small>
      <p class="row">
        <button type="submit" disabled=${!secret.trim()}>Sign in</button>
        ${isNeeded ? null : html`<button type="button" class="plain" onClick=${() => asksForKey.set("")}>Continue without</button>`}
      </p>
    <//>
  </section>`;
}

/** Ignore files dropped elsewhere: the browser would open them instead of the page. @param {DragEvent} event */
const ignoreFiles = (event) => {
  if (event.defaultPrevented || !event.dataTransfer?.types.includes("Files")) return;
  event.preventDefault();
  event.dataTransfer.dropEffect = "none";
};
addEventListener("dragover", ignoreFiles);
addEventListener("drop", ignoreFiles);

const place = document.getElementById("app");
if (place) {
  place.textContent = "";
  render(html`<${App} />`, place);
}
