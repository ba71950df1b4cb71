"use strict";
const $ = (id) => document.getElementById(id);
const WORDS = {
  real: ["This sounds like a person speaking", "real"],
  fake: ["This sounds made or altered by a machine", "fake"],
  uncertain: ["It cannot be told", "uncertain"],
  "no verdict": ["No verdict", "none"],
};
let verdictId = null, recorder = null;

const say = (text) => { $("status").className = ""; $("status").textContent = text; };
const percent = (share) => share < 0.001 ? "< 0.1 %" : share > 0.999 ? "> 99.9 %" : `${(100 * share).toFixed(0)} %`;
const headers = () => $("token").value ? { Authorization: `Bearer ${$("token").value}` } : {};

async function ask(path, body, more = {}) {
  const response = await fetch(path, { method: "POST", body, headers: { ...headers(), ...more } });
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.detail);
  return answer;
}

function fail(error) {
  $("status").className = "problem";
  $("status").textContent = `That did not work: ${error.message}`;
}

async function score(recording) {
  $("answer").hidden = true;
  say("Listening to the recording …");
  try {
    show(await ask(`v1/score?keep=${$("keep").checked}`, recording, { "Content-Type": "application/octet-stream" }));
  } catch (error) { fail(error); }
}

function choose(files) {
  $("answer").hidden = true;
  if (files.length > 1) fail(new Error(`${files.length} files at once: one recording at a time`));
  else if (files.length) score(files[0]);
}

function show(answer) {
  const [word, kind] = WORDS[answer.verdict];
  verdictId = answer.id;
  $("word").textContent = word;
  $("word").className = `word ${kind}`;
  $("odds").textContent = answer.probability_fake === null ? "" : `Probability that it is fake: ` +
    `${percent(answer.probability_fake)}, if ${percent(answer.prior_fake)} of such recordings are.`;
  $("reason").textContent = `${answer.reason.charAt(0).toUpperCase()}${answer.reason.slice(1)}.`;
  $("warnings").replaceChildren(...answer.warnings.map((text) => element("li", text)));
  $("figure").hidden = !answer.windows.length;
  draw(answer.windows, answer.seconds);
  $("about").textContent = `${(answer.speech_seconds ?? answer.seconds).toFixed(1)} of ${answer.seconds.toFixed(1)} s ` +
    `hold speech. Model ${answer.model}. ${answer.kept ? "The recording was kept." : "The recording was not kept."}`;
  $("wrong").hidden = false;
  open_feedback(false);
  $("answer").hidden = false;
  say("");
  $("answer").focus();
}

function element(name, text) {
  const made = document.createElement(name);
  made.textContent = text;
  return made;
}

function draw(windows, seconds) {  // a bar for each window, as the caption says
  const bars = windows.map((one, i) => {
    const bar = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    const next = windows[i + 1], end = next ? Math.min(one.end_s, next.start_s) : one.end_s;
    const height = Math.min(48, 2 + 46 * Math.abs(one.score ?? 0) / 6);
    const box = { x: 1000 * one.start_s / seconds, width: Math.max(1, 1000 * (end - one.start_s) / seconds - 1),
                  y: one.score >= 0 ? 50 - height : 50, height };
    for (const [name, value] of Object.entries(box)) bar.setAttribute(name, value);
    bar.style.fill = one.score >= 0 ? "var(--real)" : "var(--fake)";
    return bar;
  });
  $("timeline").replaceChildren(...bars);
  $("span").textContent = `from 0 to ${seconds.toFixed(1)} s`;
  const n = windows.filter((one) => one.score < 0).length;
  $("timeline").setAttribute("aria-label", `${n} of ${windows.length} windows sound fake; the table below has them all`);
  $("windows").replaceChildren(...windows.map((one) => {
    const row = document.createElement("tr");
    row.append(element("td", `${one.start_s.toFixed(1)} s`), element("td", `${one.end_s.toFixed(1)} s`),
               element("td", one.score === null ? "–" : one.score.toFixed(1).replace(/^-0\.0$/, "0.0")));
    return row;
  }));
}

function open_feedback(open) {
  $("feedback").hidden = !open;
  $("wrong").setAttribute("aria-expanded", open);
  if (open) $("feedback").elements.truth[0].focus();
}

async function record() {
  if (recorder) return recorder.stop();
  let microphone;
  try {
    microphone = await navigator.mediaDevices.getUserMedia({ audio: true });
  } catch (error) { return fail(new Error(`no microphone can be used (${error.message})`)); }
  const parts = [];
  recorder = new MediaRecorder(microphone);
  recorder.ondataavailable = (event) => parts.push(event.data);
  recorder.onstop = () => {
    microphone.getTracks().forEach((track) => track.stop());
    const type = recorder.mimeType;
    recorder = null;
    $("record").textContent = "Record";
    $("record").setAttribute("aria-pressed", "false");
    score(new Blob(parts, { type }));
  };
  recorder.start();
  $("record").textContent = "Stop and listen";
  $("record").setAttribute("aria-pressed", "true");
  say("Recording …");
}

$("file").addEventListener("change", () => choose($("file").files));
$("record").addEventListener("click", record);
$("wrong").addEventListener("click", () => open_feedback($("feedback").hidden));
for (const name of ["dragover", "dragleave", "drop"]) {
  $("drop").addEventListener(name, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", name === "dragover");
    if (name === "drop") choose(event.dataTransfer.files);
  });
}
$("feedback").addEventListener("submit", async (event) => {
  event.preventDefault();
  const { truth, note } = $("feedback").elements;
  const said = JSON.stringify({ verdict_id: verdictId, truth: truth.value, note: note.value });
  try {
    await ask("v1/feedback", said, { "Content-Type": "application/json" });
    $("feedback").reset();
    $("feedback").hidden = $("wrong").hidden = true;
    say("Thank you: it was written down.");
  } catch (error) { fail(error); }
});
fetch("ready").then((response) => response.json()).then((about) => {
  $("token-row").hidden = !about.token_needed;
  $("limits").textContent = `Up to ${Math.floor(about.limits.upload_bytes / 2 ** 20)} MB and ` +
    `${about.limits.recording_s / 60} minutes; any format. It is not kept unless you say so.`;
});
