const LEVELS = [0.1, 0.25, 0.5, 0.75, 0.9];
const BANDS = [["0.1", "0.9"], ["0.25", "0.75"]];
const SVG = "http://www.w3.org/2000/svg";
const STEPS = { S: 1e3, T: 6e4, H: 36e5, D: 864e5, W: 6048e5 };
const MISSING = /^(|na|nan|null|none|\?)$/i;
const $ = (id) => document.getElementById(id);

/** Make an element: its attributes, then its children; text is never read as HTML. */
function make(tag, attributes = {}, ...children) {
  const drawn = ["svg", "path", "line", "polygon", "text", "circle", "title", "g"].includes(tag);
  const element = drawn ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("--")) element.style.setProperty(name, value);
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

const show = (value) => (value === null ? "none" : Number(value.toPrecision(5)).toLocaleString("en", { maximumSignificantDigits: 5 }));

// ---------------------------------------------------------------- text to series

function number(cell, line) {
  if (MISSING.test(cell)) return null;
  const value = Number(cell);
  if (!Number.isFinite(value)) throw new Error(`Line ${line}: "${cell.slice(0, 30)}" is not a number.`);
  return value;
}

const isNumber = (cell) => MISSING.test(cell) || Number.isFinite(Number(cell));

/** Read pasted text or a file: series with a name, values, and a start where times are given. */
export function read(text) {
  const lines = text.replace(/\r/g, "").split("\n").map((line, place) => [line.trim(), place + 1]).filter(([line]) => line);
  if (!lines.length) throw new Error("Paste at least one series.");
  const mark = ["\t", ";", ","].find((one) => lines[0][0].includes(one)) ?? /\s+/;
  const rows = lines.map(([line, place]) => [line.split(mark).map((cell) => cell.trim().replace(/^"(.*)"$/, "$1")), place]);
  const [[head]] = rows;
  if (head.every(isNumber)) {
    if (rows.every(([cells]) => cells.length === 1))
      return [{ name: "series 1", values: rows.map(([[cell], line]) => number(cell, line)) }];
    return rows.map(([cells, line], place) => ({
      name: `series ${place + 1}`,
      values: cells.filter((cell, at) => cell || at < cells.length - 1).map((cell) => number(cell, line)),
    }));
  }
  const names = head.map((name) => name.toLowerCase());
  const [id, value] = [names.indexOf("item_id"), names.indexOf("target")];
  const time = names.findIndex((name) => ["timestamp", "date", "time", "ds"].includes(name));
  const found = new Map();
  const put = (name, cell, cells, line) => {
    if (!found.has(name)) found.set(name, { name, values: [], times: [] });
    found.get(name).values.push(number(cell ?? "", line));
    if (time >= 0) found.get(name).times.push(cells[time]);
  };
  for (const [cells, line] of rows.slice(1)) {
    if (value >= 0 && (id >= 0 || head.length <= 2)) put(id >= 0 ? cells[id] : "series 1", cells[value], cells, line);
    else head.forEach((name, column) => column !== time && column !== id && put(name, cells[column], cells, line));
  }
  if (!found.size) throw new Error("There is a header, but no values below it.");
  return [...found.values()];
}

/** Return the frequency of times that are one known step apart, else nothing. */
function frequencyOf(times) {
  const [first, second] = (times ?? []).map((time) => Date.parse(time));
  if (!first || !second) return undefined;
  const gap = second - first;
  const exact = Object.entries(STEPS).find(([, size]) => size === gap)?.[0];
  const days = gap / STEPS.D;
  return exact ?? (days >= 28 && days <= 31 ? "M" : days >= 90 && days <= 92 ? "Q" : days >= 365 && days <= 366 ? "Y" : undefined);
}

const iso = (time) => (/^\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d(\.\d+)?)?(Z|[+-]\d\d:?\d\d)?)?$/.test(time ?? "") ? time : undefined);

// ---------------------------------------------------------------- drawing

/** Return round values between two, about five of them. */
function ticks(low, high) {
  const rough = (high - low) / 4, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * ([1, 2, 5].find((size) => size * power >= rough) ?? 10);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high; value += step) found.push(value);
  return found;
}

/** Draw the end of the past, the median and the bands; arrow keys, Home and End read values. */
function chart(name, past, forecast, said) {
  const width = Math.min(880, Math.max(300, $("results").clientWidth - 40));
  const [height, left, right, top, bottom] = [280, 58, 10, 12, 26];
  const ahead = forecast.mean_forecast.length;
  const kept = past.slice(-Math.max(3 * ahead, 100));
  const all = [...kept, ...forecast.mean_forecast, ...Object.values(forecast.quantiles).flat()].filter((value) => value !== null);
  let [low, high] = [Math.min(...all), Math.max(...all)];
  if (low === high) [low, high] = [low - 1, high + 1];
  const x = (step) => left + ((width - left - right) * step) / Math.max(1, kept.length + ahead - 1);
  const y = (value) => top + ((height - top - bottom) * (high - value)) / (high - low);
  const line = (values, start) => {
    let pen = "M";
    return values.map((value, step) => {
      if (value === null) { pen = "M"; return ""; }
      const part = `${pen}${x(start + step).toFixed(1)},${y(value).toFixed(1)}`;
      pen = "L";
      return part;
    }).join("");
  };
  const label = `${name}: ${kept.length} past steps, then the forecast of ${ahead}. Its median goes from ` +
    `${show(forecast.mean_forecast[0])} to ${show(forecast.mean_forecast.at(-1))}. Arrow keys read the steps.`;
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, tabindex: 0, role: "img", "aria-label": label });
  for (const value of ticks(low, high)) {
    svg.append(make("line", { class: "grid", x1: left, x2: width - right, y1: y(value), y2: y(value) }),
      make("text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, show(value)));
  }
  for (const [below, above] of BANDS) {
    const [under, over] = [forecast.quantiles[below], forecast.quantiles[above]];
    const edge = (values, step) => `${x(kept.length + step).toFixed(1)},${y(values[step]).toFixed(1)}`;
    const steps = [...under.keys()].filter((step) => under[step] !== null && over[step] !== null);
    svg.append(make("polygon", { class: "band", points: [...steps.map((step) => edge(over, step)), ...steps.reverse().map((step) => edge(under, step))].join(" ") }));
  }
  const now = x(kept.length - 0.5);
  svg.append(make("line", { class: "now", x1: now, x2: now, y1: top, y2: height - bottom }),
    make("path", { class: "past", d: line(kept, 0) }), make("path", { class: "median", d: line(forecast.mean_forecast, kept.length) }),
    make("text", { x: left, y: height - 8 }, `${kept.length} steps ago`),
    make("text", { x: width - right, y: height - 8, "text-anchor": "end" }, `+${ahead} steps`));
  if (kept.length === 1) svg.append(make("circle", { class: "dot", cx: x(0), cy: y(kept[0]), r: 3 }));
  if (ahead === 1) svg.append(make("circle", { class: "dot ahead", cx: x(kept.length), cy: y(forecast.mean_forecast[0]), r: 3 }));
  const cursor = make("line", { class: "cursor", y1: top, y2: height - bottom, visibility: "hidden" });
  svg.append(cursor);
  let at = kept.length - 1;
  const point = (step) => {
    at = Math.min(Math.max(step, 0), kept.length + ahead - 1);
    cursor.setAttribute("x1", x(at));
    cursor.setAttribute("x2", x(at));
    cursor.setAttribute("visibility", "visible");
    const step_ahead = at - kept.length;
    said.value = step_ahead < 0 ? `${-step_ahead} steps ago: ${show(kept[at])}` :
      `Step +${step_ahead + 1}: median ${show(forecast.mean_forecast[step_ahead])}` + BANDS.map(([below, above]) =>
        `, ${Math.round((above - below) * 100)} % between ${show(forecast.quantiles[below][step_ahead])} and ${show(forecast.quantiles[above][step_ahead])}`).join("");
  };
  svg.addEventListener("keydown", (event) => {
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: kept.length + ahead - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    point(to);
  });
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    point(Math.round((((event.clientX - box.left) / box.width) * width - left) / (width - left - right) * (kept.length + ahead - 1)));
  });
  return svg;
}

/** Say which experts forecast a series, with their shares, and what spoke for the first. */
function experts(forecast, known) {
  if (!forecast.experts) return [];
  const colour = (name) => `var(--e${Math.max(0, known.indexOf(name)) % 8})`;
  const shares = Object.entries(forecast.experts);
  const parts = [make("h3", {}, shares.length > 1 ? "Experts" : "Expert"),
    make("div", { class: "stack", "aria-hidden": "true" }, ...shares.map(([name, share]) => {
      const part = make("span", { "--kind": colour(name) });
      part.style.flex = share;
      return part;
    })),
    make("ul", { class: "key" }, ...shares.map(([name, share]) => make("li", {}, make("i", { "--kind": colour(name) }), `${name} ${Math.round(share * 100)} %`)))];
  if (forecast.reasons?.length) {
    const most = Math.max(...forecast.reasons.map((reason) => Math.abs(reason.score))) || 1;
    parts.push(make("h3", {}, "Why"), make("p", { class: "soft" }, `What this series has more or less of than those the router learned from, and how far that speaks for ${shares[0][0]} against the next expert.`),
      make("dl", { class: "why" }, ...forecast.reasons.flatMap((reason) => [make("dt", {}, reason.feature),
        make("dd", { "--of": Math.abs(reason.score) / most, "--kind": reason.score >= 0 ? colour(shares[0][0]) : "var(--soft)" },
          `${reason.score >= 0 ? "for it" : "against it"}, ${Math.abs(reason.score).toFixed(2)}`)])));
  }
  return parts;
}

function table(forecast) {
  const levels = Object.keys(forecast.quantiles);
  return make("details", {}, make("summary", {}, "Values as a table"), make("div", { class: "scroll", tabindex: 0 },
    make("table", {}, make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "step"), make("th", { scope: "col" }, "median"), ...levels.map((level) => make("th", { scope: "col" }, level)))),
      make("tbody", {}, ...forecast.mean_forecast.map((median, step) => make("tr", {}, make("th", { scope: "row" }, `+${step + 1}`),
        make("td", {}, show(median)), ...levels.map((level) => make("td", {}, show(forecast.quantiles[level][step])))))))));
}

// ---------------------------------------------------------------- asking

let models = {};

function say(text, bad = false) {
  $("status").textContent = text;
  $("status").className = bad ? "bad" : "soft";
}

async function ask(event) {
  event?.preventDefault();
  $("results").replaceChildren();
  $("go").disabled = true;
  try {
    const series = read($("text").value);
    const body = {
      model: $("model").value,
      inputs: series.map(({ name, values, times }) => ({
        type: "univariate_time_series", name, series: values, frequency: $("frequency").value, start_timestamp: iso(times?.[0]),
      })),
      options: { horizon: Number($("horizon").value), quantiles: LEVELS, explain: true },
    };
    say(`Forecasting ${series.length} series ...`);
    const begin = performance.now();
    const response = await fetch("v1/timeseries/forecast", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
    const answer = await response.json();
    if (!response.ok) throw new Error(answer.error.message);
    answer.outputs.forEach(({ content: [forecast] }, place) => {
      const said = make("output", { "aria-live": "polite" });
      $("results").append(make("article", { "aria-label": forecast.name }, make("h2", {}, forecast.name),
        chart(forecast.name, series[place].values, forecast, said), said, ...experts(forecast, models[answer.model].experts), table(forecast)));
    });
    say(`${series.length} series forecast in ${Math.round(performance.now() - begin)} ms: median, and bands of 50 and 80 %.`);
  } catch (error) {
    say(error instanceof TypeError ? "The server does not answer; is it still running?" : error.message, true);
  } finally {
    $("go").disabled = false;
  }
}

function example() {
  const rows = ["timestamp,visits,stock"];
  for (let hour = 0; hour < 14 * 24; hour++) {
    const day = Math.sin((2 * Math.PI * (hour - 8)) / 24), weekend = Math.floor(hour / 24) % 7 > 4 ? 0.5 : 1;
    const jitter = Math.sin(hour * 12.9898) * 43758.5453 % 1;
    rows.push(`${new Date(Date.UTC(2026, 0, 5, hour)).toISOString()},${Math.round(200 + weekend * 120 * Math.max(day, -0.8) + 12 * jitter)},${(900 - hour * 1.7 + 30 * Math.abs(jitter)).toFixed(1)}`);
  }
  $("text").value = rows.join("\n");
  guess();
}

/** Set the length of a step where the times of the text tell. */
function guess() {
  try {
    const found = frequencyOf(read($("text").value)[0].times);
    if (found) $("frequency").value = found;
  } catch { /* said when a forecast is asked for */ }
}

async function open(file) {
  $("text").value = await file.text();
  guess();
}

async function start() {
  $("ask").addEventListener("submit", ask);
  $("example").addEventListener("click", example);
  $("text").addEventListener("change", guess);
  $("file").addEventListener("change", () => $("file").files[0] && open($("file").files[0]));
  $("text").addEventListener("dragover", (event) => event.preventDefault());
  $("text").addEventListener("drop", (event) => {
    if (!event.dataTransfer.files.length) return;
    event.preventDefault();
    open(event.dataTransfer.files[0]);
  });
  const names = await (await fetch("v1/timeseries/models")).json();
  const about = await Promise.all(names.map(async (name) => (await fetch(`v1/models/${encodeURIComponent(name)}`)).json()));
  models = Object.fromEntries(about.map((one) => [one.name, one]));
  $("model").replaceChildren(...names.map((name) => make("option", { value: name }, name)));
  document.body.dataset.ready = "true";
}

start().catch(() => say("The server does not answer; is it still running?", true));
