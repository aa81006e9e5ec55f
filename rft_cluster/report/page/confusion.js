// The confusion matrix of an evaluation. Only cells with images are buttons; with many classes that is a few of thousands.

const NAMES = 130; // pixels for the names of the rows, at most
const DENSE = 40; // classes: with more, cells have no numbers and names are small

function startConfusion() {
  const choice = byId("evaluation");
  if (!choice || !run.answers.length) return;
  run.answers.forEach((one, i) => choice.append(make("option", { value: i }, `${one.split}, after ${one.step} steps`)));
  const tests = run.answers.map((one, i) => [one.split, i]).filter(([split]) => split === "test");
  choice.value = String(tests.length ? tests.at(-1)[1] : run.answers.length - 1);
  choice.addEventListener("change", () => drawMatrix(run.answers[Number(choice.value)]));
  drawMatrix(run.answers[Number(choice.value)]);
}

function countCells(answers) {
  const cells = new Map(); // "label answer" -> places in `answers`
  answers.label.forEach((label, i) => {
    const key = label + " " + answers.answer[i];
    if (!cells.has(key)) cells.set(key, []);
    cells.get(key).push(i);
  });
  return cells;
}

function drawMatrix(answers) {
  const cells = countCells(answers);
  const labels = [...new Set([...answers.label, ...answers.answer.filter((one) => one >= 0)])].sort((a, b) => a - b);
  const columns = answers.answer.some((one) => one < 0) ? [...labels, -1] : labels;
  const sizes = labels.map((label) => answers.label.filter((one) => one === label).length);
  const dense = labels.length > DENSE;
  byId("matrix").parentElement.classList.toggle("stacked", dense);
  const room = byId("matrix").clientWidth - NAMES;
  const side = Math.max(4, Math.min(46, Math.floor(room / columns.length) - (dense ? 1 : 2)));
  const grid = make("div", { class: dense ? "matrix dense" : "matrix", role: "group", "aria-label": "confusion matrix" });
  grid.style.gridTemplateColumns = `minmax(min-content, ${NAMES}px) repeat(${columns.length}, ${side}px)`;
  grid.style.gridTemplateRows = `auto repeat(${labels.length}, ${side}px)`;
  const place = (element, row, column) => {
    element.style.gridArea = `${row} / ${column}`;
    grid.append(element);
  };
  columns.forEach((column, i) => place(make("div", { class: "column", title: shown(className(column)) }, shown(className(column))), 1, i + 2));
  labels.forEach((label, row) => {
    place(make("div", { class: "row", title: shown(className(label)) }, shown(className(label))), row + 2, 1);
    columns.forEach((column, i) => {
      const found = cells.get(label + " " + column);
      if (found) place(cellButton(answers, label, column, found, sizes[row]), row + 2, i + 2);
      else if (!dense) place(make("div", { class: "none" }), row + 2, i + 2);
    });
  });
  byId("matrix").replaceChildren(grid);
  byId("cell").replaceChildren();
  drawPairs(answers, cells);
}

function cellButton(answers, label, column, found, size) {
  const share = found.length / size;
  const what = `${shown(className(label))}, answered ${shown(className(column))}: ${found.length} of ${size}`;
  const button = make("button", { type: "button", title: what, "aria-label": what, "aria-pressed": "false", onclick: () => showCell(answers, label, column, found, button) }, String(found.length));
  button.style.background = `color-mix(in oklab, var(${label === column ? "--good" : "--bad"}) ${Math.round(14 + 86 * share ** 0.6)}%, var(--paper))`;
  if (share > 0.4) button.classList.add("dark");
  return button;
}

function drawPairs(answers, cells) {
  const wrong = [...cells].map(([key, found]) => [...key.split(" ").map(Number), found]).filter(([label, answer]) => label !== answer);
  wrong.sort((a, b) => b[2].length - a[2].length);
  const rows = wrong.slice(0, 10).map(([label, answer, found]) => {
    const button = make("button", { type: "button", onclick: () => showCell(answers, label, answer, found, button) }, make("span", {}, make("bdi", {}, shown(className(label))), " → ", make("bdi", {}, shown(className(answer)))), make("b", {}, String(found.length)));
    return make("li", {}, button);
  });
  const right = answers.label.filter((label, i) => label === answers.answer[i]).length;
  const text = `${right} of ${answers.label.length} right` + (rows.length ? "; most often wrong:" : "");
  byId("pairs").replaceChildren(make("h3", {}, text), make("ol", {}, ...rows));
}

function showCell(answers, label, column, found, button) {
  for (const other of document.querySelectorAll("#confusion [aria-pressed=true]")) other.setAttribute("aria-pressed", "false");
  button.setAttribute("aria-pressed", "true");
  const shownAtOnce = 48;
  const items = found.slice(0, shownAtOnce).map((i) => make("figure", {}, picture(answers.image[i], { title: shown(answers.text[i]) }), make("figcaption", {}, shown(run.images.id[answers.image[i]]))));
  const more = found.length > shownAtOnce ? `, the first ${shownAtOnce}` : "";
  byId("cell").replaceChildren(make("h3", {}, make("bdi", {}, shown(className(label))), ", answered ", make("bdi", {}, shown(className(column))), `: ${found.length} images${more}`), make("div", { class: "pictures" }, ...items));
  byId("cell").scrollIntoView({ block: "nearest" });
}
