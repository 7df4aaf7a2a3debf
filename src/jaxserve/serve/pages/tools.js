// Small things that the other files share: making elements, keeping values, writing numbers.

/**
 * Make an element. Text and attributes only: nothing is ever parsed as HTML.
 * @param {string} tag
 * @param {Object<string, string | boolean | null>} attributes null and false leave one out
 * @param {...(Node | string)} children
 */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

const SVG = "http://www.w3.org/2000/svg";

/** The same for drawings. */
export function draw(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

export const byId = (id) => document.getElementById(id);

/** Values that outlive a reload, each under a name; servers behind one proxy do not share them. */
export class Store {
  /** @param {() => Storage} storage asked for late, because it may be forbidden to touch it */
  constructor(storage) {
    this.storage = storage;
    this.prefix = `jaxserve${new URL(document.baseURI).pathname}`;
  }

  read(name, fallback) {
    try {
      return JSON.parse(this.storage().getItem(this.prefix + name)) ?? fallback;
    } catch {
      return fallback;
    }
  }

  write(name, value) {
    try {
      this.storage().setItem(this.prefix + name, JSON.stringify(value));
    } catch {
      // full or forbidden: the value then lasts as long as the page
    }
  }
}

export const tabStore = new Store(() => window.sessionStorage);
export const browserStore = new Store(() => window.localStorage);

const compact = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

/** Write a count or a rate in at most five characters or so. */
export function number(value) {
  if (value >= 10000) return compact.format(value);
  if (value >= 100 || Number.isInteger(value)) return whole.format(value);
  return value.toFixed(1);
}

/** Write a share between 0 and 1. */
export function percent(share) {
  const value = share * 100;
  return `${value > 0 && value < 9.95 ? value.toFixed(1) : Math.round(value)} %`;
}

/** Write a duration given in milliseconds. */
export function duration(ms) {
  return ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(ms < 10000 ? 2 : 1)} s`;
}
