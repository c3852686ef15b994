// The dialog that adds models: from the Hugging Face Hub, or from files. The server exports them, with progress.

import { api, follow, upload } from "./api.js";
import { $, el, openDialog, toast, uniqueId } from "./dom.js";

const WEIGHTS = ".pt,.pth,.bin,.safetensors,.gguf,.json,.yaml,.yml,.model,.txt,.jinja";
const JOBS = "/models/jobs";
let use = () => {};

// Shows the button; `added` is called with the name of each new model.
export function startAdding(added) {
  use = added;
  $("add-model").hidden = false;
  $("add-model").addEventListener("click", show);
}

async function show() {
  let listed;
  try {
    listed = await api(JOBS);
  } catch (error) {
    toast(error.message, { error: true });
    return;
  }
  const { downloads, uploads } = listed.allowed;
  const control = new AbortController();
  const jobs = el("ul", { class: "jobs" });
  const precision = el("select", { id: uniqueId() }, ...[["int8", "int8: small and fast"], ["int4", "int4: smallest"], ["fp32", "fp32: exact"]].map(([value, text]) => el("option", { value }, text)));
  const source = el("input", { id: uniqueId(), placeholder: "owner/name", autocomplete: "off", spellcheck: "false" });
  const files = el("input", { id: uniqueId(), type: "file", multiple: true, accept: WEIGHTS });
  const sent = el("progress", { max: 1, value: 0, "aria-label": "Upload", hidden: true });
  const problem = el("p", { class: "problem", role: "alert", hidden: true });
  const attempt = async (work, fields) => {
    problem.hidden = true;
    fields.disabled = true;
    try {
      const job = await work();
      watch(jobs, job, control.signal);
    } catch (error) {
      if (control.signal.aborted) return;
      problem.textContent = error.message;
      problem.hidden = false;
    } finally {
      fields.disabled = false;
      sent.hidden = true;
    }
  };
  const off = (title, option) => el("fieldset", {}, el("p", { class: "label" }, title), el("p", { class: "hint" }, `Off: start llm-serve with ${option}.`));
  const hubTitle = "From the Hugging Face Hub";
  const filesTitle = "From files: weights, tokenizer and configuration";
  const fromHub = !downloads ? off(hubTitle, "--allow-downloads") : el("fieldset", {},
    el("label", { for: source.id }, hubTitle), source,
    el("div", { class: "buttons" }, el("button", { type: "button", onclick: () => attempt(() => api(JOBS, { method: "POST", body: { source: source.value.trim(), precision: precision.value } }), fromHub) }, "Download and convert")));
  const fromFiles = !uploads ? off(filesTitle, "--allow-uploads") : el("fieldset", {},
    el("label", { for: files.id }, filesTitle), files, sent,
    el("div", { class: "buttons" }, el("button", { type: "button", onclick: () => attempt(() => sendFiles(files, precision.value, sent, control.signal), fromFiles) }, "Upload and convert")));
  const { closed } = openDialog("Add a model", [el("label", { for: precision.id }, "Precision"), precision, fromHub, fromFiles, problem, jobs]);
  for (const job of [...listed.data].reverse()) watch(jobs, job, control.signal);
  await closed;
  control.abort(); // exports go on; an upload ends
}

async function sendFiles(field, precision, sent, signal) {
  if (!field.files.length) throw new Error("Choose the files first.");
  const form = new FormData();
  form.append("precision", precision);
  for (const file of field.files) form.append("files", file, file.name);
  sent.hidden = false;
  return upload(JOBS, form, (share) => (share === null ? sent.removeAttribute("value") : (sent.value = share)), signal);
}

// Shows a job, and follows it to its end.
function watch(list, job, signal) {
  const item = el("li");
  const before = list.querySelector(`[data-id="${job.id}"]`);
  item.dataset.id = job.id;
  if (before) before.replaceWith(item);
  else list.prepend(item);
  let last = job;
  const ended = () => !["queued", "running"].includes(last.status);
  draw(item, job);
  if (ended()) return;
  follow(`${JOBS}/${job.id}/events`, (name, data) => {
    if (name === "gone") return;
    const before = last;
    last = data;
    draw(item, data);
    if (data.status === "finished" && before.status !== "finished") {
      toast(`${data.model} is ready.`);
      use(data.model);
    }
  }, signal, ended);
}

function draw(item, job) {
  const running = job.status === "queued" || job.status === "running";
  const remove = async () => {
    try {
      await api(`${JOBS}/${job.id}`, { method: "DELETE" });
      if (!running) item.remove();
    } catch (error) {
      toast(error.message, { error: true });
    }
  };
  const status = { queued: "Waiting", running: "Converting", finished: "Ready", failed: "Failed", cancelled: "Cancelled" }[job.status] ?? job.status;
  const parts = [
    el("div", { class: "job-head" }, el("strong", {}, job.model), el("span", { class: "muted" }, status), el("button", { type: "button", onclick: remove, "aria-label": `${running ? "Cancel" : "Remove"} ${job.model}` }, running ? "Cancel" : "Remove")),
  ];
  if (running) {
    const bar = el("progress", { max: 1, "aria-label": `Progress of ${job.model}` });
    if (job.progress !== null && job.progress !== undefined) bar.value = job.progress;
    parts.push(bar, el("p", { class: "hint" }, [job.stage, job.detail].filter(Boolean).join(": ") || "Waiting for its turn"));
  } else if (job.error) {
    parts.push(el("p", { class: "problem" }, job.error));
  } else if (job.report) {
    parts.push(report(job.report));
  }
  item.replaceChildren(...parts);
}

// How far each precision is from PyTorch.
function report(found) {
  const number = (value, digits) => (typeof value === "number" ? value.toPrecision(digits) : "–");
  const rows = (found.precisions ?? []).map((each) => el("tr", {},
    el("th", { scope: "row" }, each.name), el("td", {}, `${Math.round(each.size / 1e6).toLocaleString()} MB`),
    el("td", {}, number(each.max_difference, 2)), el("td", {}, typeof each.top1 === "number" ? `${(each.top1 * 100).toFixed(1)} %` : "–")));
  const head = ["Precision", "Size", "Largest difference from PyTorch", "Same top token"].map((text) => el("th", { scope: "col" }, text));
  return el("div", { class: "table", tabindex: "0", role: "group", "aria-label": "Report" }, el("table", {}, el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...rows)));
}
