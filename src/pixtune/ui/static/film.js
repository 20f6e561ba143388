// The filmstrip: one slider over the steps for all prompts, large pictures, the best step marked.
"use strict";
(function () {
  let strength = null; // strength that was chosen by hand
  let chosen = null; // step that was chosen by hand; null: the newest
  function show() {
    const film = document.querySelector(".film");
    if (!film) return;
    const all = JSON.parse(film.dataset.strips), best = film.dataset.best;
    const byStrength = film.querySelector("#at-strength");
    let strips = all;
    if (byStrength) {
      const values = JSON.parse(byStrength.dataset.values);
      if (strength !== null && values.includes(strength)) byStrength.value = values.indexOf(strength);
      const value = values[byStrength.value];
      film.querySelector("#at-strength-out").textContent = value;
      byStrength.setAttribute("aria-valuetext", value);
      strips = all.filter((strip) => strip.strength === value);
    }
    const slider = film.querySelector("#at-step");
    const steps = strips[0].samples.map((sample) => sample.step);
    slider.max = steps.length - 1;
    if (chosen !== null && steps.includes(chosen)) slider.value = steps.indexOf(chosen);
    const step = steps[slider.value];
    const words = `step ${step}${String(step) === best ? ", best" : ""}`;
    film.querySelector("#at-step-out").textContent = words;
    slider.setAttribute("aria-valuetext", words);
    const viewer = film.querySelector("#viewer");
    while (viewer.children.length > strips.length) viewer.lastChild.remove();
    strips.forEach((strip, number) => {
      let figure = viewer.children[number];
      if (!figure) {
        figure = document.createElement("figure");
        figure.append(document.createElement("img"), document.createElement("figcaption"));
        viewer.append(figure);
      }
      const sample = strip.samples.find((each) => each.step === step) || strip.samples.at(-1);
      const img = figure.querySelector("img");
      if (img.getAttribute("src") !== `${sample.thumb}?edge=1280`) img.src = `${sample.thumb}?edge=1280`;
      img.alt = `${strip.prompt}, step ${sample.step}`;
      figure.querySelector("figcaption").textContent = `${strip.prompt} · ${strip.detail}`;
    });
  }
  document.addEventListener("input", (event) => {
    if (event.target.id === "at-strength") {
      strength = JSON.parse(event.target.dataset.values)[event.target.value];
      show();
    }
    if (event.target.id !== "at-step") return;
    const film = document.querySelector(".film");
    const steps = JSON.parse(film.dataset.strips)[0].samples.map((sample) => sample.step);
    chosen = Number(event.target.value) === steps.length - 1 ? null : steps[event.target.value];
    show();
  });
  document.addEventListener("click", (event) => {
    const frame = event.target.closest(".frame"), large = document.getElementById("large");
    if (!frame || !large) return;
    const img = Object.assign(document.createElement("img"), { src: frame.dataset.large, alt: frame.dataset.words });
    large.querySelector(".large-pictures").replaceChildren(img);
    large.querySelector("figcaption").textContent = frame.dataset.words;
    large.showModal();
  });
  document.addEventListener("DOMContentLoaded", () => {
    show();
    document.body.addEventListener("htmx:afterSwap", show);
  });
})();
