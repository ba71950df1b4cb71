// Recordings as 16 kHz mono samples, by the filter of deepfake_utils.waveforms.resample.

import { RATE_HZ } from "./detector.js";

const PASSBAND_FRACTION = 0.94, STOPBAND_DB = 80; // flat to here of the lower Nyquist frequency, and so far down from it

// A file of any format the browser plays. It is decoded at its own rate where its header says that (WAV, FLAC), else
// the browser converts it, a little differently.
export async function readAudio(file) {
  const content = await file.arrayBuffer();
  const rateHz = rateInHeader(new DataView(content)) ?? RATE_HZ;
  const decoded = await new OfflineAudioContext(1, 1, rateHz).decodeAudioData(content);
  const mono = new Float32Array(decoded.length);
  for (let channel = 0; channel < decoded.numberOfChannels; channel++) {
    const samples = decoded.getChannelData(channel);
    for (let i = 0; i < mono.length; i++) mono[i] += samples[i] / decoded.numberOfChannels;
  }
  return resample(mono, rateHz).map((sample) => Math.min(1, Math.max(-1, sample)));
}

function rateInHeader(view) {
  const text = (at, n) => (at + n <= view.byteLength ? String.fromCharCode(...new Uint8Array(view.buffer, at, n)) : "");
  if (text(0, 4) === "fLaC") return (view.getUint16(18) << 4) | (view.getUint8(20) >> 4);
  if (text(0, 4) !== "RIFF" || text(8, 4) !== "WAVE") return null;
  for (let at = 12; at + 16 <= view.byteLength; at += 8 + view.getUint32(at + 4, true) + (view.getUint32(at + 4, true) & 1)) {
    if (text(at, 4) === "fmt ") return view.getUint32(at + 12, true);
  }
  return null;
}

export function resample(samples, rateHz) {
  if (rateHz === RATE_HZ) return samples;
  const divisor = gcd(RATE_HZ, rateHz);
  const up = RATE_HZ / divisor, down = rateHz / divisor;
  const taps = lowPass(up, down), half = (taps.length - 1) / 2;
  const out = new Float32Array(Math.ceil((samples.length * up) / down));
  for (let m = 0; m < out.length; m++) {
    const centre = m * down + half; // taps[centre - k up] weighs sample k
    const first = Math.max(0, Math.ceil((centre - taps.length + 1) / up));
    const last = Math.min(samples.length - 1, Math.floor(centre / up));
    let sum = 0;
    for (let k = first; k <= last; k++) sum += samples[k] * taps[centre - k * up];
    out[m] = sum * up;
  }
  return out;
}

// Taps at `up` times the input rate: a windowed sinc with Kaiser's window, scaled to pass a constant as it is.
function lowPass(up, down) {
  const nyquist = 1 / Math.max(up, down), width = (1 - PASSBAND_FRACTION) * nyquist, cutoff = nyquist - width / 2;
  const half = Math.ceil((STOPBAND_DB - 7.95) / (2.285 * Math.PI * width) / 2);
  const beta = 0.1102 * (STOPBAND_DB - 8.7);
  const taps = Float64Array.from({ length: 2 * half + 1 }, (_, i) => {
    const x = i - half, angle = Math.PI * cutoff * x;
    return (x ? Math.sin(angle) / angle : 1) * bessel(beta * Math.sqrt(1 - (x / half) ** 2));
  });
  const sum = taps.reduce((total, tap) => total + tap, 0);
  return taps.map((tap) => tap / sum);
}

function bessel(x) { // of the first kind, modified, order 0: its power series
  let term = 1, sum = 1;
  for (let k = 1; term > 1e-17 * sum; k++) {
    term *= (x / (2 * k)) ** 2;
    sum += term;
  }
  return sum;
}

function gcd(a, b) {
  return b ? gcd(b, a % b) : a;
}

// Samples of the microphone at 16 kHz, in chunks, until the returned function is called.
export async function listen(take) {
  const media = await navigator.mediaDevices.getUserMedia({
    audio: { channelCount: 1, echoCancellation: false, noiseSuppression: false, autoGainControl: false },
  });
  const context = new AudioContext({ sampleRate: RATE_HZ });
  await context.audioWorklet.addModule("./microphone.js");
  const tap = new AudioWorkletNode(context, "tap");
  tap.port.onmessage = (message) => take(message.data);
  context.createMediaStreamSource(media).connect(tap);
  return async () => {
    media.getTracks().forEach((track) => track.stop());
    await context.close();
  };
}
