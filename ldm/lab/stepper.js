// A stepper: what is chosen, and what then is shown. DATA, STYLE and parts.js stand before this file in the page.

const HINT = "Click a word to lay its attention over the picture. "
  + "Each word has a scale of its own: its maps reach from 0 to the number below it.";
const PULL = "what the sentence adds to the network’s output: its norm over the steps, and its channels now";

class Stepper {
  constructor(host) {
    const images = host.querySelectorAll("img[data-run]");
    this.host = host;
    this.runs = DATA.runs.map((data, r) => unpack(data, images[r]));
    this.two = this.runs.length > 1;
    this.last = DATA.pairs.length - 1;
    this.position = this.last;
    this.key = null; // of the word that lies over the picture
    this.strips = [];
    this.timer = 0;
    this.build();
    this.choose(null);
    this.play(false);
    this.watch();
    // What stood in `host` before is no longer shown: the pictures for those without scripts.
    host.attachShadow({ mode: "open" }).append(element("style", {}, STYLE), this.page);
    this.look();
  }

  columns(make) {
    return element("div", { class: "columns" }, ...this.runs.map(make));
  }

  build() {
    const { runs, two } = this;
    const limit = Math.max(...runs.flatMap((run) => run.x.scale));
    this.rows = runs.map(row);
    this.pictures = runs.map((run) => panels(run, two, limit));
    this.words = element("section", { class: "part", "aria-label": "attention over the steps" });
    this.slider = element("input", { type: "range", min: 0, max: this.last, step: 1, "aria-label": "step" });
    this.button = element("button", { class: "play", type: "button" });
    this.button.disabled = this.last === 0;
    const note = (what, text) => (two ? [element("p", { class: what, "data-what": what }, text)] : []);
    const head = (run) => element("div", {}, sentence(run, (word) => this.choose(word)),
      element("p", { class: "settings soft" }, run.settings),
      ...run.notes.map((text) => element("p", { class: "note soft" }, text)));
    this.page = element("div", { class: two ? "page two" : "page" },
      this.columns(head), ...note("differs", DATA.differs),
      element("div", { class: "control" }, this.button, this.slider),
      this.columns((run, r) => this.rows[r].node), ...note("paired", DATA.paired),
      this.columns((run, r) => this.pictures[r].node), this.words, this.guidance());
  }

  guidance() {
    const { runs, two } = this;
    const guided = runs.filter((run) => run.guidance);
    this.pulls = runs.map((run) => {
      if (!run.guidance) return null;
      const made = channels(run, "guidance", two ? Math.min(run.channels, 4) : Math.ceil(Math.sqrt(run.channels)));
      return { ...made, node: element("div", {}, made.grid, made.scale) };
    });
    this.absent = runs.map(() => element("p", { class: "soft", "data-what": "absent" }));
    const now = this.columns((run, r) =>
      element("div", { class: "stack" }, ...(this.pulls[r] ? [this.pulls[r].node] : []), this.absent[r]));
    const title = element("h3", {}, "cond − uncond ", element("span", { class: "soft" }, PULL));
    if (!guided.length) return element("section", { class: "part" }, title, now);
    this.curve = curve(guided, two, (g, k) => this.go(runs.indexOf(guided[g]), k));
    title.append(...this.curve.keys);
    return element("section", { class: "part" }, title, element("div", { class: "guidance" }, this.curve.node, now));
  }

  /** Lay a word over the pictures, of both runs if both have it; the same word again takes it away. */
  choose(word) {
    this.key = word && word.key !== this.key ? word.key : null;
    for (const run of this.runs)
      for (const each of run.words) each.button.setAttribute("aria-pressed", String(each.key === this.key));
    this.words.replaceChildren();
    this.strips = [];
    if (this.key !== null) {
      const about = element("span", { class: "soft" }, "attention to it over the steps, all layers and heads averaged");
      this.strips = this.runs.map((run, r) => strip(run, this.chosen(run), (k) => this.go(r, k)));
      const title = element("h3", {}, `“${word.text}” `, about);
      this.words.append(title, this.columns((run, r) => this.strips[r].node));
    } else if (this.runs.some((run) => run.words.length)) {
      this.words.append(element("p", { class: "soft" }, HINT));
    }
    this.words.hidden = !this.words.firstChild;
    this.show();
  }

  chosen(run) {
    return run.words.find((word) => word.key === this.key);
  }

  show() {
    const at = DATA.pairs[this.position], table = SIGNS[this.dark ? "dark" : "light"];
    const reach = Math.max(...this.runs.map((run, r) => (run.guided(at[r]) ? run.guidance.scale[at[r]] : 0)));
    this.runs.forEach((run, r) => {
      const k = at[r], guided = run.guided(k);
      this.rows[r].show(k);
      this.pictures[r].show(k, this.chosen(run));
      for (const word of run.words) {
        const values = run.map(word, k);
        paint(word.canvas, MAPS, (place) => values[place]);
      }
      if (this.strips[r]) this.strips[r].show(k);
      const over = k === run.n ? "The run is over: no step is taken here." : "This step is not guided.";
      this.absent[r].textContent = guided ? "" : run.guidance ? over : run.unguided;
      if (this.pulls[r]) this.pulls[r].node.classList.toggle("over", !guided);
      const name = `cond − uncond, ${run.name(k)}`;
      if (guided) this.pulls[r].show(run.pull, k, run.guidance.scale[k], reach, table, name);
    });
    if (this.curve) this.curve.show(at.filter((k, r) => this.runs[r].guidance));
    this.slider.value = this.position;
    const texts = this.runs.map((run, r) => `${run.letter} ${run.name(at[r])}`.trim());
    this.slider.setAttribute("aria-valuetext", texts.join(", "));
  }

  move(position) {
    this.position = Math.max(0, Math.min(this.last, position));
    this.show();
  }

  /** To step k of run r, or where that is nearest. */
  go(r, k) {
    const far = DATA.pairs.map((pair) => Math.abs(pair[r] - k));
    this.play(false);
    this.move(far.indexOf(Math.min(...far)));
  }

  play(on) {
    clearInterval(this.timer);
    this.timer = on ? setInterval(() => this.tick(), Math.max(120, Math.min(500, 6000 / this.last))) : 0;
    this.button.setAttribute("aria-label", on ? "pause" : "play");
    const shape = on ? "M2 1h4v12H2zM8 1h4v12H8z" : "M3 0.5v13l10-6.5z";
    this.button.replaceChildren(element("svg", { width: 14, height: 14, viewBox: "0 0 14 14", "aria-hidden": "true" },
      element("path", { d: shape, fill: "currentColor" })));
  }

  tick() {
    if (this.position < this.last && this.host.isConnected) this.move(this.position + 1);
    else this.play(false);
  }

  toggle() {
    const on = !this.timer;
    if (on && this.position === this.last) this.move(0);
    this.play(on);
  }

  pressed(event) {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const places = { ArrowLeft: this.position - 1, ArrowRight: this.position + 1, Home: 0, End: this.last };
    if (event.key in places) {
      this.play(false);
      this.move(places[event.key]);
    } else if (event.key === "Escape" && this.key !== null) this.choose(null);
    else if (event.key === " " && event.target === this.slider && this.last) this.toggle();
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  watch() {
    this.button.onclick = () => this.toggle();
    this.slider.oninput = () => {
      this.play(false);
      this.move(Number(this.slider.value));
    };
    this.page.onkeydown = (event) => this.pressed(event);
    // A notebook's theme shows at once in its attributes, and a little later in its colours.
    const later = () => [0, 300, 1500].forEach((wait) => setTimeout(() => this.look(), wait));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", later);
    for (const node of [document.documentElement, document.body])
      new MutationObserver(later).observe(node, { attributes: true });
  }

  /** The colour of the text around tells whether the page is dark: in a notebook only its theme knows. */
  look() {
    const [red, green, blue] = getComputedStyle(this.host).color.match(/[\d.]+/g).map(Number);
    const dark = 0.299 * red + 0.587 * green + 0.114 * blue > 128;
    if (dark === this.dark) return;
    this.dark = dark;
    this.page.classList.toggle("dark", dark);
    this.show();
  }
}

/** Mount every copy of this stepper in the document. A notebook may run a script before its output is in place. */
function begin(tries) {
  const waiting = document.querySelectorAll(`[data-ldm-stepper="${DATA.token}"]:not([data-ldm-ready])`);
  for (const host of waiting) {
    host.setAttribute("data-ldm-ready", "");
    const images = [...host.querySelectorAll("img[data-run]")];
    Promise.all(images.map((image) => image.decode())).then(() => new Stepper(host));
  }
  if (!waiting.length && tries) setTimeout(begin, 100, tries - 1);
}
begin(50);
