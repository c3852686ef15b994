// The tokens of an answer with their probabilities, and the list of quick questions.

import { api } from "./api.js";
import { $, askText, el, iconButton, openDialog, openMenu, toast } from "./dom.js";

const visible = (text) => text.replaceAll("\n", "⏎").replaceAll("\t", "⇥") || "∅";
const percent = (share) => (share >= 0.0995 ? `${Math.round(share * 100)} %` : share >= 0.00095 ? `${(share * 100).toFixed(1)} %` : "< 0.1 %");

export async function showTokens(chat, message, record) {
  let found;
  try {
    found = await api(`/chats/${chat}/messages/${message.id}/tokens`);
  } catch (error) {
    toast(error.message, { error: true });
    return;
  }
  if (!found.tokens.length) {
    const { closed } = openDialog("Token probabilities", [
      el("p", {}, "The probabilities of this answer were not recorded. Recording makes later answers slightly slower."),
    ], { actions: [["Cancel", ""], ["Record and regenerate", "ok", true]] });
    if ((await closed) === "ok") record();
    return;
  }
  const detail = el("div", { class: "alternatives", role: "status" }, el("p", { class: "muted" }, "Choose a token to see the alternatives."));
  const text = el("div", { class: "token-text", role: "group", "aria-label": "Tokens" });
  found.tokens.forEach((token, place) => {
    const level = Math.min(Math.floor((1 - token.p) * 6), 5);
    const button = el("button", { type: "button", class: `token p${level}`, title: percent(token.p), tabindex: place ? "-1" : "0" }, visible(token.text));
    const choose = () => {
      for (const other of text.querySelectorAll("[aria-pressed]")) other.removeAttribute("aria-pressed");
      button.setAttribute("aria-pressed", "true");
      detail.replaceChildren(alternatives(token));
    };
    button.addEventListener("click", choose);
    button.addEventListener("focus", choose);
    text.append(button);
    if (token.text.includes("\n")) text.append(el("br"));
  });
  text.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const next = step && (step > 0 ? nextToken(event.target, "nextElementSibling") : nextToken(event.target, "previousElementSibling"));
    if (next) {
      event.preventDefault();
      next.focus();
    }
  });
  openDialog("Token probabilities", [text, detail, el("p", { class: "hint" }, "Darker tokens were less probable. Arrow keys move from token to token.")], { wide: true });
}

function nextToken(from, direction) {
  let next = from[direction];
  while (next && next.tagName !== "BUTTON") next = next[direction];
  return next;
}

function alternatives(token) {
  const rows = token.top.some(([text]) => text === token.text) ? token.top : [[token.text, token.p], ...token.top];
  return el("table", {}, el("caption", { class: "hidden" }, "Alternatives"), el("tbody", {}, ...rows.map(([text, p]) =>
    el("tr", { class: text === token.text ? "drawn" : "" }, el("th", { scope: "row" }, visible(text)), el("td", {}, el("meter", { min: 0, max: 1, value: p, "aria-label": percent(p) })), el("td", {}, percent(p))))));
}

// ---- quick questions

export function showQuestions(questions, ask, changed) {
  const edit = async (path, method, body) => {
    try {
      changed((await api(path, { method, body })).questions);
    } catch (error) {
      toast(error.message, { error: true });
    }
  };
  const place = (text) => `/questions?old=${encodeURIComponent(text)}`;
  const card = (text) => {
    const more = iconButton("more", `Change “${text}”`, () => openMenu(more, [
      ["Edit…", async () => {
        const now = await askText("Edit question", "Question", text, { long: true });
        if (now !== null) await edit(place(text), "PUT", { text: now });
      }, "edit"],
      ["Delete", async () => {
        await edit(place(text), "DELETE");
        toast("Deleted the question.", { action: "Undo", run: () => edit("/questions", "POST", { text }) });
      }, "trash"],
    ]), { "aria-haspopup": "menu" });
    return el("li", {}, el("button", { type: "button", class: "quick", onclick: () => ask(text) }, text), more);
  };
  $("empty").replaceChildren(
    el("h2", {}, "What would you like to know?"),
    el("ul", { class: "quick-list" }, ...questions.map(card)),
    el("div", { class: "buttons center" },
      el("button", { type: "button", class: "plain", "data-action": "add-question", onclick: async () => {
        const text = await askText("Add question", "Question", "", { long: true, action: "Add" });
        if (text !== null) await edit("/questions", "POST", { text });
      } }, "Add a question"),
      el("button", { type: "button", class: "plain", "data-action": "restore-questions", onclick: () => edit("/questions/restore", "POST") }, "Restore the original ones"),
    ),
  );
}
