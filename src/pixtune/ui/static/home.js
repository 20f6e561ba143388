// The form of a new run: where its pictures come from.
"use strict";
(function () {
  const form = document.querySelector(".new form");
  const browser = document.getElementById("browser");
  const pictures = document.getElementById("pictures");
  function choose() {
    const source = new FormData(form).get("source");
    browser.hidden = source !== "folder";
    if (source !== "folder") pictures.value = "";
    if (source === "folder" && !browser.dataset.open) {
      browser.dataset.open = "yes";
      document.body.dispatchEvent(new Event("browse"));
    }
  }
  form.addEventListener("change", choose);
  document.addEventListener("click", (event) => {
    const entry = event.target.closest("[data-place]");
    if (entry) pictures.value = entry.dataset.place;
  });
  addEventListener("load", choose); // htmx listens by then
})();
