// The list of conversations.

import { api, download } from "./api.js";
import { $, askText, debounced, el, iconButton, openMenu, toast } from "./dom.js";

let open = () => {};
let current = null;
let chats = [];
let more = false;
let loaded = 0;
let timer = 0; // runs while other conversations are being answered

export function startList(openChat) {
  open = openChat;
  $("search").addEventListener("input", debounced(() => loadList(), 200));
  $("import").addEventListener("click", () => openMenu($("import"), [
    ["Import conversations…", () => $("import-file").click(), "import"],
    ["Export all conversations", () => download("/export").catch((error) => toast(error.message, { error: true })), "import"],
  ]));
  $("import-file").addEventListener("change", importFile);
  $("chats").addEventListener("keydown", moveFocus);
}

export function markCurrent(number) {
  current = number;
  for (const link of $("chats").querySelectorAll(".chat-link")) {
    if (Number(link.dataset.id) === number) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
}

export function setRunning(number, running) {
  $("chats").querySelector(`.chat-link[data-id="${number}"]`)?.classList.toggle("busy", running);
}

export async function loadList(append = false) {
  const search = $("search").value.trim();
  const offset = append ? loaded : 0;
  try {
    const found = await api(`/chats?search=${encodeURIComponent(search)}&offset=${offset}`);
    if (search !== $("search").value.trim()) return;
    chats = append ? [...chats, ...found.chats] : found.chats;
    more = found.more;
    loaded = chats.length;
    draw(search);
  } catch (error) {
    if (!chats.length) $("chats").replaceChildren(el("p", { class: "muted pad" }, error.message));
  }
}

function draw(search) {
  const focused = $("chats").contains(document.activeElement) ? document.activeElement.dataset.id : null;
  const parts = [];
  for (const [name, members] of grouped(search)) {
    if (name) parts.push(el("h2", { class: "group" }, name));
    parts.push(el("ul", {}, ...members.map(item)));
  }
  if (!chats.length) parts.push(el("p", { class: "muted pad" }, search ? "No conversation contains these words." : "No conversations yet. What you ask here or in llm-chat is listed."));
  if (more) parts.push(el("button", { type: "button", class: "wide plain", onclick: () => loadList(true) }, "Show older conversations"));
  $("chats").replaceChildren(...parts);
  if (focused) $("chats").querySelector(`[data-id="${focused}"]`)?.focus();
  clearTimeout(timer);
  if (chats.some((chat) => chat.running && chat.id !== current)) timer = setTimeout(() => loadList(), 3000);
}

function grouped(search) {
  const groups = new Map();
  for (const chat of chats) {
    const name = groupOf(chat, search);
    groups.set(name, [...(groups.get(name) ?? []), chat]);
  }
  return groups;
}

function groupOf(chat, search) {
  if (search) return "";
  if (chat.pinned) return "Pinned";
  const midnight = new Date().setHours(0, 0, 0, 0);
  const days = (midnight - chat.updated * 1000) / 86_400_000;
  return days <= 0 ? "Today" : days <= 1 ? "Yesterday" : days <= 7 ? "This week" : days <= 30 ? "This month" : "Older";
}

function item(chat) {
  const title = chat.title || "Untitled";
  const link = el(
    "a",
    { class: chat.running ? "chat-link busy" : "chat-link", href: `#/c/${chat.id}`, "data-id": chat.id, "aria-current": chat.id === current ? "page" : null },
    el("span", { class: "chat-title" }, title),
    chat.snippet ? el("span", { class: "snippet" }, chat.snippet) : null,
  );
  const button = iconButton("more", `Actions for ${title}`, () => openMenu(button, chatActions(chat)), { "aria-haspopup": "menu" });
  return el("li", {}, link, button);
}

// The entries of the menu of a conversation.
export function chatActions(chat) {
  const attempt = (work) => async () => {
    try {
      await work();
    } catch (error) {
      toast(error.message, { error: true });
    }
  };
  const change = async (body) => {
    await api(`/chats/${chat.id}`, { method: "PATCH", body });
    await loadList();
  };
  return [
    ["Rename…", attempt(async () => {
      const title = await askText("Rename conversation", "Title", chat.title);
      if (title !== null && title.trim()) await change({ title: title.trim() });
    }), "edit"],
    [chat.pinned ? "Unpin" : "Pin", attempt(() => change({ pinned: !chat.pinned })), "pin"],
    ["Export as Markdown", attempt(() => download(`/chats/${chat.id}/export?format=markdown`)), "import"],
    ["Export as JSON", attempt(() => download(`/chats/${chat.id}/export?format=json`)), "import"],
    ["Delete", attempt(() => remove(chat)), "trash"],
  ];
}

async function remove(chat) {
  if (chat.id === current) open(null);
  await api(`/chats/${chat.id}`, { method: "DELETE" });
  await loadList();
  toast(`Deleted “${chat.title || "Untitled"}”.`, {
    action: "Undo",
    run: async () => {
      try {
        await api(`/chats/${chat.id}/restore`, { method: "POST" });
        await loadList();
        open(chat.id);
      } catch (error) {
        toast(error.message, { error: true });
      }
    },
  });
}

async function importFile() {
  const [file] = $("import-file").files;
  $("import-file").value = "";
  if (!file) return;
  try {
    toast(`Importing ${file.name}…`);
    const done = await api("/import", { method: "POST", raw: file });
    const unreadable = done.unreadable ? `; ${done.unreadable} could not be read` : "";
    toast(`Imported ${done.conversations} conversation${done.conversations === 1 ? "" : "s"}${unreadable}.`);
    await loadList();
  } catch (error) {
    toast(`${file.name} was not imported: ${error.message}`, { error: true });
  }
}

function moveFocus(event) {
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (!step) return;
  const links = [...$("chats").querySelectorAll(".chat-link")];
  const at = links.indexOf(document.activeElement);
  if (at < 0) return;
  event.preventDefault();
  links[Math.min(Math.max(at + step, 0), links.length - 1)].focus();
}
