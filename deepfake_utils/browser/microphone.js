// Hands what the microphone records to the page, a quarter of a second at a time.

registerProcessor("tap", class extends AudioWorkletProcessor {
  waiting = new Float32Array(4096);
  n = 0;

  process([[samples]]) {
    if (samples) {
      this.waiting.set(samples, this.n);
      this.n += samples.length;
      if (this.n === this.waiting.length) {
        this.port.postMessage(this.waiting.slice());
        this.n = 0;
      }
    }
    return true;
  }
});
