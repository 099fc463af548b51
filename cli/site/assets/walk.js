"use strict";
// Walks over the tiles of S: played, stepped and scrubbed, with a meter for each level of memory and a slider for the block size.

(function () {
  const [KERNEL, HEAD, ROWS, COLUMN, PATTERN] = [0, 1, 2, 3, 4];
  const TALLEST = 352;

  class Walk {
    constructor(host, found) {
      this.host = host;
      this.found = found;
      this.timer = null;
      this.build();
      this.choose();
      new ResizeObserver(() => this.draw()).observe(this.canvas);
      document.addEventListener("theme", () => this.draw());
    }

    build() {
      const { make } = fasim, schedules = [...new Set(this.found.walks.map((walk) => walk.schedule))];
      this.schedule = make("select", { "aria-label": "schedule", change: () => this.choose() }, ...schedules.map((name) => make("option", {}, name)));
      this.causal = make("input", { type: "checkbox", change: () => this.choose() });
      this.size = make("input", { type: "range", min: 0, step: 1, "aria-label": "block size", input: () => this.choose() });
      this.sized = make("output");
      const top = make("div", { class: "controls" }, make("label", {}, "schedule", this.schedule));
      if (this.found.walks.some((walk) => walk.causal)) top.append(make("label", {}, this.causal, "causal"));
      top.append(make("label", { class: "wide" }, "block", this.size), this.sized);
      this.canvas = make("canvas", { class: "matrix", role: "img" });
      this.play = make("button", { type: "button", click: () => this.toggle() }, "play");
      const button = (text, what, by) => make("button", { type: "button", "aria-label": what, title: what, click: () => this.step(by) }, text);
      this.place = make("input", { type: "range", min: 0, step: 1, value: 0, "aria-label": "step", input: () => { this.stop(); this.go(Number(this.place.value)); } });
      this.count = make("output");
      const below = make("div", { class: "controls" }, this.play, button("◀", "step back", -1), button("▶", "step on", 1),
        make("label", { class: "wide" }, this.place), this.count);
      this.sentence = make("p", { class: "sentence" });
      this.meters = make("div", { class: "meters" });
      this.sums_by_size = make("div");
      this.host.append(top, below, make("div", { class: "seen" }, this.canvas, make("div", {}, this.sentence, this.meters)), this.sums_by_size);
    }

    // -- which walk, which step -----------------------------------------------------------------------------------------

    choose() {
      this.stop();
      const of = this.found.walks.filter((walk) => walk.schedule === this.schedule.value);
      const masked = of.some((walk) => walk.causal === this.causal.checked) ? this.causal.checked : of[0].causal;
      this.sizes = of.filter((walk) => walk.causal === masked).sort((one, other) => one.size - other.size);
      this.size.max = this.sizes.length - 1;
      this.size.disabled = this.sizes.length < 2;
      if (this.walk?.schedule !== this.schedule.value) {
        this.size.value = Math.max(0, this.sizes.findIndex((walk) => walk.usual));
      }
      this.walk = this.sizes[Math.min(Number(this.size.value), this.sizes.length - 1)];
      this.sized.textContent = `${this.walk.size} ${this.walk.sized}`;
      this.sums = [];
      let sum = [0, 0, 0, 0, 0];
      for (const step of this.walk.steps) this.sums.push(sum = sum.map((value, level) => value + this.walk.patterns[step[PATTERN]].bytes[level]));
      this.most = Math.max(...this.found.walks.filter((walk) => walk.schedule === this.walk.schedule && walk.causal === masked).flatMap((walk) => walk.totals));
      this.place.max = this.walk.steps.length - 1;
      this.compare();
      this.go(0);
    }

    // What each block size asks of L2 over the whole walk, to choose from.
    compare() {
      const { make } = fasim, level = 1, most = Math.max(...this.sizes.map((walk) => walk.totals[level]));
      const lines = this.sizes.flatMap((walk, place) => {
        const bar = make("div", { class: walk === this.walk ? "bar" : "bar other" });
        bar.style.width = `${100 * walk.totals[level] / most}%`;
        const choose = () => { this.size.value = place; this.choose(); };
        return [make("button", { type: "button", click: choose }, String(walk.size)), make("span", {}, bar),
          make("span", { class: "value" }, fasim.bytes(walk.totals[level]))];
      });
      const title = `${this.found.levels[level]} over the whole walk, by ${this.walk.sized}`;
      this.sums_by_size.replaceChildren(make("p", { class: "muted" }, title), make("div", { class: "bars" }, ...lines));
    }

    go(number) {
      this.number = Math.min(Math.max(number, 0), this.walk.steps.length - 1);
      this.place.value = this.number;
      this.count.textContent = `step ${this.number + 1} of ${this.walk.steps.length}`;
      this.host.dataset.step = this.number;
      this.host.dataset.total = this.sums[this.number].join(" ");
      this.draw();
      this.tell();
    }

    step(by) {
      this.stop();
      this.go(this.number + by);
    }

    toggle() {
      if (this.timer) return this.stop();
      if (this.number === this.walk.steps.length - 1) this.go(0);
      this.play.textContent = "stop";
      const pause = Math.min(500, Math.max(40, 20000 / this.walk.steps.length));
      this.timer = setInterval(() => {
        this.go(this.number + 1);
        if (this.number === this.walk.steps.length - 1) this.stop();
      }, pause);
    }

    stop() {
      clearInterval(this.timer);
      this.timer = null;
      this.play.textContent = "play";
    }

    // -- drawing --------------------------------------------------------------------------------------------------------

    draw() {
      const { walk, number } = this, width = this.canvas.clientWidth;
      if (!width) return;
      const cell = Math.max(3, Math.min((width - 30) / walk.columns, (TALLEST - 20) / walk.rows));
      const [pen] = fasim.sheet(this.canvas, Math.ceil(cell * walk.rows) + 22);
      const now = walk.steps[walk.kernels[walk.steps[number][KERNEL]] ? number : number - 1];
      const gap = cell > 7 ? 1.5 : 0.5;
      pen.font = "11.5px system-ui, Helvetica, Arial, 'DejaVu Sans', sans-serif";
      pen.fillStyle = fasim.colour("muted");
      pen.fillText("keys →", 20, 12);
      pen.save();
      pen.rotate(-Math.PI / 2);
      pen.textAlign = "right";
      pen.fillText("← queries", -20, 12);
      pen.restore();
      walk.steps.forEach((step, n) => {
        if (step[ROWS] < 0 || step[KERNEL] !== now[KERNEL] || step[HEAD] !== now[HEAD]) return;
        pen.fillStyle = fasim.colour(n === number ? "now" : n < number ? "done" : "come");
        pen.fillRect(20 + step[COLUMN] * cell, 20 + step[ROWS] * cell, cell - gap, cell - gap);
      });
      this.canvas.setAttribute("aria-label", `the matrix S in ${walk.rows} by ${walk.columns} tiles: ${this.what()}`);
    }

    what() {
      const { walk } = this, step = walk.steps[this.number], kernel = walk.kernels[step[KERNEL]];
      if (!kernel) return "done; what was stored and is still in L2 is written back to HBM";
      const at = walk.heads > 1 ? `${kernel}, head ${step[HEAD] + 1}: ` : `${kernel}: `;
      if (step[ROWS] < 0) return `${at}no query of its CTA sees a key here`;
      return `${at}queries ${step[ROWS] + 1} of ${walk.rows}, keys ${step[COLUMN] + 1} of ${walk.columns}`;
    }

    tell() {
      const { make } = fasim, pattern = this.walk.patterns[this.walk.steps[this.number][PATTERN]];
      this.sentence.textContent = `${this.what()}.`;
      const head = ["", "this step", "so far", ""].map((text, n) => make("span", { class: n === 3 ? "head bar-cell" : "head right" }, text));
      const lines = this.found.levels.flatMap((level, n) => {
        const bar = make("div", { class: "bar" });
        bar.style.width = `${100 * this.sums[this.number][n] / this.most}%`;
        const who = pattern.tensors[n];
        return [
          make("span", {}, level), make("span", { class: "right" }, fasim.bytes(pattern.bytes[n])),
          make("span", { class: "right total" }, fasim.bytes(this.sums[this.number][n])), make("span", { class: "bar-cell" }, bar),
          make("span", { class: "who" }, who || "\u00a0"),
        ];
      });
      this.meters.replaceChildren(...head, ...lines);
    }
  }

  // A few moments of a small matrix, stepped through.
  function frames(host, found) {
    const { make } = fasim, rows = make("div", { class: "cells" }), caption = make("p"), count = make("output");
    let number = 0;
    function go(to) {
      number = Math.min(Math.max(to, 0), found.frames.length - 1);
      const { cells, caption: said } = found.frames[number];
      rows.replaceChildren(...cells.map((row) => make("div", {}, ...[...row].map((sign) => make("i", { "data-sign": sign })))));
      caption.textContent = said;
      count.textContent = `${number + 1} of ${found.frames.length}`;
      host.dataset.frame = number;
    }
    const button = (text, what, by) => make("button", { type: "button", "aria-label": what, title: what, click: () => go(number + by) }, text);
    host.append(rows, make("div", { class: "controls" }, button("◀", "step back", -1), button("▶", "step on", 1), count), caption);
    go(0);
  }

  for (const host of document.querySelectorAll(".walk")) new Walk(host, fasim.data.walks[host.dataset.key]);
  for (const host of document.querySelectorAll(".frames")) frames(host, fasim.data.frames[host.dataset.key]);
})();
