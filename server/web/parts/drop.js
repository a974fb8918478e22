/** A place for files: dropped, or chosen. */
import { html, useId, useState } from "../lib/html.js";

/**
 * @param {{label: string, hint: string, accept: string, multiple?: boolean, share: number | null,
 *   onFiles: (files: File[]) => void}} props `share`: of what is being sent, or null
 */
export function DropZone({ label, hint, accept, multiple = false, share, onFiles }) {
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
    <label for=${id}>${label}</label>
    <input
      id=${id}
      type="file"
      accept=${accept}
      multiple=${multiple}
      disabled=${share !== null}
      onChange=${(/** @type {import("./basics.js").Typed} */ event) => {
        take(event.currentTarget.files);
        event.currentTarget.value = "";
      }}
    />
    <small>${hint}</small>
    ${share === null ? null : html`<progress aria-label="sent" value=${share} max="1"></progress>`}
  </div>`;
}
