"""CSS of the report's page: light and dark by the reader's setting, one column on a phone."""

CSS = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --card: #f5f6f8; --edge: #dcdfe4; --text: #16191d; --quiet: #59616b; --grid: #e3e6ea;
  --accent: #1259c3; --good: #0b7a3e; --bad: #b3261e;
  --c0: #1259c3; --c1: #d9730d; --c2: #0b8a6f; --c3: #8a3ffc; --c4: #7d8791; --raw: 0.55;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #121417; --card: #1b1e23; --edge: #30353c; --text: #e9ebee; --quiet: #a2aab4; --grid: #2b3037;
    --accent: #7fb2ff; --good: #5fd08f; --bad: #ff8a80;
    --c0: #6aa8ff; --c1: #ffa657; --c2: #3fd0a9; --c3: #c29bff; --c4: #8d97a3; --raw: 0.5;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 32px 24px 64px; max-width: 1160px; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
}
h1 { margin: 0; font-size: 1.75rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 44px 0 14px; font-size: 1.2rem; }
h3 { margin: 22px 0 8px; font-size: 1rem; font-weight: 600; }
p { margin: 4px 0; max-width: 75ch; }
.quiet, figcaption span { color: var(--quiet); font-size: 0.875rem; font-weight: normal; }
.outcome { margin: 10px 0 20px; font-size: 1.25rem; font-variant-numeric: tabular-nums; }
.outcome .good { color: var(--good); font-weight: 600; }
.outcome .bad { color: var(--bad); font-weight: 600; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 0; }
.tiles div { padding: 12px 16px; background: var(--card); border-radius: 10px; }
.tiles dt { color: var(--quiet); font-size: 0.875rem; }
.tiles dd { margin: 0; font-size: 1.375rem; font-weight: 600; line-height: 1.35; font-variant-numeric: tabular-nums; }
.tiles dd.quiet { font-size: 0.8125rem; font-weight: normal; }
figure { margin: 0; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); gap: 16px; }
.pairs > figure { padding: 12px; background: var(--card); border-radius: 10px; }
.pair { display: grid; grid-auto-flow: column; grid-auto-columns: 1fr; gap: 8px; }
.pairs figcaption { margin-top: 8px; overflow-wrap: anywhere; }
.picture { display: block; font-size: 0.8125rem; color: var(--quiet); }
.picture img { display: block; width: 100%; height: auto; border-radius: 6px; }
.missing {
  display: flex; align-items: center; justify-content: center; aspect-ratio: 1; padding: 8px; border-radius: 6px;
  border: 1px dashed var(--quiet); text-align: center; overflow-wrap: anywhere; font-size: 0.75rem;
}
.strip { display: flex; gap: 8px; margin: 0; padding: 0 0 8px; overflow-x: auto; list-style: none; }
.strip li { flex: 0 0 136px; }
.strip .picture { text-align: center; }
p.strength { margin: 2px 0; font-size: 0.8125rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 460px), 1fr)); gap: 16px; }
.chart {
  display: flex; flex-direction: column; min-width: 0; padding: 14px 16px 10px; background: var(--card);
  border-radius: 10px;
}
.chart figcaption { margin-bottom: 6px; }
.chart svg[role=img] { display: block; width: 100%; height: auto; margin-top: auto; overflow: visible; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 4px 0 6px; padding: 0; list-style: none; }
.legend li { color: var(--quiet); font-size: 0.8125rem; white-space: nowrap; }
.legend svg { vertical-align: -1px; }
svg text { fill: var(--quiet); font-size: 13px; font-variant-numeric: tabular-nums; }
svg text.x { text-anchor: middle; }
svg text.y { text-anchor: end; }
svg path { fill: none; stroke: currentColor; }
.grid { stroke: var(--grid); }
.zero, .axis { stroke: var(--quiet); }
.line { stroke-width: 2; stroke-linejoin: round; }
.pale { stroke-width: 1; opacity: var(--raw); }
.dots { stroke-width: 3; stroke-linecap: round; opacity: var(--raw); }
.dot { stroke-width: 7; stroke-linecap: round; }
svg .mark { fill: currentColor; stroke: var(--card); stroke-width: 1; }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); } .c3 { color: var(--c3); }
.c4 { color: var(--c4); }
.scroll { overflow-x: auto; margin-top: 16px; }
table { border-collapse: collapse; font-size: 0.9375rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; }
th, td { padding: 5px 20px 5px 0; border-bottom: 1px solid var(--edge); text-align: left; vertical-align: top; }
th { font-weight: normal; color: var(--quiet); }
td { overflow-wrap: anywhere; }
thead th { color: var(--text); font-weight: 600; vertical-align: bottom; }
.figures td, .figures thead th { text-align: right; white-space: nowrap; }
.figures thead th:first-child { text-align: left; }
.code th, .code td { font: 0.84rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.code td { white-space: pre-wrap; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 380px), 1fr)); gap: 0 48px; }
.columns section { min-width: 0; }
summary { cursor: pointer; margin: 36px 0 12px; font-size: 1.2rem; font-weight: 600; }
ul.reasons { margin: 12px 0; padding-left: 20px; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
@media (max-width: 600px) {
  body { padding: 20px 14px 48px; }
  .tiles { grid-template-columns: 1fr 1fr; }
  .strip li { flex-basis: 116px; }
  .chart { padding: 12px 10px 6px; }
  svg text { font-size: 15px; }
  .code th, .code td { padding-right: 10px; font-size: 0.75rem; }
}
@media print { .strip { flex-wrap: wrap; } }
"""
