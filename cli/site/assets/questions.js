"use strict";
// Questions: a number, or a product nobody has multiplied out, held to the model's own within its tolerance.

fasim.arithmetic = function (text) {
  const tokens = text.match(/\d+\.?\d*(?:e[-+]?\d+)?|\.\d+(?:e[-+]?\d+)?|\*\*|[-+*/()]|\S/gi) || [];
  let at = 0;
  const take = (...wanted) => (wanted.includes(tokens[at]) ? tokens[at++] : null);
  function sum() {
    let value = product();
    for (let sign; (sign = take("+", "-"));) value = sign === "+" ? value + product() : value - product();
    return value;
  }
  function product() {
    let value = signed();
    for (let sign; (sign = take("*", "/"));) value = sign === "*" ? value * signed() : value / signed();
    return value;
  }
  function signed() {
    const sign = take("+", "-");
    return sign ? (sign === "-" ? -signed() : signed()) : power();
  }
  function power() {
    const base = atom();
    return take("**") ? base ** signed() : base;
  }
  function atom() {
    if (take("(")) {
      const value = sum();
      return take(")") ? value : NaN;
    }
    return /^[\d.]/.test(tokens[at] || "") ? Number(tokens[at++]) : NaN;
  }
  const value = sum();
  return at === tokens.length && Number.isFinite(value) ? value : NaN;
};

// The number an answer stands for: "8.6", "8,600", "8.6 GB" where GB was asked for, "4 * 2**10"; NaN for anything else.
fasim.answer = function (text, unit) {
  text = text.trim().replaceAll("^", "**").replaceAll("−", "-");
  if (unit && text.toLowerCase().endsWith(unit.toLowerCase())) text = text.slice(0, -unit.length);
  else if (text.endsWith("%")) text = text.slice(0, -1);
  if (text.length > 200 || (text.split(",").length === 2 && !text.includes(".") && text.split(",")[1].trim().length !== 3)) return NaN;
  return fasim.arithmetic(text.replaceAll(",", "").trim());
};

(function () {
  for (const form of document.querySelectorAll(".question")) {
    const found = fasim.data.questions[form.dataset.key], field = form.querySelector("input"), place = form.querySelector(".verdict");
    const said = fasim.data.lesson, tell = (word, kind, text) => place.replaceChildren(fasim.make("b", { class: kind }, word), ` ${text}`);
    const solved = () => {
      form.classList.add("right");
      const kept = new Set((fasim.kept(said) || "").split(" ").filter(Boolean));
      fasim.keep(said, [...kept.add(form.dataset.key)].join(" "));
    };
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      const given = fasim.answer(field.value, found.unit);
      if (Number.isNaN(given)) return tell("No number.", "no", "Give one, such as 8.6, or what to compute, as 4 * 2**10.");
      if (Math.abs(given - found.answer) > found.tolerance * Math.abs(found.answer) + 1e-12) return tell("Not yet.", "no", found.hint);
      tell("Right.", "yes", found.why);
      solved();
    });
    form.querySelector(".hint").addEventListener("click", () => tell("Hint.", "", found.hint));
    form.querySelector(".show").addEventListener("click", () => tell(`It is ${found.shown}.`, "", found.why));
    if ((fasim.kept(said) || "").split(" ").includes(form.dataset.key)) form.classList.add("right");
  }
  for (const place of document.querySelectorAll("[data-kept]")) {
    const done = (fasim.kept(place.dataset.kept) || "").split(" ").filter(Boolean).length, of = Number(place.dataset.of);
    if (done) place.textContent = done >= of ? "done" : `${done} of ${of}`;
  }
})();
