/** A job's status as a badge. */
import { html } from "../lib/html.js";
import { Badge } from "./basics.js";

const TONES = { queued: "", running: "busy", paused: "", succeeded: "good", failed: "bad", cancelled: "" };

/** @param {{job: Job}} props */
export function Status({ job }) {
  const words = job.pausing
    ? "pausing"
    : job.status === "queued" && job.position
      ? `queued, number ${job.position}`
      : job.status;
  return html`<${Badge} tone=${TONES[job.status]}>${words}<//>`;
}
