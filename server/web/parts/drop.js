/** A place for files: dropped, or chosen. */
import { html, useId, useState } from "../lib/html.js";

/**
 * @param {{label: string, hint: string, chosen: string, accept: string, multiple?: boolean, share: number | null,
 *   onFiles: (files: File[]) => void}} props `chosen`: the chosen files as text; `share`: of the upload that is
 *   being sent, or null
 */
export function DropZone({ label, hint, chosen, accept, multiple = false, share, onFiles }) {
  const id = useId();
  const [over, setOver] = useState(false);
  /** @param {FileList | null | undefined} files */
  const take = (files) => files?.length && onFiles([...files].slice(0, multiple ? undefined : 1));
  return html`<div
    class="drop ${over ? "over" : ""}"
    onDragOver=${(/** @type {DragEvent} */ event) => {
      event.preventDefault();
      setOver(true);
    }}
    onDragLeave=${() => setOver(false)}
    onDrop=${(/** @type {DragEvent} */ event) => {
      event.preventDefault();
      setOver(false);
      take(event.dataTransfer?.files);
    }}
  >
    <input
      id=${id}
      class="hidden"
      type="file"
      accept=${accept}
      multiple=${multiple}
      disabled=${share !== null}
      onChange=${(/** @type {import("./basics.js").Typed} */ event) => {
        take(event.currentTarget.files);
        event.currentTarget.value = "";
      }}
    />
    <label for=${id}><span>${label}</span></label>
    ${chosen ? html`<p role="status">${chosen}</p>` : null}
    <small>${hint}</small>
    ${share === null ? null : html`<progress aria-label="sent" value=${share} max="1"></progress>`}
  </div>`;
}
