// Curves of several runs in the same charts.
"use strict";
document.addEventListener("DOMContentLoaded", () => {
  const holder = document.getElementById("compared");
  const runs = JSON.parse(holder.dataset.runs);
  const points = (list) => (list || []).map((each) => [each.step, each.loss]);
  const lines = (value) => runs.map((run, number) => ({ label: run.name, color: number, points: value(run.figures || {}) }));
  const specs = [
    { id: "compare-held", title: "Held-out loss", unit: "mean square error of the velocity", series: lines((figures) => points(figures.validations)) },
    { id: "compare-loss", title: "Training loss", unit: "mean square error of the velocity", series: lines((figures) => figures.curves?.loss || []) },
    { id: "compare-pace", title: "Time of a step", unit: "seconds", fromZero: true, series: lines((figures) => figures.curves?.seconds || []) },
  ];
  const holders = specs.map((spec) => charts.figure(holder, spec.id));
  specs.forEach((spec, number) => charts.draw(holders[number], spec));
});
