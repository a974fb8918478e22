/** How uPlot draws our charts. The library is loaded when the first chart is drawn. */

/**
 * @typedef {{label: string, tone: Tone, values: (number | null)[], isDashed?: boolean, isSparse?: boolean,
 *   isFaint?: boolean}} Series `isDashed`: one value to compare with, which isn't in the table; `isSparse`: few x have
 *   a value, so each is marked, and the legend shows the last one before; `isFaint`: the values behind a smoothed line
 * @typedef {"first" | "second" | "third" | "fourth" | "fifth" | "sixth"} Tone
 * @typedef {{at: number, label: string}} Mark a vertical line
 * @typedef {{x: number[], series: Series[], mark: Mark | null}} Values
 * @typedef {InstanceType<typeof import("../vendor/uplot.mjs").default>} Plot
 */

/** @type {Promise<typeof import("../vendor/uplot.mjs") | null> | null} null in it: it couldn't be loaded */
let library = null;
let tries = 0;

/** The library. A browser never retries a failed import of the same URL, so a retry uses another one. */
export async function load() {
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
/** uPlot itself rounds to three decimals, so that 0.0005 would be 0.001. */
const TICK = new Intl.NumberFormat("en", { maximumSignificantDigits: 6 });
const FEW = 30; // values that are marked each

/** @param {string} name of a colour of the style sheet */
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

/** A time of day, to the second. @param {number} seconds since 1970 */
const clock = (seconds) => new Date(seconds * 1000).toLocaleTimeString("en-GB");

/** @param {Values} values @param {boolean} isLog @returns {(number | null)[][]} as uPlot takes them */
const dataOf = ({ x, series }, isLog) => [
  x,
  ...series.map(({ values }) =>
    isLog ? values.map((value) => (value === null || value > 0 ? value : null)) : values,
  ),
];

/** The part of the x axis that is shown, if it isn't all of it. @param {Plot} plot @returns {[number, number] | null} */
export function zoomOf(plot) {
  const [x, { min, max }] = [plot.data[0], plot.scales["x"] ?? {}];
  const [first, last] = [x?.[0], x?.[x.length - 1]];
  if (min == null || max == null || first == null || last == null) return null;
  return min > first || max < last ? [min, max] : null;
}

/** Show all of the x axis. @param {Plot} plot */
export const zoomOut = (plot) => plot.setData(plot.data);

/**
 * Draw the values, and keep a zoom.
 * @param {Plot} plot
 * @param {Values} values
 * @param {boolean} isLog
 */
export function show(plot, values, isLog) {
  const zoom = zoomOf(plot);
  plot.setData(/** @type {any} */ (dataOf(values, isLog)), !zoom);
  if (zoom) plot.setScale("x", { min: zoom[0], max: zoom[1] });
  rest(plot, values);
}

/** Unless the pointer is at other values, the legend shows those at the mark, or the last ones. @param {Plot} plot @param {Values} values */
function rest(plot, { x, mark }) {
  const marked = mark ? x.indexOf(mark.at) : -1;
  if (plot.cursor.idx == null) plot.setLegend({ idx: marked < 0 ? x.length - 1 : marked }, false);
}

/** A value in the legend. @param {Series} series @param {number[]} x @param {number | null} place */
function legendOf({ values, isSparse }, x, place) {
  if (place === null) return "–";
  const last = isSparse ? values.findLastIndex((value, at) => at <= place && value !== null) : place;
  const value = values[last];
  if (value === null || value === undefined) return "–";
  return `${Number(value.toPrecision(4))}${last === place ? "" : ` (at ${x[last]})`}`;
}

/**
 * @param {{place: HTMLElement, height: number, xLabel: string, yLabel: string, isTime: boolean, isLog: boolean,
 *   isFromZero: boolean, latest: () => Values, onZoom: (zoom: [number, number] | null) => void,
 *   UPlot: typeof import("../vendor/uplot.mjs").default}} about `latest`: what is to be shown now
 */
export function plotOf({ place, height, xLabel, yLabel, isTime, isLog, isFromZero, latest, onZoom, UPlot }) {
  const rule = { stroke: colour("line"), width: 1 };
  const axis = { stroke: colour("muted"), grid: rule, ticks: rule };
  const times = {
    space: 90,
    values: (/** @type {unknown} */ _, /** @type {number[]} */ splits) => splits.map(clock),
  };
  const ticks = (/** @type {unknown} */ _, /** @type {(number | null)[]} */ splits) =>
    splits.map((value) => (value === null ? "" : TICK.format(value))); // a logarithmic axis names only some
  const range = (/** @type {unknown} */ _, /** @type {number} */ __, /** @type {number | null} */ most) =>
    /** @type {[number, number]} */ ([0, Math.max(most ?? 0, 1) * 1.05]);
  const tight = (/** @type {unknown} */ _, /** @type {number} */ least, /** @type {number} */ most) =>
    /** @type {[number, number]} */ ([(least ?? 0.1) / 1.1, (most ?? 1) * 1.1]);
  const plot = new UPlot(
    {
      width: place.clientWidth || 300,
      height,
      scales: {
        x: { time: isTime },
        y: { distr: isLog ? 3 : 1, ...(isFromZero ? { range } : isLog ? { range: tight } : {}) },
      },
      axes: [
        { ...axis, ...(isTime ? times : { label: xLabel, labelSize: 22, incrs: WHOLE }) },
        { ...axis, size: 60, values: ticks, ...(yLabel ? { label: yLabel, labelSize: 22 } : {}) },
      ],
      series: [
        { label: xLabel, ...(isTime ? { value: (_, at) => (at === null ? "–" : clock(at)) } : {}) },
        ...latest().series.map((one, row) => ({
          label: one.label,
          stroke: colour(one.tone),
          width: one.isFaint ? 1 : 2,
          alpha: one.isFaint ? 0.4 : 1,
          spanGaps: !isTime,
          points: {
            show: (/** @type {Plot} */ { data }) =>
              !isTime && !one.isDashed && (one.isSparse === true || data[0].length <= FEW),
            fill: colour(one.tone),
          },
          value: (
            /** @type {unknown} */ _,
            /** @type {unknown} */ __,
            /** @type {unknown} */ ___,
            /** @type {any} */ at,
          ) => legendOf(latest().series[row] ?? one, latest().x, at ?? null),
          ...(one.isDashed ? { dash: [8, 6] } : {}),
        })),
      ],
      hooks: {
        draw: [(drawn) => drawMark(drawn, latest().mark)],
        setCursor: [(drawn) => rest(drawn, latest())],
        setScale: [(drawn, of) => void (of === "x" && onZoom(zoomOf(drawn)))],
      },
    },
    /** @type {any} */ (dataOf(latest(), isLog)),
    place,
  );
  rest(plot, latest());
  return plot;
}

/** @param {Plot} plot @param {Mark | null} mark */
function drawMark({ ctx, bbox, valToPos }, mark) {
  if (!mark) return;
  const place = Math.round(valToPos(mark.at, "x", true));
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
  ctx.fillText(mark.label, place + (isLeft ? -6 : 6) * devicePixelRatio, bbox.top);
  ctx.restore();
}
