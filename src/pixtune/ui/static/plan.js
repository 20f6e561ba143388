// The plan: every change of a field goes into the YAML at once, and the plan is made anew.
"use strict";
(function () {
  const parts = document.getElementById("plan-parts");
  const config = () => parts.querySelector("[data-config]").dataset.config;
  const card = () => parts.querySelector("#card").value;

  parts.addEventListener("change", (event) => {
    const key = event.target.dataset.key;
    if (key) {
      htmx.ajax("POST", `/plan/${config()}`, { target: "#plan-parts", values: { key, value: event.target.value, card: card() } });
    } else if (event.target.id === "card") {
      location.search = card() ? `?card=${encodeURIComponent(card())}` : "";
    } else if (event.target.matches(".load-yaml") && event.target.files[0]) {
      event.target.files[0].text().then((text) => { parts.querySelector("#yaml").value = text; pixtune.say("Loaded: look at it, then save it"); });
    }
  });
  parts.addEventListener("click", (event) => {
    if (event.target.closest(".copy-yaml")) pixtune.copy(parts.querySelector("#yaml").value);
  });
  parts.addEventListener("input", (event) => {
    if (event.target.id !== "key-filter") return;
    const word = event.target.value.toLowerCase().trim();
    parts.querySelectorAll("#all-keys .section").forEach((section) => {
      let found = 0;
      section.querySelectorAll(".field").forEach((field) => {
        field.hidden = !field.dataset.words.includes(word);
        found += !field.hidden;
      });
      section.hidden = !found;
      section.open = Boolean(word && found);
    });
  });
  // What is open stays open, and the focus stays where it was, when the parts are replaced.
  let open = [], focused = "", scroll = 0;
  document.body.addEventListener("htmx:beforeSwap", (event) => {
    if (event.detail.target !== parts) return;
    open = [...parts.querySelectorAll("details[open] > summary")].map((each) => each.textContent.trim().split(/\s\d/)[0]);
    focused = document.activeElement?.id || "";
    scroll = parts.querySelector(".plan").scrollTop;
  });
  document.body.addEventListener("htmx:afterSwap", (event) => {
    if (event.detail.target !== parts) return;
    parts.querySelectorAll("details > summary").forEach((each) => { if (open.includes(each.textContent.trim().split(/\s\d/)[0])) each.parentElement.open = true; });
    parts.querySelector(".plan").scrollTop = scroll;
    document.getElementById(focused)?.focus({ preventScroll: true });
  });
})();
