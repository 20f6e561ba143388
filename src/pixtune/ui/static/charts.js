// Line charts with units, in the colours of the page; the same step axis for all.
"use strict";
const charts = (function () {
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const drawn = new Map(); // element -> {plot, spec}
  const number = (value) => value == null ? "–" : Math.abs(value) >= 1000 || (Math.abs(value) < 0.001 && value !== 0) ? value.toExponential(2) : String(+value.toPrecision(4));

  // One x axis for series whose steps differ: missing values are bridged.
  function join(series) {
    const steps = [...new Set(series.flatMap((each) => each.points.map((point) => point[0])))].sort((a, b) => a - b);
    const places = new Map(steps.map((step, index) => [step, index]));
    const columns = series.map((each) => {
      const column = new Array(steps.length).fill(null);
      for (const [step, value] of each.points) column[places.get(step)] = value;
      return column;
    });
    return [steps, ...columns];
  }

  function draw(holder, spec) {
    const series = spec.series.filter((each) => each.points.length);
    const old = drawn.get(holder);
    if (!series.length) { holder.hidden = true; return; }
    holder.hidden = false;
    const data = join(series);
    const shape = series.map((each) => each.label).join("|") + document.documentElement.dataset.theme;
    if (old && old.shape === shape && old.width === holder.clientWidth) { old.plot.setData(data); old.spec = spec; return; }
    if (old) { old.plot.destroy(); }
    holder.replaceChildren();
    const caption = document.createElement("figcaption");
    caption.textContent = spec.title + " ";
    const unit = document.createElement("span");
    unit.textContent = spec.unit;
    caption.append(unit);
    holder.append(caption);
    const axis = { stroke: css("--quiet"), grid: { stroke: css("--grid"), width: 1 }, ticks: { stroke: css("--grid"), width: 1 }, font: "12px system-ui, sans-serif" };
    const style = getComputedStyle(holder);
    const width = holder.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
    const plot = new uPlot({
      width, height: 240, scales: { x: { time: false }, y: { range: (u, low, high) => spec.fromZero ? [0, (high || 1) * 1.05] : low === high ? [low - 0.5, high + 0.5] : [low - (high - low) * 0.05, high + (high - low) * 0.05] } },
      cursor: { drag: { x: true, y: false } },
      axes: [{ ...axis, label: "step", labelFont: "12px system-ui, sans-serif", labelSize: 18, values: (u, ticks) => ticks.map((tick) => Number.isInteger(tick) ? tick.toLocaleString("en") : "") }, { ...axis, size: 62, values: (u, ticks) => ticks.map(number) }],
      series: [{ label: "step", value: (u, value) => value == null ? "–" : value.toLocaleString("en") }, ...series.map((each) => ({
        label: each.label, stroke: css(`--c${each.color}`), width: each.pale ? 1 : 2, spanGaps: true, alpha: each.pale ? 0.55 : 1,
        points: { show: each.points.length < 60 && !each.pale, size: 5, fill: css(`--c${each.color}`) }, value: (u, value) => number(value),
        ...(each.dash ? { dash: [6, 4] } : {}),
      }))],
    }, data, holder);
    const canvas = holder.querySelector("canvas");
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `${spec.title}, ${spec.unit}: ` + series.map((each) => `${each.label} ${number(each.points[0][1])} at step ${each.points[0][0]}, ${number(each.points.at(-1)[1])} at step ${each.points.at(-1)[0]}`).join("; "));
    drawn.set(holder, { plot, spec, shape, width: holder.clientWidth });
  }
  const again = () => { for (const [holder, { spec }] of [...drawn]) { if (holder.isConnected) draw(holder, spec); else drawn.delete(holder); } };
  document.addEventListener("theme", again);
  let waiting;
  addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(again, 150); });

  function figure(parent, id) {
    let holder = document.getElementById(id);
    if (!holder) { holder = Object.assign(document.createElement("figure"), { id, className: "chart" }); parent.append(holder); }
    return holder;
  }
  const quarterNames = ["σ below 1/4", "σ 1/4 to 1/2", "σ 1/2 to 3/4", "σ above 3/4"];
  // The charts of one run.
  function ofRun(figures) {
    const held = figures.validations || [], training = figures.training_pictures || [], curves = figures.curves || {};
    const points = (list, value) => list.map((each) => [each.step, value(each)]);
    return [
      { id: "chart-loss", title: "Loss", unit: "mean square error of the velocity", series: [
        { label: "training steps", color: 4, pale: true, points: curves.loss || [] },
        { label: "held-out pictures", color: 0, points: points(held, (each) => each.loss) },
        { label: "some training pictures", color: 1, dash: true, points: points(training, (each) => each.loss) }] },
      { id: "chart-sigma", title: "Held-out loss by noise level", unit: "quarters of sigma; 0 is clean", series: quarterNames.map((label, quarter) => ({ label, color: quarter, points: points(held, (each) => each.quarters[quarter]) })) },
      { id: "chart-pace", title: "Time of a step", unit: "seconds", fromZero: true, series: [{ label: "seconds", color: 2, points: curves.seconds || [] }] },
      { id: "chart-memory", title: "Peak GPU memory", unit: "GiB", fromZero: true, series: [{ label: "GiB", color: 3, points: (curves.peak_memory_gib || []).some((point) => point[1] > 0) ? curves.peak_memory_gib : [] }] },
      { id: "chart-rate", title: "Learning rate", unit: "", fromZero: true, series: [{ label: "learning rate", color: 1, points: curves.learning_rate || [] }] },
      { id: "chart-norm", title: "Gradient norm", unit: "before clipping", fromZero: true, series: [{ label: "norm", color: 2, points: curves.grad_norm || [] }] },
    ];
  }
  return { draw, figure, ofRun, number };
})();
