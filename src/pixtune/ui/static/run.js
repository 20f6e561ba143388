// A run, live: the server sends its state after each change; curves, samples and console follow when they are new.
"use strict";
(function () {
  const run = document.getElementById("run"), place = run.dataset.place;
  const get = (id) => document.getElementById(id);
  let source = null, numSamples = -1, drawnAt = 0, waiting = null, starting = null;

  function show(view) {
    document.title = `${view.share != null && view.is_alive ? Math.floor(100 * view.share) + "% · " : ""}${document.title.replace(/^\d+% · /, "").replace(/:.*·/, `: ${view.state} ·`)}`;
    get("state").textContent = view.state;
    get("state").className = `state ${view.state.replace(" ", "-")}`;
    if (get("words").textContent !== view.words) get("words").textContent = view.words;
    get("progress").value = view.share ?? 0;
    get("n-step").textContent = view.num_steps ? `${view.step} of ${view.num_steps}` : view.step;
    get("n-loss").textContent = charts.number(view.loss);
    get("n-held").textContent = charts.number(view.held_out);
    get("n-best").textContent = view.best_step == null ? "–" : `${charts.number(view.best_loss)} at ${view.best_step}`;
    get("n-pace").textContent = view.seconds_per_step == null ? "–" : view.seconds_per_step < 0.995 ? `${Math.round(1000 * view.seconds_per_step)} ms` : `${view.seconds_per_step.toPrecision(3)} s`;
    get("n-left").textContent = view.left || "–";
    get("n-memory").textContent = view.peak_memory_gib == null ? "no GPU" : `${view.peak_memory_gib.toFixed(1)} GiB`;
    get("gpu").hidden = !view.gpu;
    if (view.gpu) get("n-gpu").textContent = [view.gpu.temperature_celsius == null ? null : `${view.gpu.temperature_celsius} °C`, view.gpu.used_gib == null ? null : `${view.gpu.used_gib.toFixed(1)} GiB`].filter(Boolean).join(", ");
    get("error").hidden = !view.error;
    get("error").querySelector("pre").textContent = view.error || "";
    get("warnings").hidden = !view.warnings.length;
    get("warnings").querySelector("ul").replaceChildren(...view.warnings.map((text) => Object.assign(document.createElement("li"), { textContent: text })));
    const begun = view.is_alive && view.state !== "starting";
    const shown = { sample_now: begun, save_now: begun, pause: begun && view.state !== "paused", go_on: view.state === "paused", stop_now: view.is_alive, resume: view.can_resume };
    for (const button of document.querySelectorAll("[data-ask]")) {
      button.hidden = !shown[button.dataset.ask];
      button.disabled = view.requests.includes(button.dataset.ask) && button.dataset.ask !== "pause";
    }
    const asked = view.requests.map((each) => ({ sample_now: "samples", save_now: "a checkpoint", stop_now: "a stop", pause: view.state === "paused" ? null : "a pause" }[each])).filter(Boolean);
    get("waiting").hidden = !asked.length;
    get("waiting").textContent = asked.length ? `Asked for ${asked.join(" and ")}: it answers after the next step that is logged.` : "";
    if (view.num_samples !== numSamples) {
      if (numSamples >= 0) document.body.dispatchEvent(new Event("samples"));
      numSamples = view.num_samples;
    }
    clearTimeout(starting);
    if (view.state === "starting") starting = setTimeout(open, 3000); // its files tell nothing of a process that ends before them
    // Curves and console at most every two seconds, whatever the pace of the run.
    clearTimeout(waiting);
    waiting = setTimeout(refresh, Math.max(0, 2000 - (Date.now() - drawnAt)));
  }

  async function refresh() {
    drawnAt = Date.now();
    try {
      const [figures, text] = await Promise.all([
        fetch(`/figures/${place}`, { headers: { accept: "application/json" } }).then((answer) => answer.json()),
        fetch(`/console/${place}`).then((answer) => answer.text()),
      ]);
      if (figures.curves) {
        const parent = get("charts");
        parent.querySelector(".waiting")?.closest("figure").remove();
        const specs = charts.ofRun(figures).filter((spec) => spec.series.some((each) => each.points.length));
        const holders = specs.map((spec) => charts.figure(parent, spec.id)); // all of them first: they share the width
        specs.forEach((spec, number) => charts.draw(holders[number], spec));
      }
      const log = get("console");
      const atEnd = log.scrollTop + log.clientHeight > log.scrollHeight - 30;
      if (text && log.textContent !== text) { log.textContent = text; if (atEnd) log.scrollTop = log.scrollHeight; }
    } catch { /* the stream tells that the server is gone */ }
  }

  document.addEventListener("click", async (event) => {
    const button = event.target.closest("[data-ask]");
    if (!button) return;
    button.disabled = true;
    try {
      const values = await pixtune.send(`/ask/${place}`, { what: button.dataset.ask });
      if (values.is_queued) location.href = "/queue";
      else if (button.dataset.ask === "resume") setTimeout(open, 300);
    } finally { button.disabled = false; }
  });

  // A hidden page keeps no stream: browsers allow six connections to a server.
  function open() {
    source?.close();
    source = new EventSource(`/events/${place}`);
    source.addEventListener("state", (event) => show(JSON.parse(event.data)));
  }
  document.addEventListener("visibilitychange", () => { if (document.hidden) { source?.close(); source = null; } else open(); });
  document.addEventListener("DOMContentLoaded", () => {
    show(JSON.parse(run.dataset.first));
    const log = get("console");
    log.scrollTop = log.scrollHeight;
    if (!document.hidden) open();
  });
})();
