// Puts the page together: chat, settings, live view, key, and the keyboard.
import { key, models } from "./api.js";
import { Chat } from "./chat.js";
import { LiveView } from "./live.js";
import { isSend } from "./message.js";
import { Settings } from "./settings.js";
import { browserStore, byId, make, number } from "./tools.js";

const STATUS = {
  ready: "ready",
  loading: "loading the model",
  paused: "paused",
  sleeping: "asleep",
  stopping: "stopping",
  dead: "the engine has stopped",
  gone: "not reachable",
};

const composer = byId("composer");
const prompt = byId("prompt");
const go = byId("go");
const model = byId("model");
const settings = new Settings(byId("settings"), byId("settings-note"));
const seen = { status: null, needsKey: false, isAsking: false };

const chat = new Chat(
  byId("log"),
  byId("scroll"),
  () => ({ ...settings.options(), ...(model.value ? { model: model.value } : {}) }),
  {
    changed: showRunning,
    refused: (error) => {
      if (error.status === 401) askForKey(true);
    },
  },
);

function showRunning() {
  go.dataset.state = chat.isRunning ? "running" : "idle";
  go.setAttribute("aria-label", chat.isRunning ? "Stop" : "Send");
  go.title = chat.isRunning ? "Stop (Esc)" : "Send (Enter)";
  byId("empty").hidden = !chat.isEmpty;
  byId("clear").disabled = chat.isEmpty;
  document.body.classList.toggle("running", chat.isRunning);
}

function fit() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight + 2}px`;
}

function send(text) {
  const wrong = settings.check();
  if (wrong) {
    showPanel(true);
    wrong.focus();
    return;
  }
  if (seen.needsKey && !key.get()) {
    askForKey(true);
    return;
  }
  if (!text || chat.isRunning) return;
  showPanel(byId("panel-toggle").getAttribute("aria-expanded") === "true" && !isNarrow());
  prompt.value = "";
  fit();
  prompt.focus();
  chat.send(text);
}

composer.addEventListener("submit", (event) => {
  event.preventDefault();
  send(prompt.value.trim());
});
go.addEventListener("click", (event) => {
  if (!chat.isRunning) return;
  event.preventDefault();
  // the second half of a double click on Send is not meant to stop what the first half began
  if (event.detail < 2) chat.stop();
});
prompt.addEventListener("input", fit);
prompt.addEventListener("keydown", (event) => {
  if (!isSend(event)) return;
  event.preventDefault();
  send(prompt.value.trim());
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.isComposing) return;
  if (chat.isRunning) chat.stop();
  else if (isNarrow()) showPanel(false);
});
for (const starter of document.querySelectorAll(".starter")) {
  starter.addEventListener("click", () => send(starter.textContent));
}
byId("clear").addEventListener("click", () => {
  chat.clear();
  prompt.focus();
});

// The panel: beside the chat where there is room, otherwise in its place.

const narrow = window.matchMedia("(max-width: 859px)");
const isNarrow = () => narrow.matches;

function showPanel(isShown) {
  byId("panel-toggle").setAttribute("aria-expanded", String(isShown));
  document.body.dataset.panel = isShown ? "shown" : "hidden";
}

byId("panel-toggle").addEventListener("click", () => {
  const isShown = byId("panel-toggle").getAttribute("aria-expanded") !== "true";
  showPanel(isShown);
  if (!isNarrow()) browserStore.write("panel", isShown);
});
const placePanel = () => showPanel(!isNarrow() && browserStore.read("panel", true));
narrow.addEventListener("change", placePanel);

// The key.

function askForKey(mustFocus) {
  byId("key-form").hidden = false;
  if (mustFocus) byId("key").focus();
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set(byId("key").value.trim());
  void listModels(true);
});

async function listModels(isNewKey = false) {
  if (seen.isAsking) return;
  seen.isAsking = true;
  try {
    const cards = await models();
    const chosen = model.value;
    model.replaceChildren(...cards.map(({ id }) => make("option", { value: id }, id)));
    if (cards.some(({ id }) => id === chosen)) model.value = chosen;
    model.disabled = cards.length < 2;
    model.title = cards[0]?.max_model_len ? `Context of ${number(cards[0].max_model_len)} tokens` : "";
    byId("key-form").hidden = true;
    byId("key-note").classList.remove("problem");
    if (isNewKey) prompt.focus();
  } catch (error) {
    if (error.status === 401) {
      askForKey(isNewKey);
      if (key.get()) {
        byId("key-note").textContent = "The server does not know this key.";
        byId("key-note").classList.add("problem");
      }
    }
  } finally {
    seen.isAsking = false;
  }
}

// What the live view hears concerns the rest of the page, too.

function heard(now, one) {
  const status = now?.status ?? "gone";
  byId("status").dataset.status = status;
  if (status !== seen.status) byId("status").textContent = STATUS[status];
  byId("busy").textContent = one?.running ? `${number(one.running)} running · ${number(one.generation)} tok/s` : "";
  go.disabled = status === "loading";
  if (now) {
    seen.needsKey = now.needs_key;
    byId("version").textContent = `jaxserve ${now.version}`;
    document.title = `${now.model} · jaxserve`;
    if (!model.options.length) model.append(make("option", { value: now.model }, now.model));
  }
  if (status === "ready" && seen.status !== "ready") void listModels();
  seen.status = status;
}

placePanel();
showRunning();
fit();
document.body.dataset.ready = "true";
new LiveView(byId("tiles"), heard);
