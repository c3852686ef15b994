// The chat page: connects the list, the messages, the composer and the parameters.

import { api, follow } from "./api.js";
import { chatActions, loadList, markCurrent, setRunning, startList } from "./chatlist.js";
import { $, el, fillIcons, openDialog, openMenu, store, stored, toast } from "./dom.js";
import { edit, growMessage, plainText, setActions, showMessages } from "./messages.js";
import { loadModel, params, setParam, setParams, setSystem, startParams, systemPrompt, thinkingMode, useModel } from "./params.js";
import { showQuestions, showTokens } from "./tokens.js";

const touch = matchMedia("(pointer: coarse)").matches;
const narrow = matchMedia("(max-width: 860px)");
let models = [];
let modelReady = Promise.resolve(); // settles once the parameters of the chosen model are known
let chat = null; // the conversation that is shown; null = a new one
let number = null; // its id
let watching = null; // aborts the stream of its events
let sending = false;
let drafts = {};

const failed = (error) => toast(error.message, { error: true });

// ---- conversations

function openChat(id, { keepFocus = false } = {}) {
  const path = id === null ? "#/" : `#/c/${id}`;
  if (location.hash !== path) history.pushState(null, "", path);
  show(id, keepFocus);
}

function show(id, keepFocus = false) {
  if (id === number && id !== null && watching) return;
  drafts[number ?? 0] = $("question").value;
  watching?.abort();
  watching = null;
  number = id;
  chat = null;
  markCurrent(id);
  setQuestion(drafts[id ?? 0] ?? "");
  if (id === null) {
    setSystem("");
    render({ id: null, title: "", pinned: false, system: "", running: null, used: 0, context: null, messages: [] });
  } else {
    $("messages").setAttribute("aria-busy", "true");
    watch(id);
  }
  if (narrow.matches) closeSidebar();
  if (!keepFocus && !touch) $("question").focus();
}

function watch(id) {
  const control = new AbortController();
  watching = control;
  let first = true;
  follow(`/chats/${id}/events`, (name, data) => {
    if (control.signal.aborted) return;
    if (name === "chat") {
      if (first) useChat(data);
      first = false;
      render(data);
    } else if (name === "answer") {
      grow(data);
    } else {
      control.abort();
      toast(data.detail, { error: true });
      openChat(null);
      loadList();
    }
  }, control.signal);
}

// Takes the model and parameters of a conversation that was opened.
async function useChat(data) {
  setSystem(data.system);
  const used = models.find((each) => each.bundle === data.model);
  if (!used) return;
  try {
    await modelReady;
    if (models.find((each) => each.name === $("model").value)?.bundle !== data.model) await chooseModel(used.name);
    if (number === data.id) setParams({ logprobs: params().logprobs, ...data.params });
  } catch (error) {
    failed(error);
  }
}

function render(data) {
  const before = chat;
  const end = atEnd() || before === null || before.id !== data.id;
  chat = data;
  $("messages").removeAttribute("aria-busy");
  showMessages(data);
  $("empty").hidden = data.messages.length > 0;
  $("title").textContent = data.title;
  document.title = data.title ? `${data.title} · llm-edge` : "llm-edge";
  $("chat-menu").hidden = data.id === null;
  setSystemIfOther(before, data);
  const running = data.running !== null;
  $("send").hidden = running;
  $("stop").hidden = !running;
  setRunning(data.id, running);
  showUsed(data.used, data.context);
  if (!running) $("rate").textContent = "";
  if (before?.id === data.id && before.running !== null && !running) announceEnd(before.running);
  if (before?.id !== data.id || (before?.running !== null) !== running || before.title !== data.title) loadList();
  if (end) scrollToEnd();
}

function setSystemIfOther(before, data) {
  if (before !== null && before.id === data.id && before.system !== data.system) setSystem(data.system);
}

function grow(change) {
  const end = atEnd();
  growMessage(change);
  if (change.rate) $("rate").textContent = `${change.rate.toFixed(1)} tok/s`;
  showUsed(change.used, chat?.context);
  if (end) scrollToEnd();
}

function announceEnd(message) {
  const text = plainText(message);
  $("announcer").textContent = text ? `Answer: ${text.slice(0, 2000)}` : "The answer has ended.";
}

function showUsed(used, context) {
  const limit = context ?? models.find((each) => each.name === $("model").value)?.context ?? 0;
  $("gauge").max = limit || 1;
  $("gauge").value = Math.min(used, limit);
  $("gauge").classList.toggle("high", limit > 0 && used > 0.85 * limit);
  $("used").textContent = limit ? `${used.toLocaleString()} of ${limit.toLocaleString()} tokens` : "";
}

// ---- scrolling

const atEnd = () => $("scroll").scrollHeight - $("scroll").scrollTop - $("scroll").clientHeight < 80;

function scrollToEnd() {
  $("scroll").scrollTop = $("scroll").scrollHeight;
  $("to-end").hidden = true;
}

// ---- asking

const options = () => ({ model: $("model").value, params: params(), thinking: thinkingMode() });

// Sends a request that starts an answer; returns whether it did.
async function start(path, body) {
  if (sending) return false;
  sending = true;
  $("composer").classList.add("sending");
  const state = models.find((each) => each.name === $("model").value)?.state;
  if (state === "idle") pollModels(1000);
  $("announcer").textContent = "Answering";
  try {
    const begun = await api(path, { method: "POST", body: { ...options(), ...body } });
    if (begun.chat !== number) openChat(begun.chat, { keepFocus: true });
    return true;
  } catch (error) {
    failed(error);
    return false;
  } finally {
    sending = false;
    $("composer").classList.remove("sending");
    pollModels();
  }
}

async function ask(text) {
  if (!text.trim() || sending || (chat && chat.running !== null)) return;
  const at = number;
  setQuestion("");
  scrollToEnd();
  if (!(await start("/ask", { chat: at, text, system: at === null ? systemPrompt() : undefined }))) {
    if (number === at && !$("question").value) setQuestion(text);
  } else {
    delete drafts[at ?? 0];
    if (at !== null) scrollToEnd();
  }
}

async function stop() {
  if (chat?.running) await api(`/chats/${chat.id}/stop`, { method: "POST" }).catch(failed);
  if (!touch) $("question").focus();
}

function setQuestion(text) {
  $("question").value = text;
  fitQuestion();
}

function fitQuestion() {
  const field = $("question");
  field.style.height = "auto";
  field.style.height = `${Math.min(field.scrollHeight, innerHeight * 0.4)}px`;
  $("send").disabled = !field.value.trim();
}

function startComposer() {
  const field = $("question");
  field.addEventListener("input", fitQuestion);
  if (touch) $("send").title = "Send";
  else field.setAttribute("enterkeyhint", "send");
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing && !touch) {
      event.preventDefault();
      ask(field.value);
    } else if (event.key === "ArrowUp" && !field.value && chat?.running === null) {
      const question = chat.messages.findLast((message) => message.role === "user");
      if (question) {
        event.preventDefault();
        edit(question);
      }
    }
  });
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    ask(field.value);
  });
  $("stop").addEventListener("click", stop);
  $("scroll").addEventListener("scroll", () => ($("to-end").hidden = atEnd()), { passive: true });
  $("to-end").addEventListener("click", scrollToEnd);
}

setActions({
  regenerate: (message) => start(`/chats/${number}/regenerate`, { message }),
  continue: (message) => start(`/chats/${number}/continue`, { message }),
  edit: (message, text) => start(`/chats/${number}/edit`, { message, text }),
  select: (message) => api(`/chats/${number}/select`, { method: "POST", body: { message } }).catch(failed),
  tokens: (message) => showTokens(number, message, () => {
    setParam("logprobs", 5);
    loadModel().catch(failed);
    start(`/chats/${number}/regenerate`, { message: message.id });
  }),
});

// ---- models

let modelTimer = 0;

// Looks at the models again, soon while one is being loaded.
async function pollModels(soon = 0) {
  clearTimeout(modelTimer);
  let next = 15_000;
  try {
    if (!document.hidden && !soon) {
      const found = await api("/models");
      models = found.models;
      drawModels(found.default);
      if (!found.ready || models.some((each) => each.state === "loading")) next = 1000;
    }
  } catch {
    next = 3000; // the banner says so
  }
  modelTimer = setTimeout(() => pollModels(), soon || next);
}

function drawModels(preferred) {
  const select = $("model");
  const known = [...select.options].map((option) => option.value).join("\n");
  if (known !== models.map((each) => each.name).join("\n")) {
    const chosen = select.value || stored("model", "");
    select.replaceChildren(...models.map((each) => el("option", { value: each.name })));
    select.value = models.some((each) => each.name === chosen) ? chosen : preferred;
    if (!models.length) select.append(el("option", { value: "" }, "No model yet"));
    if (select.value) modelReady = useModel(select.value).catch(failed);
  }
  models.forEach((each, place) => {
    const several = models.filter((other) => other.folder === each.folder).length > 1;
    const text = several ? `${each.folder} · ${each.precision}` : each.folder;
    const chosen = each.name === select.value; // its state is next to it
    select.options[place].textContent = each.state === "idle" || chosen ? text : `${text} (${each.state})`;
  });
  const state = models.find((each) => each.name === select.value)?.state ?? "idle";
  if ($("model-state").dataset.state !== state) {
    const loading = $("model-state").dataset.state === "loading" || !$("model-state").dataset.state;
    $("model-state").dataset.state = state;
    $("model-text").textContent = state === "loading" ? "Loading…" : "";
    $("model").title = { idle: "Loaded when you ask something", loading: "Loading…", loaded: "Loaded" }[state];
    if (state === "loaded" && loading) loadModel().catch(failed);
  }
  if (!models.length) $("model-text").textContent = "Create a model with llm-export.";
}

async function chooseModel(name) {
  $("model").value = name;
  store("model", name);
  await useModel(name);
  drawModels(name);
  if (chat) showUsed(chat.used, null);
  if (models.find((each) => each.name === name)?.state === "idle") {
    pollModels(300);
    api(`/models/load?model=${encodeURIComponent(name)}`, { method: "POST" }).then(() => pollModels(), failed);
  }
}

// ---- panels, keys

function closeSidebar() {
  document.body.classList.remove("sidebar-open");
  $("open-sidebar").setAttribute("aria-expanded", "false");
  $("shade").hidden = $("panel").hidden || !narrow.matches;
}

function toggleSidebar() {
  if (narrow.matches) {
    closePanel();
    document.body.classList.add("sidebar-open");
    $("shade").hidden = false;
    $("open-sidebar").setAttribute("aria-expanded", "true");
    $("new-chat").focus();
  } else {
    document.body.classList.toggle("sidebar-hidden");
  }
}

function closePanel() {
  $("panel").hidden = true;
  $("open-panel").setAttribute("aria-expanded", "false");
  $("shade").hidden = !document.body.classList.contains("sidebar-open");
}

function togglePanel() {
  if (!$("panel").hidden) {
    closePanel();
    $("open-panel").focus();
    return;
  }
  closeSidebar();
  $("panel").hidden = false;
  $("shade").hidden = !narrow.matches;
  $("open-panel").setAttribute("aria-expanded", "true");
  $("panel-body").querySelector("select")?.focus();
}

function escape() {
  if (narrow.matches && document.body.classList.contains("sidebar-open")) {
    closeSidebar();
    $("open-sidebar").focus();
  } else if (chat?.running != null) {
    stop();
  } else if (!$("panel").hidden) {
    togglePanel();
  }
}

function switchTheme() {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const root = document.documentElement;
  const now = root.dataset.theme ?? (dark ? "dark" : "light");
  root.dataset.theme = now === "dark" ? "light" : "dark";
  try {
    localStorage.setItem("llm-edge.theme", root.dataset.theme);
  } catch {
    // kept until the page is closed
  }
}

const KEYS = [
  ["Enter", "Send"],
  ["Shift + Enter", "New line"],
  ["Esc", "Stop the answer, or close a panel"],
  ["↑ in an empty box", "Edit your last message"],
  ["/", "Go to the message box"],
  ["Ctrl + K", "Search conversations"],
  ["Ctrl + Shift + O", "New chat"],
  ["Ctrl + .", "Parameters"],
  ["Ctrl + Enter", "Save an edited message"],
  ["?", "This list"],
];

function showKeys() {
  const rows = KEYS.map(([keys, text]) => el("tr", {}, el("th", { scope: "row" }, el("kbd", {}, keys)), el("td", {}, text)));
  openDialog("Keyboard shortcuts", [el("table", { class: "keys" }, el("tbody", {}, ...rows))]);
}

function onKey(event) {
  if (document.querySelector("dialog[open], [popover]:popover-open")) return;
  const typing = event.target.closest?.("input, textarea, select");
  const control = event.ctrlKey || event.metaKey;
  if (event.key === "Escape") {
    escape();
  } else if (control && event.key.toLowerCase() === "k") {
    event.preventDefault();
    if (narrow.matches) toggleSidebar();
    else document.body.classList.remove("sidebar-hidden");
    $("search").focus();
  } else if (control && event.shiftKey && event.key.toLowerCase() === "o") {
    event.preventDefault();
    openChat(null);
  } else if (control && event.key === ".") {
    event.preventDefault();
    togglePanel();
  } else if (!typing && !control && event.key === "?") {
    showKeys();
  } else if (!typing && !control && event.key === "/") {
    event.preventDefault();
    $("question").focus();
  }
}

function startPanels() {
  $("open-sidebar").addEventListener("click", toggleSidebar);
  $("close-sidebar").addEventListener("click", () => {
    closeSidebar();
    $("open-sidebar").focus();
  });
  $("open-panel").addEventListener("click", togglePanel);
  $("close-panel").addEventListener("click", togglePanel);
  $("shade").addEventListener("click", () => {
    closeSidebar();
    closePanel();
  });
  $("new-chat").addEventListener("click", () => openChat(null));
  $("theme").addEventListener("click", switchTheme);
  $("help").addEventListener("click", showKeys);
  $("chat-menu").addEventListener("click", () => openMenu($("chat-menu"), chatActions(chat)));
  $("model").addEventListener("change", () => chooseModel($("model").value).catch(failed));
  document.addEventListener("keydown", onKey);
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) return;
    pollModels();
    loadList();
  });
}

// ---- start

const wanted = () => Number(/^#\/c\/(\d+)$/.exec(location.hash)?.[1]) || null;

async function begin() {
  const state = await api("/state");
  models = state.models;
  startParams(
    state.parameters,
    () => {
      if (chat?.running != null) api(`/chats/${chat.id}/params`, { method: "PATCH", body: { params: params() } }).catch(failed);
    },
    () => {
      if (number !== null) api(`/chats/${number}`, { method: "PATCH", body: { system: systemPrompt() } }).catch(failed);
    },
  );
  const questions = (now) => showQuestions(now, ask, questions);
  questions(state.questions);
  drawModels(state.default);
  if (state.note) toast(state.note, { error: true });
  await loadList();
  const prefilled = new URLSearchParams(location.search).get("q"); // shown, never sent by itself
  number = undefined;
  show(wanted());
  if (prefilled && number === null) setQuestion(prefilled.slice(0, 20_000));
  pollModels(state.ready ? 15_000 : 500);
}

async function startPage() {
  fillIcons();
  startPanels();
  startComposer();
  startList((id) => openChat(id));
  $("panel").hidden = narrow.matches || innerWidth < 1200 || !stored("panel", true);
  $("open-panel").setAttribute("aria-expanded", String(!$("panel").hidden));
  addEventListener("popstate", () => show(wanted()));
  for (;;) {
    try {
      await begin();
      return;
    } catch (error) {
      if (error.status) {
        failed(error);
        return;
      }
      await new Promise((resolve) => setTimeout(resolve, 2000));
    }
  }
}

startPage();
