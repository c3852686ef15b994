// Elements, icons, menus, dialogs and notes.

export const $ = (id) => document.getElementById(id);

const ICONS = {
  plus: "M12 5v14M5 12h14",
  close: "M6 6l12 12M18 6L6 18",
  list: "M4 6h16M4 12h16M4 18h10",
  more: "M5 12h.01M12 12h.01M19 12h.01",
  sliders: "M4 7h9M17 7h3M4 17h3M11 17h9M15 4.5v5M9 14.5v5",
  send: "M12 19V5M6 11l6-6 6 6",
  stop: "M7 7h10v10H7z",
  down: "M12 5v14M6 13l6 6 6-6",
  copy: "M9 9h10v10H9zM5 15V5h10",
  check: "M5 12.5l4.5 4.5L19 7.5",
  edit: "M4 20l1-4L16 5l3 3L8 19zM14 7l3 3",
  again: "M20 11a8 8 0 1 0-2 6M20 5v6h-6",
  go: "M6 5l7 7-7 7M13 5l7 7-7 7",
  tokens: "M4 18V9M9 18V5M14 18v-6M19 18V8",
  left: "M14 6l-6 6 6 6",
  right: "M10 6l6 6-6 6",
  import: "M12 4v11M7 10l5 5 5-5M5 20h14",
  theme: "M12 4a8 8 0 1 0 0 16zM12 4a8 8 0 0 1 0 16",
  keyboard: "M3 7h18v10H3zM7 10.5h.01M11 10.5h.01M15 10.5h.01M8 14h8",
  pin: "M9 4h6l-1 6 3 3H7l3-3zM12 13v7",
  trash: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13",
};

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  if (name === "more") svg.setAttribute("class", "bold");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

// An element; a property that begins with "on" is a listener, others are attributes. Children are nodes or texts.
export function el(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

export function iconButton(name, label, onclick, properties = {}) {
  return el("button", { type: "button", class: "icon", "aria-label": label, title: label, onclick, ...properties }, icon(name));
}

export function fillIcons(root = document) {
  for (const button of root.querySelectorAll("[data-icon]")) button.prepend(icon(button.dataset.icon));
}

let counter = 0;
export const uniqueId = () => `id-${(counter += 1)}`;

// A menu at a button. Items are [label, action, icon].
export function openMenu(button, items) {
  const menu = el("div", { role: "menu", class: "menu", popover: "auto" });
  for (const [label, action, name] of items) {
    const item = el("button", { type: "button", role: "menuitem" }, name ? icon(name) : "", label);
    item.addEventListener("click", () => {
      menu.hidePopover();
      action();
    });
    menu.append(item);
  }
  menu.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const all = [...menu.children];
    all[(all.indexOf(document.activeElement) + step + all.length) % all.length].focus();
  });
  menu.addEventListener("toggle", (event) => {
    if (event.newState === "closed") {
      menu.remove();
      if (document.activeElement === document.body) button.focus();
    }
  });
  (button.closest("dialog") ?? document.body).append(menu);
  menu.showPopover();
  const at = button.getBoundingClientRect();
  const width = menu.offsetWidth, height = menu.offsetHeight;
  menu.style.left = `${Math.max(8, Math.min(at.left, innerWidth - width - 8))}px`;
  menu.style.top = `${at.bottom + height + 8 > innerHeight ? Math.max(8, at.top - height - 4) : at.bottom + 4}px`;
  menu.firstElementChild?.focus();
}

// A dialog with a title; resolves with its return value once it is closed.
export function openDialog(title, content, { wide = false, actions = [] } = {}) {
  const id = uniqueId();
  const dialog = el("dialog", { "aria-labelledby": id, class: wide ? "wide" : "" });
  const form = el("form", { method: "dialog" });
  const closeButton = iconButton("close", "Close", () => dialog.close(""));
  form.append(el("div", { class: "dialog-head" }, el("h2", { id }, title), closeButton), ...content);
  if (actions.length) {
    const buttons = actions.map(([label, value, primary]) =>
      el("button", { type: value ? "submit" : "button", value, class: primary ? "primary" : "", onclick: value ? undefined : () => dialog.close("") }, label));
    form.append(el("div", { class: "dialog-foot" }, ...buttons));
  }
  dialog.append(form);
  document.body.append(dialog);
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close("");
  });
  const closed = new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(dialog.returnValue);
    });
  });
  dialog.showModal();
  return { dialog, closed, close: () => dialog.close("") };
}

// Asks for a text; resolves with it, or with null.
export async function askText(title, label, value = "", { action = "Save", type = "text", long = false, hint = "" } = {}) {
  const id = uniqueId();
  const field = long
    ? el("textarea", { id, rows: 5 })
    : el("input", { id, type, autocomplete: type === "password" ? "current-password" : "off", spellcheck: "false" });
  field.value = value;
  const content = [el("label", { for: id }, label), field];
  if (hint) content.push(el("p", { class: "hint" }, hint));
  const { dialog, closed } = openDialog(title, content, { actions: [["Cancel", ""], [action, "ok", true]] });
  field.focus();
  field.select();
  if (!long) {
    field.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.isComposing) return;
      event.preventDefault();
      dialog.close("ok");
    });
  }
  return (await closed) === "ok" ? field.value : null;
}

// A note that disappears; with an action, it stays longer.
export function toast(text, { action = "", run = null, error = false } = {}) {
  const note = el("div", { class: error ? "toast error" : "toast" }, el("span", {}, text.charAt(0).toUpperCase() + text.slice(1)));
  const remove = () => note.remove();
  if (run) {
    note.append(el("button", { type: "button", onclick: () => { remove(); run(); } }, action));
  }
  note.append(iconButton("close", "Dismiss", remove));
  $("toasts").append(note);
  while ($("toasts").children.length > 4) $("toasts").firstElementChild.remove();
  setTimeout(remove, run ? 10_000 : error ? 12_000 : 4_000);
}

export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // not a secure context, or not allowed
    const field = el("textarea", { class: "hidden" });
    field.value = text;
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
  }
}

// Shows for a moment that a button has done its work.
export function confirmButton(button) {
  const before = [...button.childNodes];
  button.replaceChildren(icon("check"));
  setTimeout(() => button.replaceChildren(...before), 1200);
}

export function stored(name, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(`llm-edge.${name}`)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

export function store(name, value) {
  try {
    localStorage.setItem(`llm-edge.${name}`, JSON.stringify(value));
  } catch {
    // storage is off or full: the value lasts until the page is closed
  }
}

export function debounced(work, milliseconds) {
  let timer = 0;
  return (...values) => {
    clearTimeout(timer);
    timer = setTimeout(() => work(...values), milliseconds);
  };
}
