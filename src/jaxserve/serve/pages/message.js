// One message on the screen: its text, what it cost, and what can be done with it.
import { Markdown, copyButton } from "./markdown.js";
import { duration, make, number } from "./tools.js";

const ENDINGS = {
  length: "cut off at the limit",
  abort: "ended by the server",
  content_filter: "withheld",
};

/** Return the speed of decoding in tokens per second; null before the second token. */
export function speed(stats) {
  const seconds = (stats.lastAt - stats.firstAt) / 1000;
  return stats.completion > 1 && seconds > 0 ? (stats.completion - 1) / seconds : null;
}

function fact(text, title) {
  return make("span", { title }, text);
}

function facts(message) {
  const { stats, state } = message;
  const found = [];
  if (!stats) return found;
  if (stats.firstAt !== null) {
    found.push(fact(`TTFT ${duration(stats.firstAt - stats.sentAt)}`, "From sending to the first token, as this browser saw it"));
  }
  const rate = speed(stats);
  if (rate !== null) found.push(fact(`${number(rate)} tok/s`, "Tokens per second after the first one"));
  if (stats.prompt !== null) {
    const cached = stats.cached ? `, ${stats.cached} of them from the prefix cache` : "";
    const total = `${stats.prompt} tokens of prompt${cached}; ${stats.completion} generated`;
    found.push(fact(`${number(stats.prompt)} + ${number(stats.completion)} tokens`, total));
  }
  if (state === "stopped") found.push(fact("stopped", "You stopped it"));
  else if (stats.finish in ENDINGS) found.push(fact(ENDINGS[stats.finish], `finish_reason: ${stats.finish}`));
  return found;
}

function button(name, label, action) {
  const made = make("button", { type: "button", class: "quiet small", "aria-label": label }, name);
  made.addEventListener("click", action);
  return made;
}

/** The view of one message. */
export class MessageView {
  /**
   * @param {object} message see Chat
   * @param {{regenerate: Function, edit: Function}} actions
   */
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    const isUser = message.role === "user";
    this.body = make("div", { class: "body" });
    this.facts = make("p", { class: "facts" });
    this.buttons = make("div", { class: "buttons" });
    const foot = make("footer", {}, this.facts, this.buttons);
    const name = isUser ? "You" : "Model";
    this.element = make("article", { class: `message ${message.role}`, "aria-label": name }, this.body, foot);
    if (isUser) this.makeUser();
    else this.makeModel();
    this.show();
  }

  makeUser() {
    this.text = make("p", { class: "said" });
    this.body.append(this.text);
    this.buttons.append(button("Edit", "Edit this message", () => this.startEdit()));
  }

  makeModel() {
    this.thoughts = make("div", { class: "thoughts" });
    this.thinking = make("details", { hidden: true }, make("summary", {}, "Thinking"), this.thoughts);
    this.answer = make("div", { class: "text" });
    this.problem = make("p", { class: "problem", role: "alert", hidden: true });
    this.waiting = make("p", { class: "waiting", hidden: true }, make("span", { class: "sr" }, "Waiting for the first token"));
    this.body.append(this.thinking, this.waiting, this.answer, this.problem);
    this.markdown = new Markdown(this.answer);
    this.buttons.append(
      copyButton(() => this.message.text, "Copy the answer"),
      button("Regenerate", "Regenerate this answer", this.actions.regenerate),
    );
  }

  /** Draw the message as it is now. */
  show() {
    const { message } = this;
    this.element.dataset.state = message.state;
    if (message.role === "user") {
      this.text.textContent = message.text;
      return;
    }
    this.markdown.show(message.text);
    this.thoughts.textContent = message.reasoning;
    this.thinking.hidden = !message.reasoning;
    this.waiting.hidden = message.state !== "running" || Boolean(message.text || message.reasoning);
    this.problem.hidden = message.state !== "failed";
    if (this.problem.textContent !== (message.problem ?? "")) this.problem.textContent = message.problem ?? "";
    this.facts.replaceChildren(...facts(message));
    this.buttons.hidden = message.state === "running";
  }

  startEdit() {
    const { message } = this;
    const field = make("textarea", { "aria-label": "Edited message", rows: "3" });
    field.value = message.text;
    const send = make("button", { type: "submit" }, "Send");
    const form = make("form", { class: "edit" }, field, make("div", { class: "buttons" }, button("Cancel", "Cancel the edit", () => this.endEdit()), send));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      const text = field.value.trim();
      if (text) this.actions.edit(text);
    });
    form.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        this.endEdit();
      } else if (event.target === field && isSend(event)) {
        event.preventDefault();
        form.requestSubmit();
      }
    });
    this.element.classList.add("editing");
    this.body.replaceChildren(form);
    this.buttons.hidden = true;
    field.focus();
    field.setSelectionRange(field.value.length, field.value.length);
  }

  endEdit() {
    this.element.classList.remove("editing");
    this.body.replaceChildren(this.text);
    this.buttons.hidden = false;
    this.buttons.querySelector("button").focus();
  }
}

/** Tell whether a key press means "send": Enter, but not a new line nor the end of a composition. */
export function isSend(event) {
  return event.key === "Enter" && !event.shiftKey && !event.isComposing;
}
