// The drawers, the keyboard and the theme.

import { $, el, openDialog, openMenu, store, stored } from "./dom.js";

const narrow = matchMedia("(max-width: 860px)");
let hooks = { openChat: () => {}, stop: () => {}, running: () => false, menu: () => [] };

// Closes the list of conversations where it covers the page.
export function closeDrawer() {
  if (narrow.matches) closeSidebar();
}

// Makes what a drawer covers unreachable.
function cover(covered) {
  $("shade").hidden = !covered;
  $("main").inert = covered;
}

function closeSidebar() {
  document.body.classList.remove("sidebar-open");
  $("open-sidebar").setAttribute("aria-expanded", "false");
  cover(!$("panel").hidden && narrow.matches);
}

function toggleSidebar() {
  if (narrow.matches) {
    closePanel();
    document.body.classList.add("sidebar-open");
    cover(true);
    $("open-sidebar").setAttribute("aria-expanded", "true");
    $("new-chat").focus();
  } else {
    document.body.classList.toggle("sidebar-hidden");
  }
}

function closePanel() {
  $("panel").hidden = true;
  $("open-panel").setAttribute("aria-expanded", "false");
  cover(document.body.classList.contains("sidebar-open"));
}

function togglePanel() {
  if (!$("panel").hidden) {
    closePanel();
    if (!narrow.matches) store("panel", false);
    $("open-panel").focus();
    return;
  }
  closeDrawer();
  $("panel").hidden = false;
  store("panel", true);
  cover(narrow.matches);
  $("open-panel").setAttribute("aria-expanded", "true");
  $("panel-body").querySelector("select")?.focus();
}

function escape() {
  if (narrow.matches && document.body.classList.contains("sidebar-open")) {
    closeSidebar();
    $("open-sidebar").focus();
  } else if (hooks.running()) {
    hooks.stop();
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
    hooks.openChat(null);
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

export function startPanels(given) {
  hooks = given;
  $("panel").hidden = innerWidth < 1280 || !stored("panel", true);
  $("open-panel").setAttribute("aria-expanded", String(!$("panel").hidden));
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
  $("new-chat").addEventListener("click", () => hooks.openChat(null));
  $("theme").addEventListener("click", switchTheme);
  $("help").addEventListener("click", showKeys);
  $("chat-menu").addEventListener("click", () => openMenu($("chat-menu"), hooks.menu()));
  document.addEventListener("keydown", onKey);
}
