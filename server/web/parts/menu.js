/** A row's actions behind one button. */
import { html, useId, useRef, useState } from "../lib/html.js";
import { Confirm } from "./basics.js";

/**
 * @typedef {{label: string, onRun: () => void, sure?: string, deed?: string}} Item `sure`: the question that is asked
 *   first, since the action can't be undone; `deed`: the label of the confirming button, if it isn't `label`
 */

const GAP = 4; // px

/** @param {{label: string, items: Item[], busy?: boolean}} props `label`: for screen readers */
export function Menu({ label, items, busy = false }) {
  const id = useId();
  const button = useRef(/** @type {HTMLButtonElement | null} */ (null));
  const list = useRef(/** @type {HTMLElement | null} */ (null));
  const [asked, setAsked] = useState(/** @type {Item | null} */ (null));
  // a popover is above all else, so a table that scrolls doesn't cut it
  const place = () => {
    const box = button.current?.getBoundingClientRect();
    if (!box || !list.current) return;
    const width = list.current.offsetWidth;
    const isLow = box.bottom + GAP + list.current.offsetHeight > innerHeight;
    list.current.style.left = `${Math.max(GAP, Math.min(box.left, innerWidth - width - GAP))}px`;
    list.current.style.top = `${isLow ? Math.max(GAP, box.top - GAP - list.current.offsetHeight) : box.bottom + GAP}px`;
  };
  const run = (/** @type {Item} */ item) => {
    list.current?.hidePopover();
    if (item.sure) setAsked(item);
    else item.onRun();
  };
  if (!items.length) return null;
  return html`<button type="button" class="plain" ref=${button} popovertarget=${id} disabled=${busy} aria-label=${label}>⋯</button>
    <div id=${id} ref=${list} class="menu" popover="auto" onToggle=${place}>
      ${items.map(
        (item) =>
          html`<button type="button" class="plain ${item.sure ? "risky" : ""}" onClick=${() => run(item)}>${item.label}</button>`,
      )}
    </div>
    ${
      asked
        ? html`<${Confirm} label=${asked.label} sure=${asked.sure ?? ""} deed=${asked.deed ?? asked.label} onClose=${() => setAsked(null)} onSure=${asked.onRun} />`
        : null
    }`;
}
