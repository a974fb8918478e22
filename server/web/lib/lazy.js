/** Views that are loaded when they are first shown, so that the first load stays small. */
import { html, useEffect, useState } from "./html.js";

/**
 * @template {object} P
 * @typedef {(props: P) => unknown} Component
 */

/**
 * A component whose module is loaded when it is first shown.
 * @template {object} P
 * @param {() => Promise<Component<P>>} load
 * @returns {Component<P>}
 */
export function lazy(load) {
  /** @type {Component<P> | null} */
  let found = null;
  return function Lazy(props) {
    const [Loaded, setLoaded] = useState(() => found);
    const [isMissing, setMissing] = useState(false);
    useEffect(() => {
      if (found) return;
      load().then(
        (component) => {
          found = component;
          setLoaded(() => component);
        },
        () => setMissing(true), // a browser never retries a failed import
      );
    }, []);
    if (Loaded) return html`<${Loaded} ...${props} />`;
    return isMissing
      ? html`<p class="fault" role="alert">
          This view can't be loaded: the server is away, or has a newer page.
          <button type="button" class="link" onClick=${() => location.reload()}>Reload the page</button>
        </p>`
      : html`<p class="muted">Loading…</p>`;
  };
}
