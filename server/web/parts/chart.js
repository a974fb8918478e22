/** Curves over one axis, by uPlot, which is loaded when the first is drawn. */
import { html, useEffect, useRef, useState } from "../lib/html.js";
import { Table } from "./basics.js";

/**
 * @typedef {{label: string, tone: "first" | "second" | "third", values: (number | null)[]}} Series
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

/**
 * Draw the values; the legend shows the last values unless the pointer is at others.
 * @param {InstanceType<typeof import("../vendor/uplot.mjs").default>} plot
 * @param {{x: number[], series: Series[]}} values
 */
function show(plot, { x, series }) {
  plot.setData([x, ...series.map((one) => one.values)]);
  if (plot.cursor.idx == null) plot.setLegend({ idx: x.length - 1 });
}

/**
 * A table has the same values for screen readers.
 * @param {{title: string, x: number[], xLabel: string, isTime?: boolean, series: Series[], height?: number}} props
 */
export function Chart({ title, x, xLabel, isTime = false, series, height = 220 }) {
  const place = useRef(/** @type {HTMLDivElement | null} */ (null));
  const plot = useRef(/** @type {InstanceType<typeof import("../vendor/uplot.mjs").default> | null} */ (null));
  const latest = useRef({ x, series });
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
              points: { show: !isTime },
            })),
          ],
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
    latest.current = { x, series };
    if (plot.current) show(plot.current, latest.current);
  }, [x, series]);

  return html`<figure class="chart">
    <figcaption>${title}</figcaption>
    ${isMissing ? html`<p class="muted">It can't be drawn just now. If that stays so, reload the page.</p>` : null}
    <div ref=${place} aria-hidden="true"></div>
    ${
      isTime
        ? null
        : html`<details>
            <summary>As a table</summary>
            <${Table} label=${title} columns=${[xLabel, ...series.map((one) => `#${one.label}`)]}>
              ${x.map(
                (at, row) =>
                  html`<tr key=${at}>
                    <th scope="row">${at}</th>
                    ${series.map((one) => html`<td class="number">${one.values[row]?.toPrecision(4) ?? ""}</td>`)}
                  </tr>`,
              )}
            <//>
          </details>`
    }
  </figure>`;
}
