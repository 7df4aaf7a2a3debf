// The sampling controls: what they hold, kept in the browser, and what becomes of it in a request.
import { browserStore } from "./tools.js";

const NUMBERS = ["temperature", "top_p", "top_k", "max_tokens", "seed"];

/** The form of the sampling controls. */
export class Settings {
  /**
   * @param {HTMLFormElement} form
   * @param {HTMLElement} note says what is wrong with a value
   */
  constructor(form, note) {
    this.form = form;
    this.note = note;
    this.usual = note.textContent;
    this.restore();
    form.addEventListener("input", () => this.changed());
    form.addEventListener("submit", (event) => event.preventDefault());
    // a reset happens after its event
    form.addEventListener("reset", () => setTimeout(() => this.changed()));
    this.changed();
  }

  restore() {
    const kept = browserStore.read("settings", {});
    for (const name of ["system", ...NUMBERS]) {
      if (typeof kept[name] === "string") this.form.elements[name].value = kept[name];
    }
  }

  changed() {
    const values = {};
    for (const name of ["system", ...NUMBERS]) values[name] = this.form.elements[name].value;
    browserStore.write("settings", values);
    this.check();
  }

  /** Return the first field whose value cannot be used; null if there is none. */
  check() {
    let wrong = null;
    for (const name of NUMBERS) {
      const field = this.form.elements[name];
      field.setAttribute("aria-invalid", String(!field.validity.valid));
      if (!field.validity.valid) wrong ??= field;
    }
    this.note.classList.toggle("problem", wrong !== null);
    this.note.textContent = wrong ? `${wrong.labels[0].textContent}: ${wrong.validationMessage}` : this.usual;
    return wrong;
  }

  /** Return the request's fields; `messages` holds what comes before the conversation. */
  options() {
    const options = { messages: [] };
    const system = this.form.elements.system.value;
    if (system.trim()) options.messages.push({ role: "system", content: system });
    for (const name of NUMBERS) {
      const value = this.form.elements[name].valueAsNumber;
      if (!Number.isNaN(value)) options[name] = value;
    }
    return options;
  }
}
