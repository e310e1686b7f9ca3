"use strict";
// plotly.js lies in the page as gzip in base64, so that one file is the whole report; figures are drawn when they come near.
const unpacked = async (id) => {
  const bytes = Uint8Array.from(atob(document.getElementById(id).textContent.trim()), (c) => c.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
};
const dark = () => (document.documentElement.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
const themed = (layout) => {
  const [text, grid, zero] = dark() ? ["#e9e9ec", "#35363c", "#55565c"] : ["#1d1d1f", "#e4e4e8", "#b8b8bd"];
  const changes = { paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: text } };
  for (const key of ["xaxis", "yaxis", "yaxis2"])
    changes[key] = { gridcolor: grid, zerolinecolor: zero, linecolor: zero, automargin: true };
  const merge = (a, b) => { for (const k in b) a[k] = b[k] && typeof b[k] === "object" && !Array.isArray(b[k]) ? merge(a[k] || {}, b[k]) : b[k]; return a; };
  const out = merge(structuredClone(layout), changes);
  if (!layout.yaxis2) delete out.yaxis2;
  delete out.title;  // the heading says it
  out.margin = { ...out.margin, t: out.updatemenus ? 72 : 14 };  // a menu stands below the buttons that appear over a figure
  if (innerWidth < 560) { out.margin = { ...out.margin, l: 40, r: 6 }; out.font = { ...out.font, size: 10 }; }
  return out;
};
const draw = (holder) => {
  const figure = JSON.parse(document.getElementById(holder.dataset.figure).textContent);
  const shown = holder.classList.contains("drawn");
  // redrawing keeps what the reader picked: only the colours are new
  const data = shown ? holder.data : figure.data;
  const layout = shown ? { ...holder.layout, width: undefined } : figure.layout;
  holder.classList.add("drawn");
  return Plotly.react(holder, data, themed({ ...layout, autosize: true }), figure.config);
};
const sortable = (table) => table.querySelectorAll("th").forEach((head, column) => head.addEventListener("click", () => {
  const body = table.tBodies[0], up = head.dataset.up !== "1", value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
  head.dataset.up = up ? "1" : "0";
  const compare = (a, b) => { const x = value(a), y = value(b), n = Number(x) - Number(y); return Number.isNaN(n) ? x.localeCompare(y) : n; };
  [...body.rows].sort((a, b) => (up ? 1 : -1) * compare(a, b)).forEach((row) => body.append(row));
}));
(async () => {
  const code = document.createElement("script");
  code.textContent = await unpacked("plotly");
  document.head.append(code);
  const holders = [...document.querySelectorAll("[data-figure]")];
  const near = new IntersectionObserver((seen) => seen.filter((e) => e.isIntersecting).forEach((e) => { near.unobserve(e.target); draw(e.target); }), { rootMargin: "600px" });
  holders.forEach((holder) => near.observe(holder));
  const again = () => document.querySelectorAll(".drawn").forEach(draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
  addEventListener("beforeprint", () => holders.forEach(draw));
  document.querySelector("button.theme").addEventListener("click", () => { document.documentElement.dataset.theme = dark() ? "light" : "dark"; again(); });
  document.querySelectorAll("table").forEach(sortable);
})();
