// The live view: polls the server, turns its counters into rates, and draws both.
import { live } from "./api.js";
import { draw, make, number, percent } from "./tools.js";

const PERIOD_MS = 1000;
const PATIENCE_MS = 5000; // between attempts while the server does not answer, and for one answer
const WINDOW = 120; // samples kept, so two minutes
const WIDTH = 120;
const HEIGHT = 32;

/** What each tile tells: `value` of a sample, `scale` the value at the chart's top, `null` for none. */
const TILES = [
  { id: "running", name: "Running", write: number, note: (now) => `${number(now.finished)} finished` },
  { id: "waiting", name: "Waiting", write: number, note: (now) => (now.preemptions ? `${number(now.preemptions)} preempted` : "in the queue") },
  { id: "generation", name: "Generation", unit: "tok/s", write: number, note: (now) => `${number(now.generation_tokens)} tokens in all` },
  { id: "prompt", name: "Prompt", unit: "tok/s", write: number, note: (now) => `${number(now.prompt_tokens)} tokens in all` },
  { id: "kv", name: "KV cache in use", write: percent, scale: 1, note: () => "of all pages" },
  { id: "hits", name: "Prefix cache hits", write: percent, scale: 1, note: (now) => `${number(now.cached_tokens)} tokens in all` },
];

/** Turn two answers of the server into one sample. */
export function sample(now, before) {
  const seconds = before ? now.time - before.time : 0;
  // counters start again with the server
  const grown = (name) => (before ? Math.max(0, now[name] - before[name]) : 0);
  const rate = (name) => (seconds > 0 ? grown(name) / seconds : 0);
  return {
    running: now.running,
    waiting: now.waiting,
    generation: rate("generation_tokens"),
    prompt: rate("prompt_tokens"),
    kv: now.kv_usage,
    prompted: grown("prompt_tokens"),
    cached: grown("cached_tokens"),
  };
}

/** Return the share of looked up tokens that the prefix cache had, over some samples. */
export function hitRate(samples) {
  const sum = (name) => samples.reduce((total, one) => total + one[name], 0);
  const prompted = sum("prompted");
  return prompted > 0 ? sum("cached") / prompted : null;
}

class Tile {
  constructor({ name, unit = "", write, scale = null, note, id }) {
    Object.assign(this, { name, write, scale, note, unit });
    this.value = make("span", { class: "value", id: `live-${id}` }, "–");
    this.small = make("span", { class: "note" }, "\u00a0");
    this.area = draw("path", { class: "area" });
    this.line = draw("path", { class: "line" });
    const box = { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", class: "spark", role: "img" };
    this.chart = draw("svg", box, this.area, this.line);
    const heading = make("h3", {}, name);
    const figure = make("p", { class: "figure" }, this.value, unit ? make("span", { class: "unit" }, ` ${unit}`) : "");
    this.element = make("div", { class: "tile", "data-tile": id }, heading, figure, this.chart, this.small);
  }

  show(values, now) {
    const last = values.at(-1);
    const known = values.filter((value) => value !== null);
    const peak = known.length ? Math.max(...known) : 0;
    this.value.textContent = last === null ? "–" : this.write(last);
    this.small.textContent = this.note(now);
    const summary = known.length ? `now ${last === null ? "none" : this.write(last)}, at most ${this.write(peak)}` : "nothing yet";
    this.chart.setAttribute("aria-label", `${this.name} over the last two minutes: ${summary}`);
    const top = this.scale ?? Math.max(peak, 1);
    const start = WINDOW - values.length;
    const points = values.map((value, index) => {
      const x = ((start + index) / (WINDOW - 1)) * WIDTH;
      const y = HEIGHT - 1 - ((value ?? 0) / top) * (HEIGHT - 3);
      return `${x.toFixed(1)} ${y.toFixed(1)}`;
    });
    const line = `M${points.join("L")}`;
    this.line.setAttribute("d", line);
    this.area.setAttribute("d", `${line}V${HEIGHT}H${((start / (WINDOW - 1)) * WIDTH).toFixed(1)}Z`);
  }
}

/** Polls as long as the page is looked at. */
export class LiveView {
  /**
   * @param {HTMLElement} home where the tiles go
   * @param {(now: object | null, sample: object | null) => void} heard told of every answer; null if there is none
   */
  constructor(home, heard) {
    this.heard = heard;
    this.samples = [];
    this.before = null;
    this.timer = null;
    this.tiles = TILES.map((spec) => new Tile(spec));
    this.ids = TILES.map(({ id }) => id);
    home.append(...this.tiles.map((tile) => tile.element));
    document.addEventListener("visibilitychange", () => this.resume());
    this.resume();
  }

  resume() {
    clearTimeout(this.timer);
    if (!document.hidden) void this.poll();
  }

  async poll() {
    let pause = PERIOD_MS;
    try {
      this.take(await live(AbortSignal.timeout(PATIENCE_MS)));
    } catch {
      pause = PATIENCE_MS;
      this.before = null;
      this.heard(null, null);
    }
    clearTimeout(this.timer);
    if (!document.hidden) this.timer = setTimeout(() => void this.poll(), pause);
  }

  take(now) {
    if (now.running === undefined) {
      this.heard(now, null);
      return;
    }
    const one = sample(now, this.before);
    this.before = now;
    this.samples.push(one);
    this.samples.splice(0, this.samples.length - WINDOW);
    one.hits = hitRate(this.samples);
    this.tiles.forEach((tile, index) => {
      tile.show(this.samples.map((each) => each[this.ids[index]]), now);
    });
    this.heard(now, one);
  }
}
