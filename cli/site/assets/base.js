"use strict";
// What all pages share: the theme, the page's data, numbers as text, elements.

const fasim = {
  data: JSON.parse(document.getElementById("data").textContent),

  number: (value) => Math.round(value).toLocaleString("en-US"),

  // Three digits and a unit, as everywhere in fasim.
  bytes(value) {
    for (const [factor, prefix] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"], [1, ""]]) {
      if (value >= factor * 0.9995) {
        const of = value / factor;
        return `${of >= 99.95 ? fasim.number(of) : of.toFixed(of >= 9.995 ? 1 : 2)} ${prefix}B`;
      }
    }
    return "-";
  },

  // An element with attributes and children; a function is a listener.
  make(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (typeof value === "function") made.addEventListener(name, value);
      else made.setAttribute(name, value);
    }
    made.append(...children);
    return made;
  },

  colour: (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim(),

  // A canvas as sharp as the screen: its context, and width and height in CSS pixels.
  sheet(canvas, height) {
    const width = canvas.clientWidth, dense = window.devicePixelRatio || 1;
    canvas.style.height = `${height}px`;
    canvas.width = Math.round(width * dense);
    canvas.height = Math.round(height * dense);
    const pen = canvas.getContext("2d");
    pen.setTransform(dense, 0, 0, dense, 0, 0);
    return [pen, width];
  },

  // Storage that a browser may refuse, as for files.
  kept(name) { try { return localStorage.getItem(`fasim.${name}`); } catch { return null; } },
  keep(name, value) { try { localStorage.setItem(`fasim.${name}`, value); } catch { /* not kept */ } },
};

(function theme() {
  const root = document.documentElement, button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const asked = () => fasim.kept("theme") || (system.matches ? "dark" : "light");
  function show(which) {
    root.dataset.theme = which;
    button.textContent = which === "dark" ? "light page" : "dark page";
    document.dispatchEvent(new Event("theme"));
  }
  button.addEventListener("click", () => {
    const which = root.dataset.theme === "dark" ? "light" : "dark";
    fasim.keep("theme", which);
    show(which);
  });
  system.addEventListener("change", () => show(asked()));
  show(asked());
})();
