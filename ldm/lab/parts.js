// The parts of a stepper (stepper.js): canvases and what is painted on them. DATA stands before this file in the page.

const SVG = ["svg", "path", "line", "text", "circle", "title"];
const SIGNED = {
  light: ["#123f6b", "#5b94c8", "#f4f3f1", "#e0965a", "#8a3a08"],
  dark: ["#9cc9f5", "#3f78b0", "#1f2023", "#b5622a", "#ffc08f"],
};

function element(name, attributes = {}, ...children) {
  const space = SVG.includes(name) ? "http://www.w3.org/2000/svg" : "http://www.w3.org/1999/xhtml";
  const node = document.createElementNS(space, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function bytes(text, Kind = Uint8Array) {
  return new Kind(Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)).buffer);
}

/** Two digits, as a scale needs them. */
function short(value) {
  if (value < 0.001) return value.toExponential(1);
  return value >= 100 ? String(Math.round(value)) : value.toPrecision(2);
}

// ---------------------------------------------------------------------------------------------------- colours

/** Colours between the stops: 256 of them, three bytes each. */
function ramp(stops) {
  const rgb = stops.map((stop) => [1, 3, 5].map((at) => parseInt(stop.slice(at, at + 2), 16)));
  const table = new Uint8ClampedArray(768);
  for (let k = 0; k < 256; k++) {
    const place = (k / 255) * (stops.length - 1);
    const low = Math.min(Math.floor(place), stops.length - 2);
    for (let c = 0; c < 3; c++) table[3 * k + c] = rgb[low][c] + (place - low) * (rgb[low + 1][c] - rgb[low][c]);
  }
  return table;
}

const MAPS = ramp(DATA.ramp);
const GREYS = ramp(["#000000", "#ffffff"]);
const SIGNS = { light: ramp(SIGNED.light), dark: ramp(SIGNED.dark) };

function canvas(width, height, what, kind = "pixels") {
  return element("canvas", { width, height, class: kind, role: "img", "data-what": what });
}

function pen(target) {
  return target.getContext("2d", { willReadFrequently: true });
}

/** Set every pixel of a canvas: `at(k)` is its place in `table`, 0 to 255. */
function paint(target, table, at) {
  const image = new ImageData(target.width, target.height);
  for (let k = 0; k < target.width * target.height; k++) {
    const place = 3 * Math.max(0, Math.min(255, Math.round(at(k))));
    image.data.set([table[place], table[place + 1], table[place + 2], 255], 4 * k);
  }
  pen(target).putImageData(image, 0, 0);
}

/** A map of h x w values at (u, v), each between 0 and 1: bilinear. */
function between(values, h, w, u, v) {
  const y = Math.max(0, Math.min(h - 1, v * h - 0.5));
  const x = Math.max(0, Math.min(w - 1, u * w - 0.5));
  const i = Math.floor(y), j = Math.floor(x);
  const below = Math.min(i + 1, h - 1), right = Math.min(j + 1, w - 1);
  const top = values[i * w + j] * (1 - x + j) + values[i * w + right] * (x - j);
  const bottom = values[below * w + j] * (1 - x + j) + values[below * w + right] * (x - j);
  return top * (1 - y + i) + bottom * (y - i);
}

/** A word's map over the picture: its colours, lit by the picture, so dark where nothing is attended to. */
function lay(run, values, target) {
  const image = pen(target).getImageData(0, 0, target.width, target.height), pixels = image.data;
  for (let k = 0; k < target.width * target.height; k++) {
    const u = ((k % target.width) + 0.5) / target.width, v = (Math.floor(k / target.width) + 0.5) / target.height;
    const place = 3 * Math.round(between(values, run.maps[0], run.maps[1], u, v));
    const grey = (0.299 * pixels[4 * k] + 0.587 * pixels[4 * k + 1] + 0.114 * pixels[4 * k + 2]) / 255;
    for (let c = 0; c < 3; c++) pixels[4 * k + c] = MAPS[place + c] * (DATA.shade + (1 - DATA.shade) * grey);
  }
  pen(target).putImageData(image, 0, 0);
}

/** A bar of colours between two numbers. */
function legend() {
  const bar = canvas(64, 1, "legend", "bar");
  const low = element("span", {}, "0"), high = element("span", {}, "0"); // one that is hidden keeps its place
  bar.setAttribute("aria-hidden", "true");
  function show(from, to, table) {
    low.textContent = from;
    high.textContent = to;
    paint(bar, table, (k) => (k / 63) * 255);
  }
  return { node: element("div", { class: "legend" }, low, bar, high), show };
}

// ---------------------------------------------------------------------------------------------------- one run

/** A run's data unpacked, and what is asked of it. */
function unpack(data, image) {
  const n = data.rows.length - 1;
  const size = data.channels * data.height * data.width, area = data.maps[0] * data.maps[1];
  return {
    ...data, image, n,
    latent: bytes(data.x.bytes, Int8Array),
    colours: bytes(data.preview.bytes),
    pull: data.guidance && bytes(data.guidance.bytes, Int8Array),
    words: data.words.map((word) => ({ ...word, values: bytes(word.bytes) })),
    name: (k) => (k === n ? "the end" : `step ${k + 1} of ${n}`),
    guided: (k) => Boolean(data.guidance) && k < n && data.guidance.norm[k] !== null,
    /** Channel c of the latents or the guidance at step k. */
    channel(values, k, c) {
      const own = size / data.channels;
      return values.subarray(k * size + c * own, k * size + (c + 1) * own);
    },
    /** A word's map at step k; where the run is over, the mean over its steps. */
    map(word, k) {
      if (k < n) return word.values.subarray(k * area, (k + 1) * area);
      const mean = new Float32Array(area);
      word.values.forEach((value, at) => (mean[at % area] += value / n));
      return mean;
    },
  };
}

/** The sentence: each word a button, with its map below it. */
function sentence(run, choose) {
  const parts = run.letter ? [element("span", { class: "letter" }, run.letter)] : [];
  for (const [text, at] of run.sentence) {
    if (at < 0) {
      parts.push(element("span", { class: "plain" }, text));
      continue;
    }
    const word = run.words[at], peak = short(word.peak);
    const label = `${text}: lay the attention to it over the picture; at most ${peak}`;
    word.canvas = canvas(run.maps[1], run.maps[0], "word-map");
    word.canvas.setAttribute("aria-hidden", "true");
    word.button = element("button", { class: "word", type: "button", "aria-label": label }, text, word.canvas);
    word.button.append(element("span", { class: "peak" }, peak));
    word.button.onclick = () => choose(word);
    parts.push(word.button);
  }
  return element("div", { class: run.words.length > 12 ? "sentence many" : "sentence" }, ...parts);
}

/** i, t, alpha, sigma and the seconds. */
function row(run) {
  const names = ["where", "i", "t", "alpha", "sigma", "seconds"];
  const values = names.map((name) => element("dd", { class: name, "data-what": name }));
  const cells = names.map((name, at) => element("div", {}, ...(at ? [element("dt", {}, name)] : []), values[at]));
  function show(k) {
    const [i, t, alpha, sigma, seconds] = run.rows[k];
    const texts = [run.name(k), String(i), String(Number(t.toPrecision(5))), alpha.toFixed(4), sigma.toFixed(4)];
    texts.push(seconds === null ? "" : seconds.toFixed(3));
    values.forEach((value, at) => (value.textContent = texts[at]));
    cells.forEach((cell, at) => cell.classList.toggle("over", texts[at] === ""));
  }
  return { node: element("dl", { class: "row" }, ...cells), show };
}

/** The channels of latents or guidance, a canvas each, and how far their colours reach. */
function channels(run, what, across) {
  const shown = Array.from({ length: run.channels }, () => canvas(run.width, run.height, what));
  const scale = legend();
  function show(values, k, size, limit, table, name) {
    shown.forEach((target, c) => {
      const own = run.channel(values, k, c);
      paint(target, table, (at) => 127.5 + ((own[at] / 127) * size * 127.5) / limit);
      target.setAttribute("aria-label", `${name}, channel ${c + 1} of ${run.channels}`);
    });
    scale.show(`−${short(limit)}`, `+${short(limit)}`, table);
  }
  const grid = element("div", { class: "channels", style: `--across: ${across}` }, ...shown);
  return { grid, scale: scale.node, show };
}

/** Three panels: the latent, the cheap picture, the decoded one, over which a word's map may lie. */
function panels(run, two, limit) {
  const latent = channels(run, "x", two ? Math.min(run.channels, 4) : Math.ceil(Math.sqrt(run.channels)));
  const cheap = canvas(run.preview.width, run.preview.height, "preview");
  const decoded = canvas(...run.sheet.picture, "decode", "smooth");
  const captions = [0, 1, 2].map(() => element("figcaption")), laid = legend();
  const node = element("div", { class: "panels" },
    element("figure", { class: "latent" }, latent.grid, captions[0], latent.scale),
    element("figure", {}, cheap, captions[1]),
    element("figure", {}, decoded, captions[2], laid.node));

  function say(k) {
    const over = k === run.n;
    const texts = over
      ? [["x", "the latent where the run ends"], ["x, cheap", "the same by a linear map to colours"],
        ["The picture", "as the VAE decodes it"]]
      : [["x", "the latent that the UNet is given"], ["x0, cheap", "the predicted picture by a linear map"],
        ["x0, decoded", "the predicted picture by the VAE"]];
    texts[0][1] += run.shrunk;
    captions.forEach((caption, at) => caption.replaceChildren(element("b", {}, texts[at][0]), ` ${texts[at][1]}`));
  }

  function show(k, word) {
    const over = k === run.n, { columns, cell, picture } = run.sheet;
    latent.show(run.latent, k, run.x.scale[k], limit, GREYS, `the latent x, ${run.name(k)}`);
    const area = cheap.width * cheap.height, image = new ImageData(cheap.width, cheap.height);
    for (let at = 0; at < area; at++) {
      const first = 3 * (k * area + at);
      image.data.set([...run.colours.subarray(first, first + 3), 255], 4 * at);
    }
    pen(cheap).putImageData(image, 0, 0);
    cheap.setAttribute("aria-label", `predicted picture, cheap, ${run.name(k)}`);
    const from = [(k % columns) * cell[0], Math.floor(k / columns) * cell[1], ...picture];
    pen(decoded).drawImage(run.image, ...from, 0, 0, ...picture);
    if (word) lay(run, run.map(word, k), decoded);
    const what = word ? `; over it the attention to “${word.text}”${over ? ", the mean over all steps" : ""}` : "";
    decoded.setAttribute("aria-label", `${over ? "the picture" : "predicted picture, decoded"}, ${run.name(k)}${what}`);
    laid.node.classList.toggle("over", !word);
    if (word) laid.show("0", `${short(word.peak)} for “${word.text}”${over ? ", mean" : ""}`, MAPS);
    say(k);
  }
  return { node, show };
}

/** A word's maps at all steps, and their mean, each a button that goes there. */
function strip(run, word, go) {
  if (!word) {
    const bare = !run.words.length && run.notes.length; // a note says why there are no maps of any word
    const text = bare ? "This run has no attention maps." : "The other sentence has no such word.";
    return { node: element("p", { class: "soft strip" }, text), show() {} };
  }
  const buttons = Array.from({ length: run.n + 1 }, (_, k) => {
    const map = canvas(run.maps[1], run.maps[0], "strip"), values = run.map(word, k), over = k === run.n;
    paint(map, MAPS, (at) => values[at]);
    map.setAttribute("aria-hidden", "true");
    const label = `“${word.text}”: ${over ? "the mean over all steps" : run.name(k)}`;
    const button = element("button", { type: "button", "aria-label": label }, map);
    button.append(element("span", {}, over ? "mean" : String(k + 1)));
    button.onclick = () => go(k);
    return button;
  });
  const scale = legend();
  scale.show("0", short(word.peak), MAPS);
  const all = element("div", { class: "strip", style: `--count: ${Math.min(run.n + 1, 16)}` }, ...buttons);
  function show(k) {
    for (const button of buttons) button.removeAttribute("aria-current");
    buttons[k].setAttribute("aria-current", "step");
  }
  return { node: element("div", {}, all, scale.node), show };
}

// ---------------------------------------------------------------------------------------------------- guidance

/** The norms of cond − uncond over the steps of one or two runs, against the place between noise and picture. */
function curve(runs, two, go) {
  const W = two ? 780 : 480, H = two ? 140 : 200, left = 40, right = W - 10, top = 16, bottom = H - 24;
  const most = Math.max(...runs.flatMap((run) => run.guidance.norm.map((norm) => norm || 0))) || 1;
  const x = (run, k) => left + (right - left) * run.places[k];
  const y = (norm) => bottom - ((bottom - top) * norm) / most;
  const marker = element("line", { class: "marker", y1: top, y2: bottom });
  const now = element("text", { class: "now", "text-anchor": "middle" });
  const node = element("svg", { class: "curve", viewBox: `0 0 ${W} ${H}`, role: "img" },
    element("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }),
    element("text", { x: left - 8, y: top + 4, "text-anchor": "end" }, short(most)),
    element("text", { x: left - 8, y: bottom + 4, "text-anchor": "end" }, "0"),
    element("text", { x: left, y: H - 7 }, "noise"),
    element("text", { x: right, y: H - 7, "text-anchor": "end" }, "picture"), marker);
  const dots = runs.map((run, r) => {
    const kind = run.letter === "B" ? "b" : "a";
    const points = run.guidance.norm.map((norm, k) => (norm === null ? null : [x(run, k), y(norm)]));
    const path = points.map((point, k) => (point ? `${k && points[k - 1] ? "L" : "M"}${point}` : "")).join("");
    node.append(element("path", { class: `line ${kind}`, d: path }));
    return points.map((point, k) => {
      if (!point) return null;
      const about = element("title", {}, `${run.letter} ${run.name(k)}: ${run.guidance.norm[k].toPrecision(3)}`);
      const dot = element("circle", { class: `dot ${kind}`, cx: point[0], cy: point[1], r: 3 }, about);
      dot.onclick = () => go(r, k);
      node.append(dot);
      return dot;
    });
  });
  node.append(now);
  const keys = runs.map((run) => element("span", { class: `key ${run.letter === "B" ? "b" : "a"}` }));

  function show(at) {
    const texts = runs.map((run, r) => (run.guided(at[r]) ? run.guidance.norm[at[r]].toPrecision(3) : "none now"));
    keys.forEach((key, r) => (key.textContent = `${runs[r].letter} ${texts[r]}`));
    dots.forEach((own, r) => own.forEach((dot, k) => dot && dot.setAttribute("r", k === at[r] ? 5 : 3)));
    const place = x(runs[0], at[0]), single = !two && runs[0].guided(at[0]);
    for (const end of ["x1", "x2"]) marker.setAttribute(end, place);
    now.textContent = single ? texts[0] : "";
    now.setAttribute("x", Math.max(left + 14, Math.min(right - 14, place)));
    now.setAttribute("y", single ? Math.max(11, y(runs[0].guidance.norm[at[0]]) - 9) : 0);
    const about = `Norm of cond − uncond over the steps, at most ${short(most)}`;
    node.setAttribute("aria-label", `${about}; now ${texts.join(", ")}`);
  }
  return { node, keys: two ? keys : [], show };
}
