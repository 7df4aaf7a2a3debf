// The conversation: what was said, one answer at a time on its way, and its place on the screen.
import { ApiError, chat } from "./api.js";
import { MessageView } from "./message.js";
import { tabStore } from "./tools.js";

const NEAR_END_PX = 80; // closer than this to the end, the view follows the text

const newStats = () => ({
  sentAt: performance.now(),
  firstAt: null,
  lastAt: null,
  prompt: null,
  cached: 0,
  completion: 0,
  finish: null,
});

/** Tell whether an answer belongs to the conversation that the model is shown. */
const isSaid = (message) => message.role === "user" || message.text !== "";

/**
 * A conversation. Its messages are plain records: role, text, reasoning, problem, stats and state
 * (running, done, stopped or failed).
 */
export class Chat {
  /**
   * @param {HTMLElement} log where messages go
   * @param {HTMLElement} scroller what scrolls them
   * @param {() => object} options fields of the request besides the messages
   * @param {{changed: Function, refused: Function}} listener told of starts, ends and refusals
   */
  constructor(log, scroller, options, listener) {
    this.log = log;
    this.scroller = scroller;
    this.options = options;
    this.listener = listener;
    this.messages = [];
    this.views = [];
    this.abort = null;
    this.frame = null;
    for (const message of tabStore.read("chat", [])) this.add(message);
  }

  get isRunning() {
    return this.abort !== null;
  }

  get isEmpty() {
    return this.messages.length === 0;
  }

  add(message) {
    const view = new MessageView(message, {
      regenerate: () => this.regenerate(message),
      edit: (text) => this.edit(message, text),
    });
    this.messages.push(message);
    this.views.push(view);
    this.log.append(view.element);
    return view;
  }

  cut(length) {
    for (const view of this.views.splice(length)) view.element.remove();
    this.messages.length = length;
  }

  /** Say something and get an answer. */
  send(text) {
    if (this.isRunning) return;
    this.add({ role: "user", text, state: "done" });
    this.scroller.scrollTop = this.scroller.scrollHeight;
    void this.answer();
  }

  regenerate(message) {
    if (this.isRunning) return;
    this.cut(this.messages.indexOf(message));
    void this.answer();
  }

  edit(message, text) {
    if (this.isRunning) return;
    this.cut(this.messages.indexOf(message));
    this.send(text);
  }

  stop() {
    this.abort?.abort();
  }

  clear() {
    this.stop();
    this.cut(0);
    this.keep();
    this.listener.changed();
  }

  /** Return what the model is shown; a question that got no answer is left out with it. */
  conversation() {
    const shown = [];
    for (const message of this.messages) {
      if (isSaid(message)) shown.push({ role: message.role, content: message.text });
      else if (message.state !== "running") shown.pop();
    }
    return shown;
  }

  async answer() {
    const message = { role: "assistant", text: "", reasoning: "", state: "running", stats: newStats() };
    const { messages: opening, ...options } = this.options();
    const body = { ...options, messages: [...opening, ...this.conversation()] };
    const view = this.add(message);
    const abort = new AbortController();
    this.abort = abort;
    this.log.setAttribute("aria-busy", "true");
    this.listener.changed();
    this.follow(view, true);
    try {
      message.stats.sentAt = performance.now();
      for await (const chunk of chat(body, abort.signal)) {
        this.take(message, chunk);
        this.follow(view);
      }
      message.state = "done";
    } catch (error) {
      this.fail(message, error, abort);
    }
    this.abort = null;
    cancelAnimationFrame(this.frame);
    this.frame = null;
    this.draw(view);
    this.log.removeAttribute("aria-busy");
    this.keep();
    this.listener.changed();
  }

  take(message, chunk) {
    const { stats } = message;
    const choice = chunk.choices[0];
    const thought = choice?.delta?.reasoning ?? choice?.delta?.reasoning_content ?? "";
    const text = choice?.delta?.content ?? "";
    if (text || thought || (chunk.usage?.completion_tokens ?? 0) > stats.completion) {
      stats.lastAt = performance.now();
      stats.firstAt ??= stats.lastAt;
    }
    message.text += text;
    message.reasoning += thought;
    stats.finish = choice?.finish_reason ?? stats.finish;
    if (chunk.usage?.prompt_tokens) {
      stats.prompt = chunk.usage.prompt_tokens;
      stats.completion = chunk.usage.completion_tokens;
      stats.cached = chunk.usage.prompt_tokens_details?.cached_tokens ?? 0;
    }
  }

  fail(message, error, abort) {
    if (abort.signal.aborted) {
      message.state = "stopped";
      return;
    }
    message.state = "failed";
    message.problem = error instanceof Error ? error.message : String(error);
    if (!(error instanceof ApiError)) console.error(error);
    this.listener.refused(error);
  }

  /** Draw before the next frame, once, however many tokens come until then. */
  follow(view, mustShow = false) {
    if (mustShow) this.draw(view, true);
    else this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      this.draw(view);
    });
  }

  draw(view, mustFollow = false) {
    const { scroller } = this;
    const isAtEnd = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEAR_END_PX;
    view.show();
    if (isAtEnd || mustFollow) scroller.scrollTop = scroller.scrollHeight;
  }

  keep() {
    tabStore.write("chat", this.messages.filter((message) => message.state !== "running"));
  }
}
