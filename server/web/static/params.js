// The panel of parameters. `changed` holds the values that differ from the model's defaults.

import { api } from "./api.js";
import { $, askText, debounced, el, iconButton, store, stored, toast, uniqueId } from "./dom.js";

let specs = [];
let defaults = {};
let exact = false; // the defaults are the model's: they are not known before it is loaded
let presets = [];
let model = "";
let changed = {};
let thinking = null;
let system = "";
let hooks = { params: () => {}, system: () => {} };

export function startParams(given, onParams, onSystem) {
  specs = given;
  defaults = Object.fromEntries(given.map((spec) => [spec.name, spec.default])); // until a model is known
  hooks = { params: debounced(onParams, 150), system: debounced(onSystem, 500) };
  draw();
}

export const params = () => ({ ...changed });
export const thinkingMode = () => thinking;
export const systemPrompt = () => system;

export function setSystem(text) {
  system = text;
  const field = $("system");
  if (field && field !== document.activeElement) field.value = text;
}

// Uses the defaults and presets of a model, with the values that it had last.
export async function useModel(name) {
  model = name;
  const known = stored("params", {})[name] ?? {};
  await loadModel();
  setParams(known);
}

export async function loadModel() {
  if (!model) return;
  const details = await api(`/models/details?model=${encodeURIComponent(model)}`);
  defaults = details.defaults;
  exact = details.loaded;
  presets = details.presets;
  setParams(changed);
}

export function setParams(values) {
  changed = {};
  for (const spec of specs) {
    if (values[spec.name] !== undefined && !isDefault(spec.name, values[spec.name])) changed[spec.name] = values[spec.name];
  }
  draw();
}

const isDefault = (name, given) => exact && same(given, defaults[name]);
const same = (one, other) => JSON.stringify(one) === JSON.stringify(other);
const value = (name) => (name in changed ? changed[name] : defaults[name]);

export function setParam(name, to) {
  if (isDefault(name, to)) delete changed[name];
  else changed[name] = to;
  parameterChanged(name);
}

function parameterChanged(name) {
  remember();
  showPreset();
  for (const row of document.querySelectorAll(`[data-parameter="${name}"]`)) markRow(row, name);
}

function remember() {
  store("params", { ...stored("params", {}), [model]: changed });
  hooks.params();
}

// ---- drawing

function draw() {
  const body = $("panel-body");
  const scroll = body.scrollTop;
  const open = new Set([...body.querySelectorAll("details[open]")].map((each) => each.dataset.group));
  const parts = [presetRow(), systemRow(), thinkingRow()];
  const main = specs.filter((spec) => !spec.more);
  parts.push(el("div", { class: "params" }, ...main.map(row)));
  const groups = new Map();
  for (const spec of specs.filter((each) => each.more)) groups.set(spec.group, [...(groups.get(spec.group) ?? []), spec]);
  for (const [name, members] of groups) {
    const count = members.filter((spec) => spec.name in changed).length;
    parts.push(el("details", { class: "group", "data-group": name, open: open.has(name) || count > 0 }, el("summary", {}, `More: ${name}`), el("div", { class: "params" }, ...members.map(row))));
  }
  const focused = placeOf(document.activeElement);
  body.replaceChildren(...parts);
  body.scrollTop = scroll;
  showPreset();
  if (focused) body.querySelector(focused)?.focus();
}

// A selector for a control of the panel; null for other elements.
function placeOf(element) {
  if (!$("panel-body").contains(element) || element === $("panel-body")) return null;
  const parameter = element.closest("[data-parameter]")?.dataset.parameter;
  if (!parameter) return element.id ? `#${element.id}` : null;
  return `[data-parameter="${parameter}"] ${element.localName}${element.type && element.localName === "input" ? `[type="${element.type}"]` : ""}`;
}

function presetRow() {
  const id = "preset";
  const select = el("select", { id }, el("option", { value: "" }, "Custom"), ...presets.map((each) => el("option", { value: each.name, title: each.description }, each.description && !each.own ? `${each.name} – ${each.description}` : each.name)));
  select.addEventListener("change", () => {
    const preset = presets.find((each) => each.name === select.value);
    if (!preset) return showPreset();
    const kept = preset.decides ? Object.fromEntries(Object.entries(changed).filter(([name]) => !preset.decides.includes(name))) : {};
    setParams({ ...kept, ...preset.values });
    remember();
    $("preset").focus();
  });
  return el(
    "div",
    { class: "field" },
    el("label", { for: id }, "Preset"),
    select,
    el(
      "div",
      { class: "buttons" },
      el("button", { type: "button", id: "reset-params", onclick: () => { setParams({}); remember(); toast("All parameters are at the model's defaults."); } }, "Reset all"),
      el("button", { type: "button", id: "save-preset", onclick: savePreset }, "Save as…"),
      el("button", { type: "button", id: "delete-preset", onclick: deletePreset, hidden: true }, "Delete preset"),
    ),
    el("p", { class: "hint" }, "Changes also apply to the answer being generated."),
  );
}

function showPreset() {
  const select = $("preset");
  if (!select) return;
  const found = presets.find((each) => {
    const names = each.decides ?? specs.map((spec) => spec.name);
    return names.every((name) => same(value(name), name in each.values ? each.values[name] : defaults[name]));
  });
  select.value = found?.name ?? "";
  $("delete-preset").hidden = !found?.own;
}

async function savePreset() {
  const name = await askText("Save preset", "Name", "", { hint: "It holds the values that differ from this model's defaults." });
  if (name === null) return;
  try {
    await api(`/presets?model=${encodeURIComponent(model)}`, { method: "POST", body: { name, params: changed } });
    await loadModel();
  } catch (error) {
    toast(error.message, { error: true });
  }
}

async function deletePreset() {
  const name = $("preset").value;
  const values = params();
  try {
    await api(`/presets?model=${encodeURIComponent(model)}&name=${encodeURIComponent(name)}`, { method: "DELETE" });
    await loadModel();
    toast(`Deleted the preset ${name}.`, {
      action: "Undo",
      run: async () => {
        await api(`/presets?model=${encodeURIComponent(model)}`, { method: "POST", body: { name, params: values } });
        await loadModel();
      },
    });
  } catch (error) {
    toast(error.message, { error: true });
  }
}

function systemRow() {
  const field = el("textarea", { id: "system", rows: 3, placeholder: "The model's own" });
  field.value = system;
  field.addEventListener("input", () => {
    system = field.value;
    hooks.system();
  });
  const hint = el("p", { class: "hint" }, "Applies from the next answer on.");
  return el("div", { class: "field" }, el("label", { for: "system" }, "System prompt of this conversation"), field, hint);
}

function thinkingRow() {
  const select = el("select", { id: "thinking" }, ...[["", "As the model does"], ["true", "On"], ["false", "Off"]].map(([name, text]) => el("option", { value: name }, text)));
  select.value = thinking === null ? "" : String(thinking);
  select.addEventListener("change", () => (thinking = select.value ? select.value === "true" : null));
  const hint = el("p", { class: "hint" }, "For models that can reason; applies from the next answer on.");
  return el("div", { class: "field" }, el("label", { for: "thinking" }, "Reasoning"), select, hint);
}

function row(spec) {
  const id = uniqueId();
  const editor = { bool: switchOf, strings: linesOf, text: textOf }[spec.kind] ?? numberOf;
  const reset = iconButton("again", `Reset ${spec.title}`, () => {
    delete changed[spec.name];
    parameterChanged(spec.name);
    const fresh = row(spec);
    made.replaceWith(fresh);
    fresh.querySelector("input, textarea").focus();
  });
  const made = el(
    "div",
    { class: `field parameter ${spec.kind}`, "data-parameter": spec.name },
    el("div", { class: "label" }, el("label", { for: id }, spec.title), reset),
    ...editor(spec, id),
    el("p", { class: "hint", id: `${id}-hint`, title: spec.detail }, spec.help),
  );
  markRow(made, spec.name);
  return made;
}

function markRow(made, name) {
  made.classList.toggle("changed", name in changed);
}

function numberOf(spec, id) {
  const [low, high, step, start] = spec.slider;
  const current = value(spec.name);
  const number = el("input", { id, type: "number", step: spec.kind === "int" ? 1 : "any", min: spec.between?.[0], max: spec.between?.[1], placeholder: spec.optional ? "off" : "", "aria-describedby": `${id}-hint` });
  const range = el("input", { type: "range", min: low, max: high, step, "aria-label": `${spec.title}, slider` });
  const show = (now) => {
    number.value = now ?? "";
    range.value = now ?? start ?? low;
    range.classList.toggle("off", now === null);
    const share = ((Number(range.value) - low) / (high - low)) * 100;
    range.style.setProperty("--share", `${share}%`);
  };
  show(current);
  range.addEventListener("input", () => {
    const picked = Number(range.value);
    setParam(spec.name, picked);
    show(picked);
  });
  number.addEventListener("input", () => {
    if (number.value === "") {
      if (spec.optional && !number.validity.badInput) {
        setParam(spec.name, null);
        show(null);
      }
      return;
    }
    const typed = Number(number.value);
    number.setAttribute("aria-invalid", String(!number.validity.valid));
    if (!number.validity.valid) return;
    setParam(spec.name, typed);
    range.value = typed;
    range.classList.remove("off");
    range.style.setProperty("--share", `${Math.min(Math.max((typed - low) / (high - low), 0), 1) * 100}%`);
  });
  number.addEventListener("change", () => {
    show(value(spec.name));
    number.removeAttribute("aria-invalid");
  });
  return [el("div", { class: "pair" }, range, number)];
}

function switchOf(spec, id) {
  const box = el("input", { id, type: "checkbox", role: "switch", "aria-describedby": `${id}-hint` });
  box.checked = Boolean(value(spec.name));
  box.addEventListener("change", () => setParam(spec.name, box.checked));
  return [box];
}

const escaped = (text) => text.replaceAll("\\", "\\\\").replaceAll("\n", "\\n").replaceAll("\t", "\\t");
const unescaped = (text) => text.replace(/\\([nt\\])/g, (_, mark) => ({ n: "\n", t: "\t", "\\": "\\" })[mark]);

function linesOf(spec, id) {
  const field = el("textarea", { id, rows: 2, spellcheck: "false", placeholder: "One per line; \\n is a line end", "aria-describedby": `${id}-hint` });
  field.value = (value(spec.name) ?? []).map(escaped).join("\n");
  field.addEventListener("input", () => setParam(spec.name, field.value.split("\n").filter(Boolean).map(unescaped)));
  return [field];
}

function textOf(spec, id) {
  const field = el("textarea", { id, rows: 3, spellcheck: "false", "aria-describedby": `${id}-hint` });
  field.value = value(spec.name) ?? "";
  field.addEventListener("input", () => setParam(spec.name, field.value));
  return [field];
}
