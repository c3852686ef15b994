// The messages of a conversation. Answers arrive as blocks of HTML that the server has made safe.

import { $, confirmButton, copyText, el, icon, iconButton } from "./dom.js";

const shown = new Map(); // message id -> its view
const openReasoning = new Set(); // ids of messages whose reasoning the user has opened or closed by hand
let actions = {};

export function setActions(given) {
  actions = given;
}

// Shows a conversation; views of messages that have not changed stay as they are.
export function showMessages(chat) {
  removePending();
  const list = $("messages");
  const wanted = new Set(chat.messages.map((message) => message.id));
  for (const [id, view] of shown) {
    if (!wanted.has(id)) {
      view.element.remove();
      shown.delete(id);
    }
  }
  chat.messages.forEach((message, place) => {
    const last = place === chat.messages.length - 1;
    const signature = JSON.stringify([message, last, chat.running]);
    let view = shown.get(message.id);
    if (!view || view.signature !== signature) {
      const made = createView(message, chat, last);
      if (view) {
        const focused = view.element.contains(document.activeElement) ? document.activeElement.getAttribute("aria-label") : null;
        view.element.replaceWith(made.element);
        if (focused) made.element.querySelector(`[aria-label="${focused}"]`)?.focus();
      }
      view = made;
      view.signature = signature;
      shown.set(message.id, view);
    }
    if (list.children[place] !== view.element) list.insertBefore(view.element, list.children[place] ?? null);
  });
}

// Shows a question that is being sent.
export function showPending(text) {
  const dots = el("div", { class: "dots", role: "img", "aria-label": "Waiting for the model" }, el("i"), el("i"), el("i"));
  $("messages").append(
    el("article", { class: "message question pending", "aria-label": "Your message" }, el("div", { class: "blocks" }, el("p", { class: "typed" }, text))),
    el("article", { class: "message answer waiting pending", "aria-label": "Answer" }, dots),
  );
}

export function removePending() {
  for (const element of $("messages").querySelectorAll(".pending")) element.remove();
}

// Adds what an answer has gained.
export function growMessage(change) {
  const view = shown.get(change.message);
  if (!view) return;
  setBlocks(view.blocks, change.from, change.blocks);
  if (change.reasoning) setReasoning(view, change.reasoning_from, change.reasoning);
  view.element.classList.toggle("waiting", !view.blocks.textContent && !view.reasoning.textContent);
  if (change.blocks.length && view.details.open && !openReasoning.has(change.message)) view.details.open = false;
}

export function plainText(id) {
  return shown.get(id)?.blocks.textContent.trim() ?? "";
}

function createView(message, chat, last) {
  const question = message.role === "user";
  const running = message.id === chat.running;
  const element = el("article", { class: `message ${question ? "question" : "answer"}`, "data-id": message.id, "aria-label": question ? "Your message" : "Answer" });
  const blocks = el("div", { class: "blocks" });
  const reasoning = el("div", { class: "reasoning-text" });
  const length = el("span", { class: "muted" });
  const details = el("details", { class: "reasoning" }, el("summary", {}, icon("right"), el("span", {}, "Reasoning"), length), reasoning);
  details.querySelector("summary").addEventListener("click", () => openReasoning.add(message.id));
  const view = { element, blocks, reasoning, details, length };
  if (question) {
    blocks.append(el("p", { class: "typed" }, message.text));
  } else {
    element.append(details);
    setReasoning(view, 0, message.reasoning);
    details.open = running && Boolean(message.reasoning) && !message.blocks.length;
    setBlocks(blocks, 0, message.blocks);
  }
  element.append(blocks);
  if (running) {
    element.classList.add("running");
    element.classList.toggle("waiting", !message.text && !message.reasoning);
    element.append(el("div", { class: "dots", role: "img", "aria-label": "Waiting for the first token" }, el("i"), el("i"), el("i")));
    return view;
  }
  if (message.error) element.append(el("p", { class: "problem" }, `The answer failed: ${message.error}`));
  else if (!question && !message.finished) element.append(el("p", { class: "problem" }, "This answer was interrupted. Continue it, or regenerate it."));
  element.append(foot(message, chat, last, question));
  return view;
}

function foot(message, chat, last, question) {
  const bar = el("div", { class: "actions" });
  if (message.branches.length > 1) bar.append(branches(message, chat));
  const copy = iconButton("copy", "Copy", async () => {
    await copyText(message.text);
    confirmButton(copy);
  });
  bar.append(copy);
  const busy = chat.running !== null;
  bar.append(iconButton("edit", "Edit", () => edit(message), { disabled: busy }));
  if (!question) {
    bar.append(iconButton("again", "Regenerate", () => actions.regenerate(message.id), { disabled: busy }));
    if (last) bar.append(iconButton("go", "Continue", () => actions.continue(message.id), { disabled: busy }));
    bar.append(iconButton("tokens", "Token probabilities", () => actions.tokens(message), {}));
    const [line, ...rest] = message.figures.split("\n");
    if (line) bar.append(el("span", { class: "figures" }, `${message.model}${message.model ? " · " : ""}${line}`));
    if (rest.length) bar.append(el("span", { class: "figures more" }, rest.join("\n")));
  } else if (last && !busy) {
    bar.append(iconButton("again", "Answer this", () => actions.regenerate(message.id), {}));
  }
  return bar;
}

function branches(message, chat) {
  const all = message.branches;
  const at = all.indexOf(message.id);
  const busy = chat.running !== null;
  return el(
    "span",
    { class: "branches", role: "group", "aria-label": "Versions" },
    iconButton("left", "Previous version", () => actions.select(all[at - 1]), { disabled: busy || at === 0 }),
    el("span", { "aria-live": "off" }, `${at + 1}/${all.length}`),
    iconButton("right", "Next version", () => actions.select(all[at + 1]), { disabled: busy || at === all.length - 1 }),
  );
}

// Replaces a message by a field with its text.
export function edit(message) {
  const view = shown.get(message.id);
  if (!view || view.element.classList.contains("editing")) return;
  const question = message.role === "user";
  const field = el("textarea", { "aria-label": question ? "Edit your message" : "Edit the answer", rows: 3 });
  field.value = message.text;
  const close = () => {
    view.element.classList.remove("editing");
    form.remove();
    view.element.querySelector('[aria-label="Edit"]')?.focus();
  };
  const submit = async () => {
    if (question && !field.value.trim()) return;
    save.disabled = true;
    if (await actions.edit(message.id, field.value)) close();
    else save.disabled = false;
  };
  const save = el("button", { type: "submit", class: "primary" }, question ? "Send" : "Save as new version");
  const form = el("form", { class: "edit-form" }, field, el("div", { class: "dialog-foot" }, el("button", { type: "button", onclick: close }, "Cancel"), save));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      event.stopPropagation();
      close();
    } else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      submit();
    }
  });
  view.element.classList.add("editing");
  view.element.append(form);
  field.style.height = `${Math.min(field.scrollHeight + 4, innerHeight * 0.6)}px`;
  field.focus();
}

function setReasoning(view, start, text) {
  const before = view.reasoning.textContent;
  const now = before.slice(0, start) + text;
  if (now !== before) {
    if (before && start === before.length) view.reasoning.append(text);
    else view.reasoning.textContent = now;
  }
  const words = now.trim() ? now.trim().split(/\s+/).length : 0;
  view.length.textContent = words ? ` · ${words.toLocaleString()} word${words === 1 ? "" : "s"}` : "";
  view.details.hidden = !words;
  if (words && !view.blocks.textContent && view.element.classList.contains("running") && !openReasoning.has(Number(view.element.dataset.id))) view.details.open = true;
}

function setBlocks(container, from, blocks) {
  while (container.children.length > from + blocks.length) container.lastElementChild.remove();
  blocks.forEach((html, place) => {
    let block = container.children[from + place];
    if (!block) {
      block = el("div", { class: "block" });
      container.append(block);
    }
    block.innerHTML = html; // made safe by the server, and the page's policy runs no inline code
    block.querySelectorAll("pre:not(.plain)").forEach(addCodeHead);
    block.querySelectorAll("table").forEach((table) => {
      const frame = el("div", { class: "table", tabindex: "0", role: "group", "aria-label": "Table" });
      table.replaceWith(frame);
      frame.append(table);
    });
  });
}

function addCodeHead(pre) {
  const copy = el("button", { type: "button", class: "copy" }, "Copy");
  copy.addEventListener("click", async () => {
    await copyText(pre.textContent);
    copy.textContent = "Copied";
    setTimeout(() => (copy.textContent = "Copy"), 1200);
  });
  const frame = el("div", { class: "code" }, el("div", { class: "code-head" }, el("span", {}, pre.dataset.language ?? ""), copy));
  pre.replaceWith(frame);
  pre.setAttribute("tabindex", "0");
  pre.setAttribute("role", "group");
  pre.setAttribute("aria-label", "Code");
  frame.append(pre);
}
