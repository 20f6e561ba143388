// Before the first paint: light or dark by the system's setting, or by the choice made here.
"use strict";
(function () {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  window.pixtuneTheme = {
    get choice() { try { return localStorage.getItem("theme") || "system"; } catch { return "system"; } },
    set choice(value) { try { localStorage.setItem("theme", value); } catch { /* a browser without storage */ } this.apply(); },
    apply() {
      const value = this.choice === "system" ? (dark.matches ? "dark" : "light") : this.choice;
      document.documentElement.dataset.theme = value;
      document.dispatchEvent(new Event("theme"));
    },
  };
  window.pixtuneTheme.apply();
  dark.addEventListener("change", () => window.pixtuneTheme.apply());
})();
