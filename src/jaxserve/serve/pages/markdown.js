// The part of Markdown that models write, drawn while it still grows.
//
// Every element is made by name and every text set as text, so that nothing a model says can become
// markup, a script or a request: there are no images, and links lead only where a click sends them.
import { make } from "./tools.js";

const MAX_DEPTH = 6; // of lists and quotes in each other; what is deeper is shown as it stands

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^\s`]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const QUOTE = /^ {0,3}>\s?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])(\s+)(?=\S)/;
const TABLE_RULE = /^ {0,3}\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;

const isBlank = (line) => line.trim() === "";

/** Tell whether a line ends a paragraph by beginning something else. */
function interrupts(line) {
  return isBlank(line) || [FENCE, HEADING, RULE, QUOTE, ITEM].some((form) => form.test(line));
}

function takeFence(lines, start) {
  const [, mark, language] = FENCE.exec(lines[start]);
  const closing = new RegExp(`^ {0,3}${mark[0]}{${mark.length},}\\s*$`);
  let end = start + 1;
  while (end < lines.length && !closing.test(lines[end])) end += 1;
  return { kind: "code", language, text: lines.slice(start + 1, end).join("\n"), end: end + 1 };
}

function takeQuote(lines, start) {
  let end = start;
  while (end < lines.length && QUOTE.test(lines[end])) end += 1;
  const text = lines.slice(start, end).map((line) => line.replace(QUOTE, "")).join("\n");
  return { kind: "quote", text, end };
}

function takeList(lines, start) {
  const isOrdered = /\d/.test(ITEM.exec(lines[start])[2]);
  const first = Number.parseInt(ITEM.exec(lines[start])[2], 10);
  const items = [];
  let end = start;
  let indent = 0;
  while (end < lines.length) {
    const line = lines[end];
    const mark = ITEM.exec(line);
    const depth = line.length - line.trimStart().length;
    if (mark && (items.length === 0 || depth < indent)) {
      if (/\d/.test(mark[2]) !== isOrdered || RULE.test(line)) break;
      indent = mark[1].length + mark[2].length + Math.min(mark[3].length, 4);
      items.push([line.slice(mark[0].length)]);
    } else if (isBlank(line)) {
      const next = lines[end + 1] ?? "";
      const goesOn = ITEM.test(next) || next.length - next.trimStart().length >= 2;
      if (isBlank(next) || !goesOn) break;
      items.at(-1).push("");
    } else if (depth >= Math.min(indent, 2)) {
      items.at(-1).push(line.slice(Math.min(depth, indent)));
    } else if (interrupts(line)) {
      break;
    } else {
      items.at(-1).push(line);
    }
    end += 1;
  }
  return { kind: "list", isOrdered, first, items: items.map((item) => item.join("\n")), end };
}

const cells = (row) => row.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());

function takeTable(lines, start) {
  let end = start + 2;
  while (end < lines.length && lines[end].includes("|")) end += 1;
  const rows = lines.slice(start + 2, end).map(cells);
  return { kind: "table", head: cells(lines[start]), rows, end };
}

function takeText(lines, start) {
  let end = start + 1;
  while (end < lines.length && !interrupts(lines[end])) end += 1;
  return { kind: "text", text: lines.slice(start, end).join("\n"), end };
}

function take(lines, start) {
  const line = lines[start];
  if (FENCE.test(line)) return takeFence(lines, start);
  const heading = HEADING.exec(line);
  if (heading) return { kind: "heading", level: heading[1].length, text: heading[2], end: start + 1 };
  if (RULE.test(line)) return { kind: "rule", end: start + 1 };
  if (QUOTE.test(line)) return takeQuote(lines, start);
  if (ITEM.test(line)) return takeList(lines, start);
  if (line.includes("|") && TABLE_RULE.test(lines[start + 1] ?? "")) return takeTable(lines, start);
  return takeText(lines, start);
}

/** Cut a text into blocks, each with the source that it was made from. */
export function blocks(text) {
  const lines = text.replace(/\r\n?/g, "\n").replace(/\t/g, "    ").split("\n");
  const found = [];
  let position = 0;
  while (position < lines.length) {
    if (isBlank(lines[position])) {
      position += 1;
      continue;
    }
    const block = take(lines, position);
    block.source = lines.slice(position, block.end).join("\n");
    found.push(block);
    position = block.end;
  }
  return found;
}

const INLINE = new RegExp(
  [
    /(?<ticks>`+)(?<code>[^`](?:.*?[^`])??)\k<ticks>(?!`)/, // `code`
    /\*\*(?<strong>\S(?:.*?\S)??)\*\*(?!\*)/, // **strong**
    /(?<![\w*])\*(?<em>[^\s*](?:[^*]*[^\s*])?)\*(?![\w*])/, // *emphasis*
    /(?<!\w)_(?<em2>[^\s_](?:[^_]*[^\s_])?)_(?!\w)/, // _emphasis_
    /~~(?<strike>\S(?:.*?\S)??)~~/, // ~~struck~~
    /\[(?<label>[^\]\n]+)\]\((?<target>[^\s()]+(?:\([^\s()]*\))?[^\s()]*)\)/, // [label](target)
    /(?<url>https?:\/\/[^\s<>"'`)\]]*[^\s<>"'`)\].,;:!?])/, // a bare address
    /\\(?<escaped>[\\`*_{}[\]()#+\-.!~|>])/, // \*
  ]
    .map((form) => form.source)
    .join("|"),
  "gs",
);

/** Return the address if a link may lead there; a relative one would lead into the server. */
function safe(target) {
  try {
    const address = new URL(target);
    return ["http:", "https:", "mailto:"].includes(address.protocol) ? address.href : null;
  } catch {
    return null;
  }
}

function link(label, target) {
  const href = safe(target);
  if (href === null) return null;
  return make("a", { href, target: "_blank", rel: "noopener noreferrer nofollow" }, ...label);
}

function drawInline({ code, strong, em, em2, strike, label, target, url, escaped }, depth) {
  if (code !== undefined) return make("code", {}, code.replace(/^ (.*\S.*) $/s, "$1"));
  if (strong !== undefined) return make("strong", {}, ...inline(strong, depth + 1));
  if (em !== undefined) return make("em", {}, ...inline(em, depth + 1));
  if (em2 !== undefined) return make("em", {}, ...inline(em2, depth + 1));
  if (strike !== undefined) return make("del", {}, ...inline(strike, depth + 1));
  if (label !== undefined) return link(inline(label, MAX_DEPTH), target);
  if (url !== undefined) return link([url], url);
  return escaped;
}

function inline(text, depth = 0) {
  if (depth > MAX_DEPTH) return [text];
  const pieces = [];
  let position = 0;
  for (const match of text.matchAll(INLINE)) {
    pieces.push(text.slice(position, match.index), drawInline(match.groups, depth) ?? match[0]);
    position = match.index + match[0].length;
  }
  pieces.push(text.slice(position));
  return pieces.filter((piece) => piece !== "");
}

/** Make a button that copies a text and says so. */
export function copyButton(text, name) {
  const button = make("button", { type: "button", class: "quiet small", "aria-label": name }, "Copy");
  button.addEventListener("click", async () => {
    let said = "Copied";
    try {
      await navigator.clipboard.writeText(text());
    } catch {
      said = "Not allowed"; // browsers lend the clipboard only to secure pages
    }
    button.textContent = said;
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
  return button;
}

function drawCode({ language, text }) {
  const bar = make("figcaption", {}, make("span", {}, language || "text"), copyButton(() => text, "Copy code"));
  return make("figure", { class: "code" }, bar, make("pre", {}, make("code", {}, text)));
}

function drawTable({ head, rows }) {
  const row = (kind, values) =>
    make("tr", {}, ...head.map((_, index) => make(kind, {}, ...inline(values[index] ?? ""))));
  const body = make("tbody", {}, ...rows.map((values) => row("td", values)));
  return make("div", { class: "table" }, make("table", {}, make("thead", {}, row("th", head)), body));
}

function drawItem(source, depth) {
  const parts = blocks(source);
  // an item of one line needs no paragraph around it
  const [first, ...others] = parts;
  const opening = first?.kind === "text" ? inline(first.text) : first ? [drawBlock(first, depth)] : [];
  return make("li", {}, ...opening, ...others.map((block) => drawBlock(block, depth)));
}

function drawBlock(block, depth = 0) {
  if (depth > MAX_DEPTH) return make("p", {}, block.source);
  switch (block.kind) {
    case "code":
      return drawCode(block);
    case "heading": // the page's own headings come first
      return make(`h${Math.min(block.level + 2, 6)}`, {}, ...inline(block.text));
    case "rule":
      return make("hr");
    case "quote":
      return make("blockquote", {}, ...blocks(block.text).map((inner) => drawBlock(inner, depth + 1)));
    case "list": {
      const start = block.isOrdered && block.first !== 1 ? String(block.first) : null;
      const items = block.items.map((item) => drawItem(item, depth + 1));
      return make(block.isOrdered ? "ol" : "ul", { start }, ...items);
    }
    case "table":
      return drawTable(block);
    default:
      return make("p", {}, ...inline(block.text));
  }
}

/** A growing text: blocks that did not change since the last time keep their elements. */
export class Markdown {
  /** @param {HTMLElement} home emptied and filled */
  constructor(home) {
    this.home = home;
    this.sources = [];
  }

  show(text) {
    const found = blocks(text);
    let same = 0;
    while (same < found.length && found[same].source === this.sources[same]) same += 1;
    while (this.home.childNodes.length > same) this.home.lastChild.remove();
    this.home.append(...found.slice(same).map((block) => drawBlock(block)));
    this.sources = found.map((block) => block.source);
  }
}
