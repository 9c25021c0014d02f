// Keys, focus, themes and streamed answers. Everything else is HTML and htmx; without scripts the pages still work.
"use strict";

const typing = (element) => element.closest("textarea, select, input:not([type=radio], [type=checkbox])");
const shown = (element) => element.offsetParent !== null;

// ------------------------------------------------------------------------------------------------------------- keys

document.addEventListener("keydown", (event) => {
  if (event.altKey || event.metaKey || event.isComposing) return;
  const field = typing(event.target);
  if (event.key === "Escape") { // stops the answer that is being written; else leaves a field, so that single keys are heard
    if (stopping) stopping(); else if (field) field.blur();
    return;
  }
  if (field) {
    if (event.key === "Enter" && event.ctrlKey && field.form) { event.preventDefault(); field.form.requestSubmit(); }
    return;
  }
  if (event.ctrlKey) return;
  if (/^[1-9]$/.test(event.key) && rank(event.key)) { event.preventDefault(); return; }
  if (event.key === "Enter" && event.target.closest("button, a, summary")) return; // it presses what has the focus
  const chosen = [...document.querySelectorAll(`[data-key="${CSS.escape(event.key)}"]`)].find((e) => shown(e) || e.type === "radio");
  if (!chosen) return;
  event.preventDefault();
  chosen.focus();
  if (chosen.type === "radio") chosen.checked = true;
  else chosen.click();
});

// A digit ranks the answer that has the focus, or the first without a rank, and goes to the next.
function rank(digit) {
  const answers = [...document.querySelectorAll("[data-rank]")];
  if (!answers.length) return false;
  const open = () => answers.find((answer) => !answer.querySelector("input:checked"));
  const now = document.activeElement.closest("[data-rank]") || open() || answers[0];
  const choice = now.querySelector(`input[value="${digit}"]`);
  if (!choice) return true;
  choice.checked = true;
  (answers[answers.indexOf(now) + 1] || open() || document.querySelector(".ranking button")).focus();
  return true;
}

// ------------------------------------------------------------------------------------------------------------ focus

function arrive() {
  const first = document.querySelector("[data-focus]") || document.querySelector("[data-rank]") || document.getElementById("main");
  if (first && document.activeElement === document.body) first.focus({ preventScroll: true });
}
document.addEventListener("DOMContentLoaded", arrive);
document.addEventListener("htmx:afterSettle", arrive);

document.addEventListener("submit", (event) => {
  const question = event.submitter && event.submitter.dataset.sure;
  if (question && !window.confirm(question)) { event.preventDefault(); event.stopImmediatePropagation(); }
}, true);

// ----------------------------------------------------------------------------------------------------------- themes

const root = document.documentElement;
try { if (localStorage.theme) root.dataset.theme = localStorage.theme; } catch { /* no storage: the system's theme */ }
document.addEventListener("click", (event) => {
  if (!event.target.closest("[data-theme-button]")) return;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  try { localStorage.theme = root.dataset.theme; } catch { /* for this page only */ }
});

// ---------------------------------------------------------------------------------------------------------- streams

let stopping = null; // stops the answer that is being written

document.addEventListener("submit", (event) => {
  const form = event.target.closest("form[data-stream]");
  if (!form || event.defaultPrevented) return;
  event.preventDefault();
  if (!stopping) stream(form, event.submitter);
}, true);

document.addEventListener("click", (event) => {
  if (event.target.closest("[data-stop]") && stopping) stopping();
});

async function stream(form, submitter) {
  const live = document.getElementById("live");
  const body = new URLSearchParams(new FormData(form, submitter));
  const abort = new AbortController();
  stopping = () => abort.abort();
  const said = live.querySelector("[data-said]");
  said.textContent = body.get("text") || "";
  said.parentElement.hidden = !said.textContent;
  live.querySelectorAll("[data-side]").forEach((side) => { side.textContent = ""; });
  live.hidden = false;
  live.scrollIntoView({ block: "end" });
  tell("The answer is being written.");
  let failure = "";
  try {
    const headers = { accept: "text/event-stream" };
    const response = await fetch(form.action, { method: "POST", body, headers, signal: abort.signal });
    if (response.headers.get("content-type")?.startsWith("text/event-stream")) failure = await read(response.body, live);
    else failure = reason(await response.text()) || "Not sent.";
  } catch (error) {
    if (error.name !== "AbortError") failure = "The connection was lost. What came so far is saved.";
  }
  stopping = null;
  await new Promise((done) => setTimeout(done, abort.signal.aborted ? 300 : 0)); // the server stores what came
  await htmx.ajax("GET", location.pathname, { target: "main", select: "main", swap: "outerHTML" });
  tell(failure || (abort.signal.aborted ? "Stopped." : "The answer is complete."));
  const field = document.querySelector(".say textarea, form[data-stream] textarea");
  if (failure && field && body.get("text")) field.value = body.get("text");
  (document.querySelector("[data-focus]") || field)?.focus();
}

async function read(bytes, live) {
  const reader = bytes.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "", failure = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return failure;
    buffer += value;
    const events = buffer.split("\n\n");
    buffer = events.pop();
    for (const each of events) {
      const found = /^event: (\w+)\ndata: (.*)$/s.exec(each);
      if (found) failure = happen(found[1], JSON.parse(found[2]), live) || failure;
    }
  }
}

function happen(name, data, live) {
  const wait = live.querySelector("[data-wait]");
  if (name === "wait") wait.textContent = data.ahead ? `${data.ahead} before you` : "";
  if (name === "piece" || name === "end") {
    wait.textContent = "";
    live.querySelector(`[data-side="${data.side}"]`).textContent += data.text;
  }
  return name === "end" && data.state === "failed" ? data.reason : "";
}

const reason = (page) => new DOMParser().parseFromString(page, "text/html").querySelector(".error")?.textContent;

// Feedback is sent while its form stays, so that what is chosen meanwhile is neither lost nor undone.
document.addEventListener("htmx:afterRequest", (event) => {
  const { xhr } = event.detail;
  if (event.target.closest(".feedback")) tell(xhr.status === 200 ? "Saved." : reason(xhr.responseText) || "Not saved.");
});

function tell(text) {
  const status = document.getElementById("status");
  if (status) status.textContent = text;
}
