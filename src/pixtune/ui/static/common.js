// What every page uses: messages, requests that report their errors, colours, copying.
"use strict";
const pixtune = {
  say(text, bad = false) {
    const toast = document.createElement("div");
    toast.className = bad ? "toast bad" : "toast";
    toast.textContent = text;
    document.getElementById(bad ? "alerts" : "messages").append(toast);
    setTimeout(() => toast.remove(), bad ? 12000 : 3500);
  },
  // Sends fields as a form and returns the answer's values; an error is shown, and thrown.
  async send(url, fields, options = {}) {
    const headers = { accept: "application/json", "x-pixtune": "fetch" };
    let response;
    try {
      response = await fetch(url, { method: "POST", headers, body: new URLSearchParams(fields), ...options });
    } catch (error) {
      pixtune.say("The server cannot be reached: is pixtune ui still running? Nothing was saved just now.", true);
      throw error;
    }
    const values = await response.json().catch(() => ({}));
    if (!response.ok) {
      const text = [values.error || `error ${response.status}`, ...(values.faults || [])].join(" ");
      if (!options.quiet) pixtune.say(text, true);
      throw Object.assign(new Error(text), { status: response.status });
    }
    return values;
  },
  async copy(text) {
    try {
      await navigator.clipboard.writeText(text);
    } catch { // not over plain HTTP from another machine
      const area = document.createElement("textarea");
      area.value = text;
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    pixtune.say("Copied");
  },
};
document.addEventListener("click", (event) => {
  const code = event.target.closest("code.copy");
  if (code) pixtune.copy(code.textContent);
});
(function () {
  const button = document.getElementById("theme");
  const names = ["system", "light", "dark"];
  const words = { system: "as the system has them", light: "light", dark: "dark" };
  const show = () => {
    button.textContent = { system: "◐", light: "☀", dark: "☾" }[pixtuneTheme.choice];
    button.setAttribute("aria-label", `Colours: ${words[pixtuneTheme.choice]}`);
    button.title = button.getAttribute("aria-label");
  };
  button.addEventListener("click", () => {
    pixtuneTheme.choice = names[(names.indexOf(pixtuneTheme.choice) + 1) % 3];
    show();
  });
  show();
  // Errors of htmx's own requests are shown as ours are.
  document.body.addEventListener("htmx:beforeSwap", (event) => {
    if (event.detail.xhr.status >= 400) {
      event.detail.shouldSwap = false;
      const page = new DOMParser().parseFromString(event.detail.xhr.responseText, "text/html");
      pixtune.say(page.body.textContent.trim() || `error ${event.detail.xhr.status}`, true);
    }
  });
  document.body.addEventListener("htmx:sendError", () => pixtune.say("The server cannot be reached: is pixtune ui still running?", true));
})();
