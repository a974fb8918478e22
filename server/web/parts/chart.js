/** Curves over one axis, by uPlot, which is loaded when the first is drawn. */
import { html, useEffect, useRef, useState } from "../lib/html.js";
import { Table } from "./basics.js";

/**
 * @typedef {{label: string, tone: "first" | "second" | "third", values: (number | null)[], isDashed?: boolean}} Series
 *   a dashed line is one value to compare with, and isn't in the table
 * @typedef {{at: number, label: string}} Mark a vertical line
 */

/** @type {Promise<typeof import("../vendor/uplot.mjs") | null> | null} null in it: it couldn't be loaded */
let library = null;
let tries = 0;
const [FIRST_SECONDS, MOST_SECONDS] = [3, 60];

/** The library. A browser never retries a failed import of the same URL, so a retry uses another one. */
async function load() {
  const query = tries ? `?${tries}` : "";
  library ??= import(`../vendor/uplot.mjs${query}`).catch(() => null);
  const found = await library;
  if (!found) {
    library = null;
    tries += 1;
  }
  return found;
}

/** Distances between whole numbers on an axis. */
const WHOLE = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 50_000, 100_000];

/** @param {string} name of a colour of the style sheet */
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

/** @typedef {InstanceType<typeof import("../vendor/uplot.mjs").default>} Plot */

/**
 * Draw the values; unless the pointer is at others, the legend shows those at the mark, or the last ones.
 * @param {Plot} plot
 * @param {{x: number[], series: Series[], mark: Mark | null}} values
 */
function show(plot, { x, series, mark }) {
  plot.setData([x, ...series.map((one) => one.values)]);
  const marked = mark ? x.indexOf(mark.at) : -1;
  if (plot.cursor.idx == null) plot.setLegend({ idx: marked < 0 ? x.length - 1 : marked });
}

/** @param {Plot} plot @param {Mark} mark */
function drawMark({ ctx, bbox, valToPos }, { at, label }) {
  const place = Math.round(valToPos(at, "x", true));
  if (place < bbox.left || place > bbox.left + bbox.width) return; // zoomed away
  const isLeft = place > bbox.left + bbox.width / 2;
  ctx.save();
  ctx.strokeStyle = ctx.fillStyle = colour("ink");
  ctx.lineWidth = devicePixelRatio;
  ctx.setLineDash([]);
  ctx.font = `${12 * devicePixelRatio}px system-ui, sans-serif`;
  ctx.textAlign = isLeft ? "right" : "left";
  ctx.textBaseline = "top";
  ctx.beginPath();
  ctx.moveTo(place, bbox.top);
  ctx.lineTo(place, bbox.top + bbox.height);
  ctx.stroke();
  ctx.fillText(label, place + (isLeft ? -6 : 6) * devicePixelRatio, bbox.top);
  ctx.restore();
}

/**
 * A table has the same values for screen readers.
 * @param {{title: string, x: number[], xLabel: string, isTime?: boolean, series: Series[], mark?: Mark | null, height?: number}} props
 */
export function Chart({ title, x, xLabel, isTime = false, series, mark = null, height = 220 }) {
  const place = useRef(/** @type {HTMLDivElement | null} */ (null));
  const plot = useRef(/** @type {Plot | null} */ (null));
  const latest = useRef({ x, series, mark });
  const [isMissing, setMissing] = useState(false);
  const shape = series.map((one) => one.label).join("|");

  useEffect(() => {
    let gone = false;
    let wait = FIRST_SECONDS;
    /** @type {ReturnType<typeof setTimeout> | undefined} */
    let timer;
    const element = place.current;
    if (!element) return undefined;
    const fit = new ResizeObserver(() => {
      plot.current?.setSize({ width: element.clientWidth, height });
      if (plot.current) show(plot.current, latest.current);
    });
    const dark = matchMedia("(prefers-color-scheme: dark)");
    const again = () => {
      clearTimeout(timer);
      timer = setTimeout(() => (document.hidden ? again() : draw()), wait * 1000);
    };
    const draw = async () => {
      const found = await load();
      if (gone) return;
      setMissing(!found);
      if (!found) {
        again();
        wait = Math.min(2 * wait, MOST_SECONDS);
        return;
      }
      const { default: UPlot } = found;
      plot.current?.destroy();
      const rule = { stroke: colour("line"), width: 1 };
      const axis = { stroke: colour("muted"), grid: rule, ticks: rule };
      plot.current = new UPlot(
        {
          width: element.clientWidth || 300,
          height,
          scales: { x: { time: isTime } },
          axes: [{ ...axis, ...(isTime ? {} : { label: xLabel, labelSize: 22, incrs: WHOLE }) }, axis],
          series: [
            { label: xLabel },
            ...series.map((one) => ({
              label: one.label,
              stroke: colour(one.tone),
              width: 2,
              spanGaps: true,
              points: { show: !isTime && !one.isDashed },
              ...(one.isDashed ? { dash: [8, 6] } : {}),
            })),
          ],
          hooks: { draw: [(drawn) => latest.current.mark && drawMark(drawn, latest.current.mark)] },
        },
        [latest.current.x, ...latest.current.series.map((one) => one.values)],
        element,
      );
      show(plot.current, latest.current);
    };
    void draw();
    fit.observe(element);
    dark.addEventListener("change", draw);
    return () => {
      gone = true;
      clearTimeout(timer);
      fit.disconnect();
      dark.removeEventListener("change", draw);
      plot.current?.destroy();
      plot.current = null;
    };
  }, [shape, height, isTime, xLabel]);

  useEffect(() => {
    latest.current = { x, series, mark };
    if (plot.current) show(plot.current, latest.current);
  }, [x, series, mark]);
  const listed = series.filter((one) => !one.isDashed);

  return html`<figure class="chart">
    <figcaption>${title}</figcaption>
    ${isMissing ? html`<p class="muted">It can't be drawn just now. If that stays so, reload the page.</p>` : null}
    <div ref=${place} aria-hidden="true"></div>
    ${
      isTime
        ? null
        : html`<details>
            <summary>As a table</summary>
            <${Table} label=${title} columns=${[xLabel, ...listed.map((one) => `#${one.label}`)]}>
              ${x.map(
                (at, row) =>
                  html`<tr key=${at}>
                    <th scope="row">${at}${at === mark?.at ? " (kept)" : ""}</th>
                    ${listed.map((one) => html`<td class="number">${one.values[row]?.toPrecision(4) ?? ""}</td>`)}
                  </tr>`,
              )}
            <//>
          </details>`
    }
  </figure>`;
}
