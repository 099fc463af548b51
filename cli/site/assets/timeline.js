"use strict";
// Timelines: rows of spans on one axis of SM cycles, zoomed, hovered and scrubbed; several schedules share axis and cursor.

(function () {
  const ROW = 22, GAP = 4, APART = 12, STRIP = 5, AXIS = 24, LEAST = 60;
  const GEMM = 0, ON_COPY = 3, ON_TURN = 5; // kinds of a span; from ON_COPY on it is a wait
  const [START, LENGTH, LABEL, STEP, GROUP, KIND, FILL] = [0, 1, 2, 3, 4, 5, 6];

  class Timeline {
    constructor(host, found) {
      this.host = host;
      this.found = found;
      this.end = Math.max(...found.panels.map((panel) => panel.end));
      this.from = Math.min(...found.panels.map((panel) => panel.start));
      this.view = [...found.view];
      this.cursor = null;
      this.pointers = new Map();
      this.build();
      new ResizeObserver(() => this.draw()).observe(host);
      document.addEventListener("theme", () => this.draw());
    }

    build() {
      const { make } = fasim;
      const button = (text, what, act) => make("button", { type: "button", "aria-label": what, title: what, click: act }, text);
      this.shown = make("output");
      this.host.append(make("div", { class: "controls" },
        button("−", "zoom out", () => this.zoom(1.6)), button("+", "zoom in", () => this.zoom(1 / 1.6)),
        button("◀", "earlier", () => this.pan(-0.25)), button("▶", "later", () => this.pan(0.25)),
        button("whole", "all that was recorded", () => this.look(this.from, this.end)), this.shown));
      this.sheets = this.found.panels.map((panel, index) => {
        if (panel.name) this.host.append(make("h3", {}, panel.name, make("span", {}, `  ${panel.headline}`)));
        const canvas = make("canvas", {
          tabindex: 0, role: "img",
          "aria-label": `${panel.title}. Arrow keys move, plus and minus zoom, Home shows all.`,
        });
        this.listen(canvas, panel);
        this.host.append(canvas);
        return { canvas, panel, last: index === this.found.panels.length - 1 };
      });
      this.slider = make("input", {
        type: "range", min: this.from, max: this.end, step: 1, value: this.view[0], "aria-label": "cycle",
        input: () => this.scrub(Number(this.slider.value)),
      });
      this.at = make("output", {}, "move to read every row at one cycle");
      this.host.append(make("div", { class: "controls" }, make("label", { class: "wide" }, "cycle", this.slider), this.at));
      this.now = make("dl", { class: "now" });
      this.host.append(this.now, this.legend());
      this.tip = make("div", { class: "tip", hidden: "" });
      this.host.append(this.tip);
    }

    legend() {
      const items = this.found.legend.map(([fill, text]) => {
        const swatch = fasim.make("i");
        swatch.style.background = fill;
        return fasim.make("span", {}, ...(fill === "transparent" ? [] : [swatch]), text);
      });
      return fasim.make("div", { class: "legend" }, ...items);
    }

    // -- what is seen ---------------------------------------------------------------------------------------------------

    look(start, end) {
      const length = Math.min(Math.max(end - start, LEAST), this.end - this.from);
      start = Math.min(Math.max(start, this.from), this.end - length);
      this.view = [start, start + length];
      this.draw();
    }

    pan(share) {
      const by = share * (this.view[1] - this.view[0]);
      this.look(this.view[0] + by, this.view[1] + by);
    }

    zoom(factor, around) {
      const [start, end] = this.view;
      const at = around ?? (this.cursor !== null && this.cursor > start && this.cursor < end ? this.cursor : (start + end) / 2);
      const length = Math.min(Math.max((end - start) * factor, LEAST), this.end - this.from);
      const left = at - (at - start) / (end - start) * length;
      this.look(left, left + length);
    }

    scrub(cycle) {
      this.cursor = Math.round(cycle);
      this.slider.value = this.cursor;
      this.at.textContent = fasim.number(this.cursor);
      const length = this.view[1] - this.view[0];
      if (cycle < this.view[0] || cycle > this.view[1]) this.look(cycle - length / 2, cycle + length / 2);
      this.tell();
      this.draw();
    }

    tell() {
      const several = this.found.panels.length > 1;
      const lines = this.found.panels.flatMap((panel) => panel.rows.map((row) => {
        const span = under(row, this.cursor);
        const name = several ? `${panel.name} ${row.name}` : row.name;
        return fasim.make("div", {}, fasim.make("dt", {}, name), fasim.make("dd", {}, span ? this.what(span) : "idle"));
      }));
      this.now.replaceChildren(...lines);
    }

    what(span) {
      const label = this.found.labels[span[LABEL]][0];
      return (span[KIND] >= ON_COPY ? "waits: " : "") + label + (span[STEP] >= 0 ? ` [${span[STEP]}]` : "");
    }

    // -- drawing --------------------------------------------------------------------------------------------------------

    draw() {
      if (!this.host.clientWidth) return;
      this.inks = Object.fromEntries(["ink", "muted", "grid", "band", "paper", "bad"].map((name) => [name, fasim.colour(name)]));
      for (const sheet of this.sheets) this.panel(sheet);
      this.shown.textContent = `cycles ${fasim.number(this.view[0])} to ${fasim.number(this.view[1])}`;
      this.host.dataset.view = this.view.map(Math.round).join("-");
      this.host.dataset.cursor = this.cursor ?? "";
    }

    x(cycle) {
      return this.left + (cycle - this.view[0]) * (this.right - this.left) / (this.view[1] - this.view[0]);
    }

    cycle(x) {
      return this.view[0] + (x - this.left) * (this.view[1] - this.view[0]) / (this.right - this.left);
    }

    panel({ canvas, panel, last }) {
      let y = 4;
      const tops = panel.rows.map((row, n) => {
        if (n && panel.rows[n - 1].kind !== row.kind) y += APART;
        const top = y;
        y += ROW + GAP + (row.covered ? STRIP : 0);
        return top;
      });
      const [pen, width] = fasim.sheet(canvas, y + (last ? AXIS : 0));
      canvas.tops = tops;
      pen.font = "11.5px system-ui, Helvetica, Arial, 'DejaVu Sans', sans-serif";
      const names = this.found.panels.flatMap((each) => each.rows.map((row) => pen.measureText(row.name).width));
      this.left = Math.ceil(Math.max(...names)) + 10;
      this.right = width - (panel.rows.some((row) => row.idle !== null) ? 36 : 8);
      canvas.edges = [this.left, this.right];
      pen.clearRect(0, 0, width, y + AXIS);
      this.axis(pen, y, last);
      panel.rows.forEach((row, n) => this.row(pen, panel, row, tops[n]));
      this.edges(pen, panel, y);
    }

    axis(pen, bottom, last) {
      const { grid, muted } = this.inks;
      pen.textAlign = "center";
      pen.textBaseline = "top";
      for (const tick of ticks(this.view, Math.max(2, (this.right - this.left) / 80))) {
        const x = this.x(tick);
        pen.fillStyle = grid;
        pen.fillRect(x, 0, 1, bottom);
        const text = fasim.number(tick), half = pen.measureText(text).width / 2;
        pen.fillStyle = muted;
        if (last) pen.fillText(text, Math.min(x, this.right + 6 - half), bottom + 6);
      }
    }

    row(pen, panel, row, top) {
      const { ink, muted, band } = this.inks;
      pen.textBaseline = "middle";
      pen.textAlign = "right";
      pen.fillStyle = row.kind === "warp" ? ink : muted;
      pen.fillText(row.name, this.left - 6, top + ROW / 2);
      pen.fillStyle = band;
      pen.fillRect(this.left, top, this.right - this.left, ROW);
      pen.save();
      pen.beginPath();
      pen.rect(this.left, top - 1, this.right - this.left, ROW + STRIP + 2);
      pen.clip();
      for (const span of row.spans) {
        const left = this.x(span[START]), right = this.x(span[START] + span[LENGTH]);
        if (right >= this.left && left <= this.right) this.span(pen, row, span, left, Math.max(right, left + 0.5), top);
      }
      if (row.covered) {
        for (const [start, end, fill] of panel.covers[row.covered]) {
          pen.fillStyle = fill;
          pen.fillRect(this.x(start), top + ROW + 1, Math.max(this.x(end) - this.x(start), 0.5), STRIP - 1);
        }
      }
      pen.restore();
      if (row.idle !== null) {
        pen.fillStyle = muted;
        pen.fillText(`${Math.round(100 * row.idle)}%`, this.right + 34, top + ROW / 2);
      }
    }

    span(pen, row, span, left, right, top) {
      if (span[KIND] >= ON_COPY) {
        pen.strokeStyle = span[KIND] === ON_TURN ? "#d9622b" : this.inks.muted;
        pen.setLineDash(span[KIND] === ON_COPY ? [2, 3] : span[KIND] === ON_TURN ? [7, 4] : []);
        pen.lineWidth = span[KIND] === ON_TURN ? 2 : 1.2;
        pen.beginPath();
        pen.moveTo(left, top + ROW / 2);
        pen.lineTo(right, top + ROW / 2);
        pen.stroke();
        pen.setLineDash([]);
        return;
      }
      const fill = this.found.fills[span[FILL]];
      pen.fillStyle = fill;
      pen.fillRect(left, top, right - left, ROW);
      if (row.kind === "warp" && span[KIND] === GEMM) {
        pen.strokeStyle = this.inks.ink;
        pen.lineWidth = 1.3;
        pen.strokeRect(left + 0.7, top + 0.7, Math.max(right - left - 1.4, 0), ROW - 1.4);
      }
      const [, letter, stepped] = this.found.labels[span[LABEL]];
      const text = letter + (stepped && span[STEP] >= 0 ? span[STEP] : "");
      const from = Math.max(left, this.left), until = Math.min(right, this.right);
      if (until - from > pen.measureText(text).width + 4) {
        pen.fillStyle = dark(fill) ? "#ffffff" : "#1b1d21";
        pen.textAlign = "center";
        pen.fillText(text, (from + until) / 2, top + ROW / 2 + 0.5);
        pen.textAlign = "right";
      }
    }

    edges(pen, panel, bottom) {
      if (panel.end < this.end && panel.end >= this.view[0] && panel.end <= this.view[1]) {
        pen.fillStyle = this.inks.muted;
        pen.fillRect(this.x(panel.end), 0, 2, bottom);
        pen.textAlign = "left";
        const done = `done: ${fasim.number(panel.end)}`;
        if (this.x(panel.end) + pen.measureText(done).width + 6 < this.right) pen.fillText(done, this.x(panel.end) + 6, 14);
      }
      if (this.cursor !== null && this.cursor >= this.view[0] && this.cursor <= this.view[1]) {
        pen.fillStyle = this.inks.bad;
        pen.fillRect(this.x(this.cursor) - 0.75, 0, 1.5, bottom);
      }
    }

    // -- pointer and keys -----------------------------------------------------------------------------------------------

    listen(canvas, panel) {
      const keys = {
        ArrowLeft: () => this.pan(-0.1), ArrowRight: () => this.pan(0.1), "+": () => this.zoom(1 / 1.6), "=": () => this.zoom(1 / 1.6),
        "-": () => this.zoom(1.6), Home: () => this.look(this.from, this.end), Escape: () => this.hide(),
      };
      canvas.addEventListener("keydown", (event) => {
        if (!keys[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
        event.preventDefault();
        keys[event.key]();
      });
      canvas.addEventListener("wheel", (event) => {
        if (!event.ctrlKey && !event.shiftKey) return; // the page scrolls
        event.preventDefault();
        this.zoom(Math.exp((event.deltaY || event.deltaX) / 300), this.cycle(event.offsetX));
      }, { passive: false });
      canvas.addEventListener("pointerdown", (event) => {
        canvas.setPointerCapture(event.pointerId);
        this.pointers.set(event.pointerId, event.offsetX);
        this.moved = 0;
      });
      canvas.addEventListener("pointermove", (event) => this.move(event, canvas, panel));
      canvas.addEventListener("pointerup", (event) => {
        if (this.pointers.size === 1 && this.moved < 4) {
          const at = this.cycle(event.offsetX);
          if (at >= this.view[0] && at <= this.view[1]) this.scrub(at);
        }
        this.pointers.delete(event.pointerId);
      });
      canvas.addEventListener("pointercancel", (event) => this.pointers.delete(event.pointerId));
      canvas.addEventListener("pointerleave", () => this.hide());
    }

    move(event, canvas, panel) {
      const before = this.pointers.get(event.pointerId);
      if (before === undefined) return this.hover(event, canvas, panel);
      const by = event.offsetX - before, others = [...this.pointers].filter(([id]) => id !== event.pointerId).map(([, x]) => x);
      this.moved += Math.abs(by);
      this.pointers.set(event.pointerId, event.offsetX);
      this.hide();
      if (others.length) {
        const apart = Math.abs(event.offsetX - others[0]), was = Math.abs(before - others[0]);
        if (apart > 8 && was > 8) this.zoom(was / apart, this.cycle((event.offsetX + others[0]) / 2));
      } else if (this.moved >= 4) {
        const cycles = by * (this.view[1] - this.view[0]) / (this.right - this.left);
        this.look(this.view[0] - cycles, this.view[1] - cycles);
      }
    }

    hover(event, canvas, panel) {
      const number = canvas.tops.findLastIndex((top) => top <= event.offsetY);
      const row = panel.rows[number], cycle = this.cycle(event.offsetX);
      const span = row && event.offsetY <= canvas.tops[number] + ROW && event.offsetX >= this.left ? under(row, cycle) : null;
      if (!span) return this.hide();
      const lines = [this.what(span), row.name + (span[GROUP] >= 0 && row.kind === "unit" ? `, for ${panel.groups[span[GROUP]]}` : "")];
      const end = span[START] + span[LENGTH];
      lines.push(`cycles ${fasim.number(span[START])} to ${fasim.number(end)}: ${fasim.number(span[LENGTH])}`);
      const copy = row.kind === "unit" && panel.copies[this.found.labels[span[LABEL]][0]];
      if (copy) lines.push(`${fasim.bytes(copy[1])} ${copy[0]}, ${fasim.bytes(copy[2])} of them over HBM in the mean`);
      this.tip.replaceChildren(...lines.flatMap((line, n) => (n ? [document.createElement("br"), line] : [line])));
      this.tip.hidden = false;
      const x = canvas.offsetLeft + event.offsetX + 12;
      this.tip.style.left = `${Math.max(0, Math.min(x, this.host.clientWidth - this.tip.offsetWidth))}px`;
      this.tip.style.top = `${canvas.offsetTop + event.offsetY + 16}px`;
    }

    hide() {
      this.tip.hidden = true;
    }
  }

  // The span of a row at a cycle, work before waits.
  function under(row, cycle) {
    const there = row.spans.filter((span) => span[START] <= cycle && cycle < span[START] + span[LENGTH]);
    return there.find((span) => span[KIND] < ON_COPY) || there[0] || null;
  }

  function ticks([start, end], most) {
    let step = 1, turn = 0;
    while ((end - start) / step > most) step *= [2, 2.5, 2][turn++ % 3];
    const found = [];
    for (let at = Math.ceil(start / step) * step; at <= end; at += step) found.push(at);
    return found;
  }

  function dark(fill) {
    const [red, green, blue] = [1, 3, 5].map((at) => parseInt(fill.slice(at, at + 2), 16));
    return 0.3 * red + 0.59 * green + 0.11 * blue < 140;
  }

  for (const host of document.querySelectorAll(".timeline")) new Timeline(host, fasim.data.timelines[host.dataset.key]).draw();
})();
