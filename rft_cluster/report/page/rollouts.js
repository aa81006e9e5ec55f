// The browser of rollouts: filters over columns, then a few groups at a time as the reader scrolls.

const AT_ONCE = 10; // groups drawn before the next are asked for

let rollouts, totals; // columns; per group {low, high}, and low and high of all
let found = []; // groups that match, in the order shown
let matches; // of each completion: 1 if it matches
let drawn = 0;
let lowered = null; // texts in lower case, made at the first search
let query = "";

const value = (column, i) => (column ? column[i] : null);

function startRollouts() {
  rollouts = run.rollouts;
  const form = byId("filters");
  if (!form) return;
  measure();
  const names = (numbers) => [...new Set(numbers)].filter((one) => one >= 0).sort((a, b) => a - b);
  form.label.append(...names(rollouts.groups.label).map((one) => make("option", { value: one }, shown(className(one)))));
  form.answer.append(...names(rollouts.answer ?? []).map((one) => make("option", { value: one }, shown(className(one)))));
  form.finish.append(...rollouts.finishes.map((name, code) => make("option", { value: code }, shown(name === "length" ? "length: cut short" : name))));
  if (!rollouts.finishes.length) form.finish.parentElement.hidden = true;
  const steps = rollouts.groups.step;
  form.from.placeholder = steps[0];
  form.to.placeholder = steps.at(-1);
  form.addEventListener("input", applyFilters);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(applyFilters));
  byId("csv").addEventListener("click", saveTable);
  new IntersectionObserver((entries) => { if (entries[0].isIntersecting) drawMore(); }, { rootMargin: "600px" }).observe(byId("sentinel"));
  applyFilters();
}

function measure() {
  const { start } = rollouts.groups;
  const known = rollouts.total ?? [];
  totals = { low: [], high: [], least: Infinity, most: -Infinity, advantage: 0 };
  for (let group = 0; group + 1 < start.length; group++) {
    let low = Infinity, high = -Infinity;
    for (let i = start[group]; i < start[group + 1]; i++) {
      const total = value(known, i) ?? null;
      if (total === null) continue;
      if (total < low) low = total;
      if (total > high) high = total;
    }
    totals.low.push(low);
    totals.high.push(high);
    totals.least = Math.min(totals.least, low);
    totals.most = Math.max(totals.most, high);
  }
  for (const one of rollouts.advantage ?? []) totals.advantage = Math.max(totals.advantage, Math.abs(one ?? 0));
}

// What the form asks: a test of a group, and one of a completion; null for one that all pass.
function readFilters(form) {
  const number = (field) => (field.value === "" ? null : Number(field.value));
  const label = number(form.label), answer = number(form.answer), finish = number(form.finish), from = number(form.from), to = number(form.to);
  const { step, label: labels } = rollouts.groups;
  const groups = [], completions = [];
  if (label !== null) groups.push((group) => labels[group] === label);
  if (from !== null) groups.push((group) => step[group] >= from);
  if (to !== null) groups.push((group) => step[group] <= to);
  if (form.group.value) {
    const live = form.group.value === "live";
    groups.push((group) => totals.high[group] > totals.low[group] === live);
  }
  if (answer !== null) completions.push((i) => value(rollouts.answer, i) === answer);
  if (finish !== null) completions.push((i) => value(rollouts.finish, i) === finish);
  const total = (i) => value(rollouts.total, i);
  const reward = { best: (i) => total(i) === totals.most, less: (i) => total(i) !== null && total(i) < totals.most, lowest: (i) => total(i) === totals.least, none: (i) => total(i) === null }[form.reward.value];
  if (reward) completions.push(reward);
  query = form.text.value.trim().toLowerCase();
  return { groups, completions };
}

function applyFilters() {
  const begun = performance.now();
  const form = byId("filters");
  const { groups, completions } = readFilters(form);
  const { start, image } = rollouts.groups;
  if (query && !lowered) lowered = rollouts.text.map((text) => text.toLowerCase());
  const named = query ? run.images.id.map((name) => name.toLowerCase().includes(query)) : null;
  matches = new Uint8Array(rollouts.text.length);
  found = [];
  let count = 0;
  for (let group = 0; group + 1 < start.length; group++) {
    if (!groups.every((test) => test(group))) continue;
    const own = named?.[image[group]];
    let any = false;
    for (let i = start[group]; i < start[group + 1]; i++) {
      if (query && !own && !lowered[i].includes(query)) continue;
      if (!completions.every((test) => test(i))) continue;
      matches[i] = 1;
      any = true;
      count++;
    }
    if (any) found.push(group);
  }
  if (form.order.value === "newest") found.reverse();
  drawn = 0;
  byId("groups").replaceChildren();
  drawMore();
  const thousands = (number) => number.toLocaleString("en").replaceAll(",", "\u202f");
  byId("found").textContent = count ? `${thousands(count)} completions in ${thousands(found.length)} groups` : "Nothing matches.";
  byId("found").dataset.milliseconds = (performance.now() - begun).toFixed(1);
}

function drawMore() {
  const next = found.slice(drawn, drawn + AT_ONCE);
  drawn += next.length;
  byId("groups").append(...next.map((group) => drawGroup(group, true)));
}

function drawGroup(group, withPicture) {
  const { step, image, label, prompt, start } = rollouts.groups;
  const name = run.images.id[image[group]];
  const answers = make("div", { class: "answers" }, make("div", { class: "answer heads" }, make("span", {}, "advantage"), make("span", {}, "reward"), make("span", {}, "completion"), make("span", { class: "facts" }, "tokens"), make("span", { class: "facts" }, "version, gap")));
  for (let i = start[group]; i < start[group + 1]; i++) answers.append(drawAnswer(i, label[group]));
  const head = make("h4", {}, make("b", {}, make("bdi", {}, shown(className(label[group])))), ` · step ${step[group]} · `, make("bdi", {}, shown(name)), " · ", make("bdi", {}, shown(prompt[group])));
  return make("article", { class: "group" }, withPicture ? picture(image[group], { onclick: () => showHistory(image[group]), "aria-label": "all answers to " + shown(name) }) : make("div"), make("div", {}, head, answers));
}

function drawAnswer(i, label) {
  const facts = make("span", { class: "facts" });
  const tokens = value(rollouts.tokens, i);
  facts.append(tokens === null ? "" : String(tokens));
  if (rollouts.finishes[value(rollouts.finish, i)] === "length") facts.append(" ", make("span", { class: "cut", title: "cut at sampling.max_tokens" }, "cut"));
  const version = value(rollouts.versions, i), gap = value(rollouts.gap, i);
  const wrote = [version === null ? "" : "v" + version, gap === null ? "" : gap && gap < 0.0001 ? gap.toExponential(0) : gap.toFixed(4)].filter(Boolean).join(" · ");
  return make("div", { class: matches[i] ? "answer" : "answer other" }, drawAdvantage(value(rollouts.advantage, i)), drawRewards(i), drawWords(i, label), facts, make("span", { class: "facts", title: "version of the weights that wrote it; log-prob gap, nats a token" }, wrote));
}

function drawAdvantage(advantage) {
  const holder = make("span", { class: "advantage" });
  if (advantage === null || advantage === undefined) return holder;
  const way = advantage < 0 ? "down" : "up";
  const bar = make("i", { class: way });
  bar.style.width = (totals.advantage ? (46 * Math.abs(advantage)) / totals.advantage : 0) + "%";
  holder.append(bar, make("span", { class: way }, (advantage > 0 ? "+" : "") + advantage.toFixed(2)));
  return holder;
}

function drawRewards(i) {
  const total = value(rollouts.total, i);
  const holder = make("span", { class: "parts", title: shown(value(rollouts.why, i) ?? "") }, make("span", { class: "total" }, total === null ? "none" : String(Number(total.toFixed(3)))));
  for (const [name, column] of Object.entries(rollouts.parts)) {
    const part = column[i];
    if (part === null) continue;
    const mark = part >= 1 ? "✓ " : part <= 0 ? "✗ " : "";
    holder.append(make("span", { class: "part " + (part >= 1 ? "yes" : part <= 0 ? "no" : "") }, mark + shown(name) + (mark ? "" : " " + Number(part.toFixed(3)))));
  }
  if (rollouts.failures[i]) holder.append(make("span", { class: "part failed" }, "failed: " + shown(rollouts.failures[i])));
  return holder;
}

// The completion: reasoning and tags quiet, the answer's words in the colour of right or wrong.
function drawWords(i, label) {
  const text = rollouts.text[i];
  const words = make("span", { class: "words" });
  const said = /<answer>([\s\S]*?)<\/answer>/.exec(text);
  if (said) {
    const at = said.index + "<answer>".length;
    append(words, text.slice(0, at), "aside");
    append(words, said[1], "said " + (value(rollouts.answer, i) === label ? "good" : "bad"));
    append(words, text.slice(at + said[1].length), "aside");
  } else append(words, text, "");
  if (text.length > 420) {
    words.classList.add("long");
    words.addEventListener("click", () => words.classList.toggle("long"));
  }
  return words;
}

// Text with the query marked, and with hidden characters as escapes that can be told from what was written.
function append(holder, text, kind) {
  const part = make("span", { class: kind });
  const lower = query ? text.toLowerCase() : "";
  let from = 0;
  for (let at = query ? lower.indexOf(query) : -1; at >= 0 && lower.length === text.length; at = lower.indexOf(query, from)) {
    pieces(part, text.slice(from, at));
    part.append(make("mark", {}, shown(text.slice(at, at + query.length))));
    from = at + query.length;
  }
  pieces(part, text.slice(from));
  holder.append(part);
}

function pieces(part, text) {
  let from = 0;
  for (const { 0: character, index } of text.matchAll(HIDDEN)) {
    if (KEPT.has(character)) continue;
    part.append(text.slice(from, index), make("span", { class: "escape" }, escaped(character)));
    from = index + character.length;
  }
  part.append(text.slice(from));
}

// One image's answers over training: a row for each step, a square for each completion.
function showHistory(image) {
  const { step, image: images, label, start } = rollouts.groups;
  const groups = [...images.keys()].filter((group) => images[group] === image);
  const detail = make("div");
  const rows = groups.flatMap((group) => {
    const squares = [];
    let sum = 0, known = 0;
    for (let i = start[group]; i < start[group + 1]; i++) {
      const answer = value(rollouts.answer, i), total = value(rollouts.total, i);
      squares.push(make("i", { class: answer === label[group] ? "yes" : answer >= 0 && answer !== null ? "no" : "none", title: shown(rollouts.text[i]) }, answer === label[group] ? "✓" : shown(className(answer ?? -1))));
      if (total !== null) { sum += total; known++; }
    }
    return [make("button", { type: "button", onclick: () => { detail.replaceChildren(drawGroup(group, false)); detail.scrollIntoView({ block: "nearest" }); } }, "step " + step[group]), make("div", { class: "squares" }, ...squares), make("span", { class: "muted" }, known ? "reward " + (sum / known).toFixed(2) : "")];
  });
  const name = shown(run.images.id[image]);
  byId("image-body").replaceChildren(make("h3", {}, make("bdi", {}, shown(className(label[groups[0]]))), " · ", make("bdi", {}, name)), picture(image), make("p", { class: "quiet" }, "What the policy answered to this image, step by step. Green is right; a step shows its completions."), make("div", { class: "history" }, ...rows), detail);
  byId("image").showModal();
}

// The completions found, for a spreadsheet.
function saveTable() {
  const { step, image, label, start } = rollouts.groups;
  const parts = Object.keys(rollouts.parts);
  const rows = [csvLine(["step", "image", "label", "answer", "reward", ...parts, "advantage", "tokens", "finish", "versions", "logprob_gap", "completion"])];
  for (const group of found) {
    for (let i = start[group]; i < start[group + 1]; i++) {
      if (!matches[i]) continue;
      const answer = value(rollouts.answer, i);
      rows.push(csvLine([step[group], run.images.id[image[group]], className(label[group]), answer >= 0 && answer !== null ? className(answer) : "", value(rollouts.total, i), ...parts.map((name) => rollouts.parts[name][i]), value(rollouts.advantage, i), value(rollouts.tokens, i), rollouts.finishes[value(rollouts.finish, i)], value(rollouts.versions, i), value(rollouts.gap, i), rollouts.text[i]]));
    }
  }
  const address = URL.createObjectURL(new Blob(rows, { type: "text/csv" }));
  make("a", { href: address, download: "completions.csv" }).click();
  setTimeout(() => URL.revokeObjectURL(address), 60000);
}
