// The planner, once: inline in the report, displayed by a notebook, or as an anywidget's module. tests/planner_reference.py is the same arithmetic.
const GIB = 2 ** 30;

const around = (values, value) => {
  if (values.includes(value)) return [[value, 1]];
  const below = values.filter((v) => v < value), above = values.filter((v) => v > value);
  if (!below.length || !above.length) return [];
  const low = below[below.length - 1], high = above[0], share = (value - low) / (high - low);
  return [[low, 1 - share], [high, share]];
};

export const estimate = (known, model, name, card, seq, batch) => {
  const cells = known.cells.filter((c) => c.model === model && c.name === name && card in c.cards);
  const axis = (key) => [...new Set(cells.map((c) => c[key]))].sort((a, b) => a - b);
  const at = (s, b) => cells.find((c) => c.seq === s && c.batch === b)?.cards[card];
  const lengths = around(axis("seq"), seq), batches = around(axis("batch"), batch);
  const corners = lengths.flatMap(([s, u]) => batches.map(([b, v]) => [u * v, at(s, b)]));
  if (!corners.length || corners.some(([, held]) => held === undefined)) return { verdict: "refused" };
  const [allocated, reserved] = [0, 1].map((field) => Math.floor(corners.reduce((sum, [w, held]) => sum + w * held[field], 0) + 0.5));
  const capacity = known.cards[card].capacity_bytes, margin = capacity - reserved, exact = corners.length === 1;
  let verdict = margin >= 0 ? "fits" : allocated <= capacity ? "may fit" : "lacks";
  if (exact) verdict = !corners[0][1][2] ? "lacks" : margin >= 0 ? "fits" : "may fit";
  return { verdict, allocated_bytes: allocated, reserved_bytes: reserved, margin_bytes: margin, exact };
};

const signed = (value) => (value < 0 ? "" : "+") + value.toFixed(1);

export const words = (found) => {
  if (found.verdict === "refused") return "Refused: outside the forecasts that exist. Nothing is extrapolated.";
  const said = { "fits": "Fits", "may fit": "May fit, only if the allocator gives back what it caches", "lacks": "Does not fit" };
  const source = found.exact ? "a forecast" : "interpolated linearly between forecasts";
  return `${said[found.verdict]}: ${(found.reserved_bytes / GIB).toFixed(1)} GiB reserved, margin ${signed(found.margin_bytes / GIB)} GiB (${source}, predicted).`;
};

const labelled = (text, control) => {
  const label = document.createElement("label");
  // on the control itself: JupyterLab takes the arrow keys away otherwise
  control.setAttribute("data-lm-suppress-shortcuts", "true");
  label.append(text, control);
  return label;
};

const choice = (text, options, chosen) => {
  const control = document.createElement("select");
  for (const [value, shown] of options) control.append(new Option(shown, value, false, value === chosen));
  return [labelled(text, control), control];
};

const number = (text, values) => {
  const control = document.createElement("input");
  Object.assign(control, { type: "number", min: values[0], max: values[values.length - 1], step: 1, value: values[0] });
  return [labelled(`${text} (${values[0]} to ${values[values.length - 1]})`, control), control];
};

export const mount = (root, known) => {
  const unique = (key) => [...new Set(known.cells.map((c) => c[key]))];
  const same = (values) => values.map((v) => [v, v]), sorted = (values) => values.sort((a, b) => a - b);
  const [modelBox, model] = choice("model", same(unique("model")));
  const [nameBox, name] = choice("regime", same(unique("name")), unique("name").includes("lomo (bf16)") ? "lomo (bf16)" : undefined);
  const [cardBox, card] = choice("card", Object.entries(known.cards).map(([key, c]) => [key, c.name]));
  const [seqBox, seq] = number("tokens a row", sorted(unique("seq")));
  const [batchBox, batch] = number("rows", sorted(unique("batch")));
  const status = document.createElement("p");
  status.setAttribute("role", "status");
  const show = () => {
    const found = estimate(known, model.value, name.value, card.value, Number(seq.value), Number(batch.value));
    status.dataset.verdict = found.verdict;
    status.textContent = words(found);
  };
  root.replaceChildren(modelBox, nameBox, cardBox, seqBox, batchBox, status);
  root.addEventListener("input", show);
  show();
};

export default { render: ({ model, el }) => mount(el, model.get("config")) };
