// Draws one stepper into the shadow tree of `host`. DATA and STYLE stand before this file in the page (ldm/lab/page.py).

const SVG = ["svg", "path", "line", "text", "circle", "title"];
const MAP = ["#000004", "#1c1044", "#4f127b", "#812581", "#b5367a", "#e55064", "#fb8761", "#fec287", "#fcfdbf"]; // magma
const GREY = ["#000000", "#ffffff"];
const SIGNED = { light: ["#123f6b", "#5b94c8", "#f4f3f1", "#e0965a", "#8a3a08"], dark: ["#9cc9f5", "#3f78b0", "#1f2023", "#b5622a", "#ffc08f"] };

function element(name, attributes = {}, ...children) {
  const node = SVG.includes(name) ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) if (value !== null) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function bytes(text, Kind = Uint8Array) {
  return new Kind(Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)).buffer);
}

/** A ramp of colours as 256 of them, three bytes each. */
function ramp(stops) {
  const rgb = stops.map((stop) => [1, 3, 5].map((at) => parseInt(stop.slice(at, at + 2), 16)));
  const table = new Uint8ClampedArray(768);
  for (let k = 0; k < 256; k++) {
    const place = (k / 255) * (stops.length - 1), low = Math.min(Math.floor(place), stops.length - 2);
    for (let c = 0; c < 3; c++) table[3 * k + c] = rgb[low][c] + (place - low) * (rgb[low + 1][c] - rgb[low][c]);
  }
  return table;
}

const MAPS = ramp(MAP), GREYS = ramp(GREY);

/** Set every pixel of a canvas: `at(k)` is its place in `table`, 0 to 255. */
function paint(canvas, table, at) {
  const image = new ImageData(canvas.width, canvas.height);
  for (let k = 0; k < canvas.width * canvas.height; k++) {
    const place = 3 * Math.max(0, Math.min(255, Math.round(at(k))));
    image.data.set([table[place], table[place + 1], table[place + 2], 255], 4 * k);
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}

function canvas(width, height, what, kind = "pixels") {
  return element("canvas", { width, height, class: kind, role: "img", "data-what": what });
}

/** A map (h, w) of values 0 to 255, at (u, v) between 0 and 1: bilinear. */
function between(values, h, w, u, v) {
  const y = Math.max(0, Math.min(h - 1, v * h - 0.5)), x = Math.max(0, Math.min(w - 1, u * w - 0.5));
  const i = Math.floor(y), j = Math.floor(x), below = Math.min(i + 1, h - 1), right = Math.min(j + 1, w - 1);
  const top = values[i * w + j] * (1 - x + j) + values[i * w + right] * (x - j);
  return top * (1 - y + i) + (values[below * w + j] * (1 - x + j) + values[below * w + right] * (x - j)) * (y - i);
}

const short = (value) => (value === 0 ? "0" : Math.abs(value) < 0.001 ? value.toExponential(1) : String(Number(value.toPrecision(2))));

/** One run: its data unpacked, and the parts of the page that show it. */
function makeRun(data, image) {
  const run = { ...data, image, n: data.rows.length - 1 };
  const size = data.channels * data.height * data.width;
  run.latent = bytes(data.x.bytes, Int8Array);
  run.colours = bytes(data.preview.bytes);
  run.pull = data.guidance && bytes(data.guidance.bytes, Int8Array);
  run.words = data.words.map((word) => ({ ...word, values: bytes(word.bytes) }));
  run.slice = (values, k, c) => values.subarray(k * size + (c * size) / data.channels, k * size + ((c + 1) * size) / data.channels);
  /** A word's map at step k; where the run is over, the mean over its steps. */
  run.map = (word, k) => {
    const area = data.maps[0] * data.maps[1];
    if (k < run.n) return word.values.subarray(k * area, (k + 1) * area);
    const mean = new Float32Array(area);
    for (let at = 0; at < run.n * area; at++) mean[at % area] += word.values[at] / run.n;
    return mean;
  };
  run.name = (k) => (k === run.n ? "the end" : `step ${k + 1} of ${run.n}`);
  return run;
}

function legend(low, high, table) {
  const bar = canvas(64, 1, "legend", "bar");
  bar.setAttribute("aria-hidden", "true");
  const node = element("div", { class: "legend" }, element("span", {}, low), bar, element("span", {}, high));
  node.show = (from, to, colours) => {
    node.firstChild.textContent = from;
    node.lastChild.textContent = to;
    paint(bar, colours, (k) => (k / 63) * 255);
  };
  node.show(low, high, table);
  return node;
}

/** The latent's channels, or those of the guidance: a canvas each, and how far their colours reach. */
function channels(run, what, across) {
  const shown = Array.from({ length: run.channels }, () => canvas(run.width, run.height, what));
  const grid = element("div", { class: "channels", style: `--across: ${across}` }, ...shown), scale = legend("", "", GREYS);
  return { node: element("div", {}, grid, scale), show(values, k, size, limit, table, name) {
    shown.forEach((each, c) => {
      const own = run.slice(values, k, c);
      paint(each, table, (at) => 127.5 + ((own[at] / 127) * size * 127.5) / (limit || 1));
      each.setAttribute("aria-label", `${name}, channel ${c + 1} of ${run.channels}`);
    });
    scale.show(`−${short(limit)}`, `+${short(limit)}`, table);
  } };
}

function sentence(run, choose) {
  const parts = [];
  if (run.letter) parts.push(element("span", { class: "letter" }, run.letter));
  for (const [text, at] of run.sentence) {
    if (at < 0) { parts.push(element("span", { class: "plain" }, text)); continue; }
    const word = run.words[at], map = canvas(run.maps[1], run.maps[0], "word-map"), peak = short(word.peak);
    word.canvas = map;
    map.setAttribute("aria-hidden", "true");
    word.button = element("button", { class: "word", type: "button", "aria-pressed": "false" }, text, map,
      element("span", { class: "peak" }, peak));
    word.button.setAttribute("aria-label", `${text}: lay its attention over the picture; at most ${peak}`);
    word.button.onclick = () => choose(word);
    parts.push(word.button);
  }
  return element("div", { class: run.words.length > 12 ? "sentence many" : "sentence" }, ...parts);
}

function panels(run, two) {
  const [w, h] = run.sheet.picture;
  run.decoded = canvas(w, h, "decode", "smooth");
  run.cheap = canvas(run.preview.width, run.preview.height, "preview");
  run.latents = channels(run, "x", two ? Math.min(run.channels, 4) : Math.ceil(Math.sqrt(run.channels)));
  run.captions = Array.from({ length: 3 }, () => element("figcaption"));
  run.laid = legend("0", "", MAPS);
  return element("div", { class: "panels" },
    element("figure", { class: "latent" }, run.latents.node, run.captions[0]),
    element("figure", {}, run.cheap, run.captions[1]),
    element("figure", {}, run.decoded, run.laid, run.captions[2]));
}

function rowOf(run) {
  run.cells = ["where", "row", "t", "alpha", "sigma", "seconds"].map((name) => {
    const value = element("dd", { class: name, "data-what": name });
    return [value, element("div", {}, ...(name === "where" ? [] : [element("dt", {}, name)]), value)];
  });
  return element("dl", { class: "row" }, ...run.cells.map(([, cell]) => cell));
}

/** The norms of cond − uncond over the steps of every run, against the place between noise and picture. */
function curve(runs, go) {
  const W = 600, H = 150, left = 44, right = 12, top = 12, bottom = 24;
  const most = Math.max(...runs.flatMap((run) => run.guidance.norm.map((norm) => norm || 0))) || 1;
  const x = (run, k) => left + (W - left - right) * run.places[k], y = (norm) => H - bottom - ((H - top - bottom) * norm) / most;
  const marker = element("line", { class: "marker", y1: top, y2: H - bottom });
  const shape = element("svg", { class: "curve", viewBox: `0 0 ${W} ${H}`, role: "img" },
    element("line", { class: "axis", x1: left, x2: W - right, y1: H - bottom, y2: H - bottom }),
    element("text", { x: left - 8, y: top + 4, "text-anchor": "end" }, short(most)),
    element("text", { x: left - 8, y: H - bottom + 4, "text-anchor": "end" }, "0"),
    element("text", { x: left, y: H - 7 }, "noise"),
    element("text", { x: W - right, y: H - 7, "text-anchor": "end" }, "picture"), marker);
  const dots = runs.map((run, r) => {
    const kind = run.letter === "B" ? " b" : "", points = run.guidance.norm.map((norm, k) => (norm === null ? null : [x(run, k), y(norm)]));
    const path = points.map((point, k) => (point ? `${k && points[k - 1] ? "L" : "M"}${point}` : "")).join("");
    shape.append(element("path", { class: `line${kind}`, d: path }));
    const own = points.map((point, k) => {
      if (!point) return null;
      const dot = element("circle", { class: `dot${kind}`, cx: point[0], cy: point[1], r: 3 }, element("title", {}, `${run.letter} ${run.name(k)}: ${run.guidance.norm[k].toPrecision(3)}`));
      dot.onclick = () => go(r, k);
      shape.append(dot);
      return dot;
    });
    const first = points.find(Boolean);
    if (run.letter && first) shape.append(element("text", { x: first[0], y: first[1] - 8, "text-anchor": "middle" }, run.letter));
    return own;
  });
  const label = element("text", { class: "now", "text-anchor": "middle" });
  shape.append(label);
  return { node: shape, show(at) {
    const lead = runs[0], k = at[0], norm = lead.guidance.norm[k], place = x(lead, k);
    for (const end of ["x1", "x2"]) marker.setAttribute(end, place);
    dots.forEach((own, r) => own.forEach((dot, j) => dot && dot.setAttribute("r", j === at[r] ? 5 : 3)));
    label.textContent = norm === null || norm === undefined ? "" : norm.toPrecision(3);
    label.setAttribute("x", Math.max(left + 14, Math.min(W - right - 14, place)));
    label.setAttribute("y", norm ? Math.max(11, y(norm) - 9) : 0);
    shape.setAttribute("aria-label", `Norm of cond − uncond over the steps; now ${label.textContent || "none"}, at most ${short(most)}`);
  } };
}

/** A word's map over the picture: dark where it isn't attended to; the picture shines through in the map's colours. */
function lay(run, values, target) {
  const pen = target.getContext("2d"), image = pen.getImageData(0, 0, target.width, target.height), pixels = image.data;
  for (let y = 0; y < target.height; y++) for (let x = 0; x < target.width; x++) {
    const k = 4 * (y * target.width + x), u = (x + 0.5) / target.width, v = (y + 0.5) / target.height;
    const place = 3 * Math.round(between(values, run.maps[0], run.maps[1], u, v));
    const light = 0.4 + (0.6 * (0.3 * pixels[k] + 0.59 * pixels[k + 1] + 0.11 * pixels[k + 2])) / 255;
    for (let c = 0; c < 3; c++) pixels[k + c] = MAPS[place + c] * light;
  }
  pen.putImageData(image, 0, 0);
}

function showPictures(run, k, word, limit) {
  const over = k === run.n, { columns, cell, picture } = run.sheet, name = run.name(k);
  run.latents.show(run.latent, k, run.x.scale[k], limit, GREYS, `the latent x, ${name}`);
  const area = run.preview.width * run.preview.height, image = new ImageData(run.preview.width, run.preview.height);
  for (let at = 0; at < area; at++) image.data.set([...run.colours.subarray(3 * (k * area + at), 3 * (k * area + at) + 3), 255], 4 * at);
  run.cheap.getContext("2d").putImageData(image, 0, 0);
  run.cheap.setAttribute("aria-label", `predicted picture, cheap, ${name}`);
  run.decoded.getContext("2d").drawImage(run.image, (k % columns) * cell[0], Math.floor(k / columns) * cell[1], ...picture, 0, 0, ...picture);
  if (word) lay(run, run.map(word, k), run.decoded);
  run.laid.classList.toggle("over", !word);
  if (word) run.laid.show("0", short(word.peak), MAPS);
  const laid = word ? ` Over it lies the attention to “${word.text}”${over ? ", the mean over all steps" : ""}.` : "";
  run.decoded.setAttribute("aria-label", `${over ? "the picture" : "predicted picture, decoded"}, ${name}.${laid}`);
  const texts = [
    ["x", over ? " the latent where the run ends" : " the latent that the UNet is given", run.shrunk],
    [over ? "x, cheap" : "x0, cheap", over ? " that latent as colours, by a linear map" : " the predicted picture by a linear map", ""],
    [over ? "The picture" : "x0, decoded", over ? " as the VAE decodes it." : " the predicted picture by the VAE.", laid],
  ];
  run.captions.forEach((caption, at) => caption.replaceChildren(element("b", {}, texts[at][0]), texts[at][1], texts[at][2]));
}

function showRow(run, k) {
  const [i, t, alpha, sigma, seconds] = run.rows[k];
  const texts = [run.name(k), String(i), String(Number(t.toPrecision(5))), alpha.toFixed(4), sigma.toFixed(4), seconds === null ? "" : seconds.toFixed(3)];
  run.cells.forEach(([value, cell], at) => {
    value.textContent = texts[at];
    cell.classList.toggle("over", texts[at] === "");
  });
  for (const word of run.words) {
    const values = run.map(word, k);
    if (word.canvas) paint(word.canvas, MAPS, (at) => values[at]);
  }
}

/** A word's maps over all steps, and their mean. */
function strip(run, word, go) {
  if (!word) return element("p", { class: "soft" }, "The other sentence has no such word.");
  run.strip = Array.from({ length: run.n + 1 }, (_, k) => {
    const map = canvas(run.maps[1], run.maps[0], "strip"), values = run.map(word, k);
    paint(map, MAPS, (at) => values[at]);
    map.setAttribute("aria-hidden", "true");
    const button = element("button", { type: "button", "aria-label": `“${word.text}”: ${k === run.n ? "the mean over all steps" : run.name(k)}` },
      map, element("span", {}, k === run.n ? "mean" : String(k + 1)));
    button.onclick = () => go(k);
    return button;
  });
  const row = element("div", { class: "strip", style: `--count: ${Math.min(run.n + 1, 16)}` }, ...run.strip);
  return element("div", {}, row, legend("0", short(word.peak), MAPS));
}

function mount(host) {
  const images = [...host.querySelectorAll("img[data-run]")], two = DATA.runs.length > 1, last = DATA.pairs.length - 1;
  const runs = DATA.runs.map((data, r) => makeRun(data, images[r])), guided = runs.filter((run) => run.guidance);
  const limit = Math.max(...runs.flatMap((run) => run.x.scale)), state = { position: last, key: null, timer: 0, dark: false };
  const columns = (of) => element("div", { class: "columns" }, ...runs.map(of));
  const go = (r, k) => move(DATA.pairs.findIndex((pair) => pair[r] === k));

  const slider = element("input", { type: "range", min: 0, max: last, step: 1, "aria-label": "step" });
  const play = element("button", { class: "play", type: "button" });
  slider.value = last;
  play.disabled = last === 0;
  const words = element("section", { class: "part", "aria-label": "attention over the steps" });
  const pulls = runs.map((run) => run.guidance && channels(run, "guidance", Math.min(run.channels, 4)));
  const graph = guided.length ? curve(guided, (g, k) => go(runs.indexOf(guided[g]), k)) : null;
  const absent = runs.map(() => element("p", { class: "soft" }));
  const paired = element("p", { class: "soft" }, DATA.paired);
  const pull = columns((run, r) => element("div", {}, ...(pulls[r] ? [pulls[r].node] : []), absent[r]));
  const page = element("div", { class: two ? "page two" : "page" },
    columns((run) => element("div", {}, sentence(run, choose), element("p", { class: "settings soft" }, run.settings),
      ...run.notes.map((note) => element("p", { class: "note soft" }, note)))),
    ...(two ? [element("p", { class: "note", "data-what": "differs" }, DATA.differs)] : []),
    element("div", { class: "control" }, play, slider), columns(rowOf), ...(two ? [paired] : []),
    columns((run) => panels(run, two)), words,
    element("section", { class: "part" }, element("h3", {}, "cond − uncond ", element("span", { class: "soft" }, "what the sentence adds to the UNet's output: its norm over the steps, and its channels now")),
      ...(two ? (graph ? [graph.node, pull] : [pull]) : [element("div", { class: graph ? "guidance" : "" }, ...(graph ? [graph.node] : []), pull)])));

  function choose(word) {
    state.key = state.key === word.key ? null : word.key;
    for (const run of runs) for (const each of run.words) each.button.setAttribute("aria-pressed", String(each.key === state.key));
    words.replaceChildren();
    for (const run of runs) run.strip = null;
    if (state.key !== null) words.append(element("h3", {}, `“${word.text}” `, element("span", { class: "soft" }, "attention to it over the steps, all layers and heads averaged")), columns((run, r) => strip(run, chosen(run), (k) => go(r, k))));
    else if (runs.some((run) => run.words.length)) words.append(element("p", { class: "soft" }, "Click a word to lay its attention over the picture. Under each word stands the largest value of its maps."));
    show();
  }
  const chosen = (run) => run.words.find((word) => word.key === state.key);

  function show() {
    const at = DATA.pairs[state.position], table = ramp(SIGNED[state.dark ? "dark" : "light"]);
    const reach = Math.max(...runs.map((run, r) => (run.guidance && run.guidance.scale[at[r]]) || 0));
    runs.forEach((run, r) => {
      const k = at[r], there = run.guidance && k < run.n && run.guidance.norm[k] !== null;
      showPictures(run, k, chosen(run), limit);
      showRow(run, k);
      if (run.strip) run.strip.forEach((button, j) => (j === k ? button.setAttribute("aria-current", "step") : button.removeAttribute("aria-current")));
      absent[r].textContent = !run.guidance ? run.unguided : k === run.n ? "The run is over: no step is taken here." : there ? "" : "This step is not guided.";
      if (pulls[r]) pulls[r].node.classList.toggle("over", !there);
      if (there) pulls[r].show(run.pull, k, run.guidance.scale[k], reach, table, `cond − uncond, ${run.name(k)}`);
    });
    if (graph) graph.show(guided.map((run) => at[runs.indexOf(run)]));
    slider.setAttribute("aria-valuetext", runs.map((run, r) => `${run.letter} ${run.name(at[r])}`.trim()).join(", "));
  }

  function move(position) {
    state.position = Math.max(0, Math.min(last, position));
    slider.value = state.position;
    show();
  }

  function playing(on) {
    clearInterval(state.timer);
    state.timer = on ? setInterval(() => (state.position < last && host.isConnected ? move(state.position + 1) : playing(false)), Math.max(120, Math.min(500, 6000 / last))) : 0;
    play.setAttribute("aria-label", on ? "pause" : "play");
    play.replaceChildren(element("svg", { width: 14, height: 14, viewBox: "0 0 14 14", "aria-hidden": "true" },
      element("path", { d: on ? "M2 1h4v12H2zM8 1h4v12H8z" : "M3 0.5v13l10-6.5z", fill: "currentColor" })));
  }
  play.onclick = () => {
    const on = !state.timer;
    if (on && state.position === last) move(0);
    playing(on);
  };
  slider.oninput = () => { playing(false); move(Number(slider.value)); };
  page.onkeydown = (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const to = { ArrowLeft: state.position - 1, ArrowRight: state.position + 1, Home: 0, End: last }[event.key];
    if (to !== undefined) { playing(false); move(to); }
    else if (event.key === " " && event.target === slider) play.onclick();
    else if (event.key === "Escape" && state.key !== null) choose({ key: state.key });
    else return;
    event.preventDefault();
    event.stopPropagation();
  };

  /** The colour of the text around tells whether the page is dark: in a notebook only its theme knows. */
  function look() {
    const [red, green, blue] = getComputedStyle(host).color.match(/[\d.]+/g).map(Number);
    state.dark = 0.3 * red + 0.59 * green + 0.11 * blue > 128;
    page.classList.toggle("dark", state.dark);
    show();
  }
  const lookAgain = () => [0, 300, 1500].forEach((wait) => setTimeout(look, wait));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", lookAgain);
  for (const node of [document.documentElement, document.body]) new MutationObserver(lookAgain).observe(node, { attributes: true });

  playing(false);
  choose({ key: state.key });
  host.attachShadow({ mode: "open" }).append(element("style", {}, STYLE), page); // what stood in `host` is no longer shown
  look();
}

/** Mount every copy of this stepper in the document; notebooks may run a script before its output is in place. */
function begin(tries) {
  const waiting = [...document.querySelectorAll(`[data-ldm-stepper="${DATA.token}"]:not([data-ldm-ready])`)];
  for (const host of waiting) {
    host.setAttribute("data-ldm-ready", "");
    Promise.all([...host.querySelectorAll("img[data-run]")].map((image) => image.decode())).then(() => mount(host));
  }
  if (!waiting.length && tries) setTimeout(begin, 100, tries - 1);
}
begin(50);
