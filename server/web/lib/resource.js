/** A value from the server: loaded, refreshed, and its problem if there is one. */
import { Problem } from "./api.js";
import { useCallback, useEffect, useRef, useState } from "./html.js";
import { key } from "./session.js";
import { useStore } from "./store.js";

/**
 * @template T
 * @typedef {{data: T | null, problem: Problem | null, reload: () => Promise<void>}} Resource
 */

/**
 * Loaded again when `deps` or the key change, and every `seconds` while the tab is looked at (0: not).
 * @template T
 * @param {(signal: AbortSignal) => Promise<T>} load
 * @param {unknown[]} deps
 * @param {number} [seconds]
 * @returns {Resource<T>}
 */
export function useResource(load, deps, seconds = 0) {
  const [state, setState] = useState(
    /** @type {{data: T | null, problem: Problem | null}} */ ({ data: null, problem: null }),
  );
  const secret = useStore(key);
  const turns = useRef({ begun: 0, ended: 0, shown: 0 });
  const fetchNow = useCallback(
    async (/** @type {AbortSignal} */ signal) => {
      const turn = (turns.current.begun += 1);
      const isLate = () => signal.aborted || turn < turns.current.shown; // a later request has newer data
      try {
        const data = await load(signal);
        if (isLate()) return;
        turns.current.shown = turn;
        setState({ data, problem: null });
      } catch (error) {
        if (isLate()) return;
        turns.current.shown = turn;
        const problem = asProblem(error);
        // keep the old value while the server is away for a moment or rate limits us, but not for another key
        setState((before) => ({
          data: problem.status === 0 || problem.status === 429 || problem.status >= 500 ? before.data : null,
          problem,
        }));
      } finally {
        turns.current.ended += 1;
      }
    },
    [...deps, secret],
  );
  useEffect(() => {
    turns.current.shown = turns.current.begun + 1; // earlier requests are for another value
    setState({ data: null, problem: null });
    const controller = new AbortController();
    void fetchNow(controller.signal);
    const timer = seconds
      ? setInterval(() => {
          const isLoading = turns.current.begun !== turns.current.ended;
          if (!document.hidden && !isLoading) void fetchNow(controller.signal);
        }, seconds * 1000)
      : 0;
    return () => {
      controller.abort();
      clearInterval(timer);
    };
  }, [fetchNow, seconds]);
  return { ...state, reload: () => fetchNow(new AbortController().signal) };
}

/** Whether the component is still shown: an action that ends later must not navigate away from another view. */
export function useIsShown() {
  const isShown = useRef(true);
  useEffect(() => () => void (isShown.current = false), []);
  return () => isShown.current;
}

/** @param {unknown} error @returns {Problem} */
export function asProblem(error) {
  if (error instanceof Problem) return error;
  console.error(error);
  return new Problem(0, error instanceof Error ? error.message : String(error));
}

const PLACES = "article, section, form, [tabindex]";

/**
 * Return a function that restores the focus after an action whose button is disabled meanwhile. If the button is gone,
 * its container gets the focus.
 */
function focusKept() {
  const button = document.activeElement;
  if (!(button instanceof HTMLButtonElement)) return () => {};
  /** @type {HTMLElement[]} */
  const around = [];
  for (let at = button.parentElement; at; at = at.parentElement) if (at.matches(PLACES)) around.push(at);
  const giveBack = () => {
    const has = document.activeElement;
    if (has !== document.body && !(has === button && button.disabled)) return;
    const place = button.isConnected && !button.disabled ? button : around.find((of) => of.isConnected);
    if (place && !place.matches("button, [tabindex]")) place.tabIndex = -1;
    place?.focus({ preventScroll: true });
  };
  return () => setTimeout(giveBack); // once it is drawn
}

/**
 * A deed with a button: `run` does it once at a time; its problem, if any, is kept until the next.
 * @template {unknown[]} A
 * @param {(...given: A) => Promise<unknown>} act
 */
export function useAction(act) {
  const [state, setState] = useState({ busy: false, problem: /** @type {Problem | null} */ (null) });
  /** @param {A} given */
  const run = async (...given) => {
    if (state.busy) return;
    setState({ busy: true, problem: null });
    const giveFocusBack = focusKept();
    try {
      await act(...given);
      setState({ busy: false, problem: null });
    } catch (error) {
      setState({ busy: false, problem: asProblem(error) });
    } finally {
      giveFocusBack();
    }
  };
  return { ...state, run, clear: () => setState({ busy: false, problem: null }) };
}
