// The page: a file or the microphone in, verdict and timeline out.

import { listen, readAudio } from "./audio.js";
import { joined, loadDetector, RATE_HZ, Stream, verdictOn, wordFor } from "./detector.js";

const at = (id) => document.getElementById(id);
const seconds = (value) => value.toFixed(1);
const signed = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(2);
let detector, stopMicrophone;

window.result = null; // of the last recording: name, windows and verdict, also for whoever automates the page

async function start() {
  detector = await loadDetector();
  at("caution").textContent = detector.card.caution ? `Do not accuse anybody on its word: ${detector.card.caution}.` : "";
  at("file").disabled = at("microphone").disabled = false;
  say("Ready.");
}

at("file").onchange = guarded(async () => {
  const file = at("file").files[0];
  if (!file) return;
  clear();
  say(`Reading ${file.name}…`);
  const samples = await readAudio(file);
  const stream = new Stream(detector);
  for (let from = 0; from < samples.length; from += 2 * RATE_HZ) {
    await stream.push(samples.subarray(from, from + 2 * RATE_HZ));
    show(stream, samples);
    await new Promise((resolve) => setTimeout(resolve)); // lets the page draw
  }
  await stream.finish();
  finish(file.name, stream, samples);
});

at("microphone").onclick = guarded(async () => {
  if (stopMicrophone) return stopMicrophone();
  clear();
  const stream = new Stream(detector), chunks = [];
  let judging = Promise.resolve();
  const stop = await listen((chunk) => {
    chunks.push(chunk);
    judging = judging.then(() => stream.push(chunk)).then(() => show(stream, joined(chunks)));
    judging.catch(complain);
  });
  at("microphone").textContent = "Stop";
  at("file").disabled = true;
  say("Listening: the first answer comes after 4 seconds.");
  stopMicrophone = guarded(async () => {
    stopMicrophone = null;
    at("microphone").textContent = "Use the microphone";
    at("file").disabled = false;
    await stop();
    await judging;
    await stream.finish();
    finish("microphone", stream, joined(chunks));
  });
});

function finish(name, stream, samples) {
  show(stream, samples);
  say(`${name}: ${seconds(samples.length / RATE_HZ)} s.`);
  if (!stream.windows.length) {
    at("verdict").textContent = "no verdict";
    at("reason").textContent = "No second of speech was found in any 4 s of it, and a verdict needs that.";
  }
  window.result = { name, windows: stream.windows, ...verdictOn(stream.windows, detector.card) };
}

function show(stream, samples) {
  const { word, logOdds } = verdictOn(stream.windows, detector.card);
  if (logOdds !== null) {
    const [low, high] = detector.card.uncertain_log_odds;
    at("verdict").textContent = { real: "sounds real", fake: "sounds machine-made" }[word] ?? word;
    at("verdict").className = word;
    at("reason").textContent =
      `Log-odds of real speech ${signed(logOdds)}, over ${stream.windows.length} windows of 4 s; ` +
      `between ${signed(low)} and ${signed(high)} errors are frequent.`;
  }
  at("windows").replaceChildren(...stream.windows.map(row));
  at("details").hidden = !stream.windows.length;
  draw(stream.windows, samples);
}

function row(window) {
  const cells = [seconds(window.startS), seconds(window.endS), seconds(window.speechS), signed(window.logOdds)];
  const line = document.createElement("tr");
  for (const text of [...cells, wordFor(window.logOdds, detector.card)]) line.insertCell().textContent = text;
  return line;
}

// The waveform above; below it each window's log-odds in the middle hop of the window, the uncertain band in grey.
function draw(windows, samples) {
  const canvas = at("timeline"), scale = devicePixelRatio;
  canvas.hidden = false;
  const width = canvas.clientWidth, height = canvas.clientHeight, wave = height * 0.4;
  [canvas.width, canvas.height] = [width * scale, height * scale];
  const pen = canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(`--${name}`);
  pen.scale(scale, scale);
  const left = 34, durationS = samples.length / RATE_HZ, x = (s) => left + (s / durationS) * (width - left);
  pen.fillStyle = colour("uncertain");
  const column = Math.max(1, Math.floor(samples.length / (width - left)));
  for (let pixel = 0; pixel < width - left; pixel++) {
    let peak = 0;
    for (let i = pixel * column; i < Math.min((pixel + 1) * column, samples.length); i++) peak = Math.max(peak, Math.abs(samples[i]));
    pen.fillRect(left + pixel, (wave * (1 - peak)) / 2, 1, Math.max(1, wave * peak));
  }
  const [low, high] = detector.card.uncertain_log_odds;
  const reach = Math.max(3, ...windows.map((window) => Math.abs(window.logOdds) + 0.5));
  const y = (value) => wave + 8 + ((reach - value) / (2 * reach)) * (height - wave - 26);
  pen.globalAlpha = 0.25;
  pen.fillRect(left, y(high), width - left, y(low) - y(high));
  pen.globalAlpha = 1;
  for (const window of windows) {
    pen.fillStyle = colour(wordFor(window.logOdds, detector.card));
    pen.fillRect(x(window.startS), y(window.logOdds) - 2, x(window.endS) - x(window.startS) - 1, 4);
  }
  pen.fillStyle = getComputedStyle(document.body).color;
  pen.font = "12px system-ui, sans-serif";
  pen.fillText("real", 0, y(reach) + 10);
  pen.fillText("fake", 0, y(-reach));
  pen.fillText("0 s", left, height - 2);
  pen.textAlign = "right";
  pen.fillText(`${seconds(durationS)} s`, width, height - 2);
}

function clear() {
  window.result = null;
  at("verdict").textContent = at("reason").textContent = "";
  at("verdict").className = "";
  at("timeline").hidden = at("details").hidden = true;
}

function say(text) {
  at("state").textContent = text;
}

function complain(problem) {
  say(`That did not work: ${problem.message}`);
  window.result = { error: problem.message };
}

function guarded(action) {
  return () => action().catch(complain);
}

guarded(start)();
