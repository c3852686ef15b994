// The chat page: connects the list, the messages, the composer and the parameters.

import { startAdding } from "./addmodel.js";
import { api, follow } from "./api.js";
import { chatActions, loadList, markCurrent, setRunning, startList } from "./chatlist.js";
import { $, el, fillIcons, store, stored, toast } from "./dom.js";
import { edit, growMessage, plainText, removePending, setActions, showMessages, showPending } from "./messages.js";
import { loadModel, params, setParam, setParams, setSystem, startParams, systemPrompt, thinkingMode, useModel } from "./params.js";
import { closeDrawer, startPanels } from "./panels.js";
import { showQuestions, showTokens } from "./tokens.js";

const touch = matchMedia("(pointer: coarse)").matches;
let models = [];
let modelReady = Promise.resolve(); // settles once the parameters of the chosen model are known
let chat = null; // the conversation that is shown; null = a new one
let number = null; // its id
let watching = null; // aborts the stream of its events
let sending = false;
let drafts = {}; // unsent questions, by the conversation's id; 0 = a new one

const failed = (error) => toast(error.message, { error: true });

// ---- conversations

function openChat(id, { keepFocus = false } = {}) {
  const path = id === null ? "#/" : `#/c/${id}`;
  if (location.hash !== path) history.pushState(null, "", path);
  show(id, keepFocus);
}

function show(id, keepFocus = false, leaving = true) {
  if (id === number && id !== null && watching) return;
  if (leaving) drafts[number ?? 0] = $("question").value;
  watching?.abort();
  watching = null;
  number = id;
  chat = null;
  markCurrent(id);
  setQuestion(drafts[id ?? 0] ?? "");
  if (id === null) {
    if (leaving) setSystem("");
    render({ id: null, title: "", pinned: false, system: "", running: null, used: 0, context: null, messages: [] });
  } else {
    $("messages").setAttribute("aria-busy", "true");
    watch(id);
  }
  closeDrawer();
  if (!keepFocus && !touch) $("question").focus();
}

// Follows a conversation. `again`: it is on the page already, with parameters that may have been changed since.
function watch(id, again = false) {
  const control = new AbortController();
  watching = control;
  let first = !again;
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
  $("title").textContent = data.title || "New chat";
  document.title = data.title ? `${data.title} · llm-edge` : "llm-edge";
  $("chat-menu").hidden = data.id === null;
  setSystemIfOther(before, data);
  const running = data.running !== null;
  if (!running && document.activeElement === $("stop") && !touch) $("question").focus();
  $("send").hidden = running;
  $("stop").hidden = !running;
  setRunning(data.id, running);
  showUsed(data.used, data.context);
  if (!running) $("rate").textContent = "";
  if (before?.id === data.id && before.running !== null && !running) announceEnd(before.running);
  if (before?.id !== data.id || (before?.running !== null) !== running || before.title !== data.title) loadList();
  if (!data.messages.length) $("scroll").scrollTop = 0;
  else if (end) scrollToEnd();
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
    else if (document.activeElement === document.body && !$("stop").hidden) $("stop").focus();
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
  if (!text.trim() || sending) return;
  if (chat && chat.running !== null) {
    toast("The model is still answering. Press Esc to stop it.");
    return;
  }
  const at = number;
  setQuestion("");
  showPending(text); // a model may have to be loaded first
  $("empty").hidden = true;
  scrollToEnd();
  if (!(await start("/ask", { chat: at, text, system: at === null ? systemPrompt() : undefined }))) {
    removePending();
    if (number !== at) return;
    $("empty").hidden = Boolean(chat?.messages.length);
    if (!$("question").value) setQuestion(text);
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

function keepDrafts() {
  drafts[number ?? 0] = $("question").value;
  try {
    sessionStorage.setItem("llm-edge.drafts", JSON.stringify(drafts));
  } catch {
    // kept until the page is reloaded
  }
}

function restoreDrafts() {
  try {
    drafts = JSON.parse(sessionStorage.getItem("llm-edge.drafts")) ?? {};
  } catch {
    drafts = {};
  }
}

function startComposer() {
  const field = $("question");
  restoreDrafts();
  addEventListener("pagehide", keepDrafts);
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
  if (!select.options.length || known !== models.map((each) => each.name).join("\n")) {
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
    $("model-state").dataset.state = state;
    $("model-text").textContent = state === "loading" ? "Loading…" : "";
    $("model").title = { idle: "Loaded when you ask something", loading: "Loading…", loaded: "Loaded" }[state];
    if (state === "loaded") loadModel().catch(failed); // its defaults are known now
  }
  if (!models.length) $("model-text").textContent = "Create one with llm-export.";
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
  if ($("question").value) drafts[wanted() ?? 0] = $("question").value; // typed before the server answered
  number = undefined;
  show(wanted(), document.activeElement !== document.body, false); // a field may be in use already
  if (prefilled && number === null) setQuestion(prefilled.slice(0, 20_000));
  pollModels(state.ready ? 15_000 : 500);
  if (state.adds_models) startAdding(useAdded);
}

async function useAdded(folder) {
  try {
    const found = await api("/models");
    models = found.models;
    drawModels(found.default);
    const added = models.find((each) => each.folder === folder);
    if (added) await chooseModel(added.name);
  } catch (error) {
    failed(error);
  }
}

async function startPage() {
  fillIcons();
  startPanels({ openChat, stop, running: () => chat?.running != null, menu: () => chatActions(chat) });
  $("model").addEventListener("change", () => chooseModel($("model").value).catch(failed));
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) {
      // A browser allows six connections to a server: tabs in the background leave theirs to others.
      if (chat?.running === null) watching?.abort();
      return;
    }
    if (number && chat && watching?.signal.aborted) watch(number, true);
    pollModels();
    loadList();
  });
  startComposer();
  startList((id) => openChat(id));
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
