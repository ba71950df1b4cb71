// The detector in a page: the windows, the network and the log-odds of deepfake_utils.scoring, on this computer alone.

import * as ort from "./ort.wasm.min.mjs";

export const RATE_HZ = 16000;
const CROP = 64600, HOP = CROP / 2; // samples of a window, and from one to the next
const FRAME = 512, CONTEXT = 64, MAX_FRAMES = 512; // of the speech finder: samples, samples before them, frames a call
const SPEECH_PROBABILITY = 0.5, MIN_SPEECH_S = 1, MIN_TAIL_S = 0.25;

ort.env.wasm.numThreads = 1; // more need headers that a plain server does not send

export async function loadDetector() {
  const fetched = async (name) => {
    const answer = await fetch(name);
    if (!answer.ok) throw new Error(`${name}: ${answer.status} ${answer.statusText}`);
    return answer;
  };
  const session = async (name) => ort.InferenceSession.create(await (await fetched(name)).arrayBuffer());
  const card = await (await fetched("model.json")).json();
  return { card, model: await session("model.onnx"), finder: await session("speech.onnx") };
}

// Flags frames of speech in samples that arrive in chunks of any size.
class SpeechFinder {
  constructor(session) {
    this.session = session;
    this.h = new Float32Array(128);
    this.c = new Float32Array(128);
    this.context = new Float32Array(CONTEXT);
    this.rest = new Float32Array(0);
  }

  async push(samples) {
    samples = joined([this.rest, samples]);
    const nFrames = Math.floor(samples.length / FRAME);
    this.rest = samples.slice(nFrames * FRAME);
    const flags = [];
    for (let start = 0; start < nFrames; start += MAX_FRAMES) {
      const n = Math.min(MAX_FRAMES, nFrames - start);
      const input = new Float32Array(n * (CONTEXT + FRAME));
      for (let i = 0; i < n; i++) {
        const frame = samples.subarray((start + i) * FRAME, (start + i + 1) * FRAME);
        input.set(this.context, i * (CONTEXT + FRAME));
        input.set(frame, i * (CONTEXT + FRAME) + CONTEXT);
        this.context = frame.slice(FRAME - CONTEXT);
      }
      const memory = (values) => new ort.Tensor("float32", values, [1, 1, 128]);
      const feeds = { input: new ort.Tensor("float32", input, [n, CONTEXT + FRAME]), h: memory(this.h), c: memory(this.c) };
      const found = await this.session.run(feeds);
      [this.h, this.c] = [found.hn.data, found.cn.data];
      for (const probability of found.speech_probs.data) flags.push(probability >= SPEECH_PROBABILITY);
    }
    return flags;
  }

  finish() {
    return this.push(new Float32Array((FRAME - (this.rest.length % FRAME)) % FRAME));
  }
}

// Judges the windows of a recording that hold speech, as its 16 kHz samples arrive.
export class Stream {
  constructor(detector) {
    this.detector = detector;
    this.finder = new SpeechFinder(detector.finder);
    this.kept = new Float32Array(0); // the last samples, at most a window and a hop
    this.speechEnds = []; // of each frame of speech, the sample after its last
    this.nFrames = this.nextStart = this.nSamples = 0;
    this.windows = [];
  }

  async push(samples) {
    for (let start = 0; start < samples.length; start += HOP) {
      const chunk = samples.subarray(start, start + HOP);
      this.kept = joined([this.kept.slice(-CROP), chunk]);
      this.nSamples += chunk.length;
      this.count(await this.finder.push(chunk));
      while (this.nextStart + CROP <= this.nSamples) {
        await this.judge(this.nextStart, this.nextStart + CROP);
        this.nextStart += HOP;
      }
    }
  }

  async finish() {
    this.count(await this.finder.finish());
    const covered = this.nextStart ? this.nextStart - HOP + CROP : 0;
    if (this.nSamples - covered >= (covered ? MIN_TAIL_S * RATE_HZ : 1)) {
      await this.judge(Math.max(0, this.nSamples - CROP), this.nSamples);
    }
  }

  count(flags) {
    flags.forEach((flag, i) => {
      if (flag) this.speechEnds.push(Math.min((this.nFrames + i + 1) * FRAME, this.nSamples));
    });
    this.nFrames += flags.length;
    this.speechEnds = this.speechEnds.filter((end) => end > this.nSamples - CROP - HOP);
  }

  async judge(start, stop) {
    const speechS = (this.speechEnds.filter((end) => start < end && end <= stop).length * FRAME) / RATE_HZ;
    if (speechS < MIN_SPEECH_S) return;
    const from = this.nSamples - this.kept.length;
    const samples = this.kept.subarray(start - from, stop - from);
    const waveform = Float32Array.from({ length: CROP }, (_, i) => samples[i % samples.length]); // a short one repeated
    const { logits } = await this.detector.model.run({ waveform: new ort.Tensor("float32", waveform, [1, CROP]) });
    const { slope, offset } = this.detector.card.calibration;
    const logOdds = slope * (logits.data[1] - logits.data[0]) + offset;
    this.windows.push({ startS: start / RATE_HZ, endS: stop / RATE_HZ, speechS, logOdds });
  }
}

// The verdict on the windows so far, pooled as the card says, against the band in which errors are frequent.
export function verdictOn(windows, card) {
  if (!windows.length) return { word: "no verdict", logOdds: null };
  const { slope = 1, offset = 0, ...pooling } = card.pooling ?? { name: "mean" };
  const logOdds = slope * pooled(windows.map((window) => window.logOdds), pooling) + offset;
  return { word: wordFor(logOdds, card), logOdds };
}

function pooled(values, { name, share, temperature }) {
  if (name === "quantile") {
    const sorted = [...values].sort((a, b) => a - b), at = share * (values.length - 1), below = Math.floor(at);
    return sorted[below] + (at - below) * ((sorted[below + 1] ?? sorted[below]) - sorted[below]);
  }
  const least = Math.min(...values); // of the exponents' arguments, lest they overflow
  const weights = values.map((value) => (name === "mean" ? 1 : Math.exp((least - value) / temperature)));
  const sum = weights.reduce((total, weight) => total + weight);
  return values.reduce((total, value, i) => total + weights[i] * value, 0) / sum;
}

export function wordFor(logOdds, card) {
  const [low, high] = card.uncertain_log_odds;
  return logOdds >= high ? "real" : logOdds < low ? "fake" : "uncertain";
}

export function joined(parts) {
  const whole = new Float32Array(parts.reduce((n, part) => n + part.length, 0));
  let at = 0;
  for (const part of parts) {
    whole.set(part, at);
    at += part.length;
  }
  return whole;
}
