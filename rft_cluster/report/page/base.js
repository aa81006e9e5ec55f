// Small helpers of all pages, the packed data, the theme, and tables that sort.

const byId = (id) => document.getElementById(id);

// An element with attributes and children; a string among the children is text.
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

async function unpacked(name) {
  const holder = byId("data-" + name);
  const text = atob(holder.textContent);
  holder.remove(); // megabytes of text that nobody needs twice
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
// A colour as the canvas can take it: light-dark() is resolved by an element.
function resolved(name) {
  const probe = make("span");
  probe.style.color = `var(${name})`;
  document.body.append(probe);
  const value = getComputedStyle(probe).color;
  probe.remove();
  return value;
}

const repainted = []; // called when the colours change
function repaint() {
  for (const paint of repainted) paint();
}

function startTheme() {
  const themes = ["", "light", "dark"];
  const button = byId("theme");
  const set = (theme) => {
    if (theme) document.documentElement.dataset.theme = theme;
    else delete document.documentElement.dataset.theme;
    button.textContent = theme ? theme[0].toUpperCase() + theme.slice(1) : "System";
    repaint();
  };
  let at = 0;
  button.addEventListener("click", () => set(themes[++at % themes.length]));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
  addEventListener("beforeprint", () => { set("light"); for (const more of document.querySelectorAll("details.more")) more.open = true; });
  addEventListener("afterprint", () => set(themes[at % themes.length]));
  set("");
}

function startTables() {
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    for (const head of heads) {
      head.querySelector("button")?.addEventListener("click", () => sortBy(table, heads, head));
    }
  }
}

function sortBy(table, heads, head) {
  const up = head.getAttribute("aria-sort") === "descending";
  const column = heads.indexOf(head);
  const value = (row) => {
    const text = row.cells[column].textContent.trim();
    const number = parseFloat(text);
    return head.classList.contains("number") ? (Number.isNaN(number) ? -Infinity : number) : text;
  };
  const rows = [...table.tBodies[0].rows].map((row) => [value(row), row]);
  rows.sort(([a], [b]) => (a < b ? -1 : a > b ? 1 : 0) * (up ? 1 : -1));
  table.tBodies[0].append(...rows.map(([, row]) => row));
  for (const other of heads) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
}
