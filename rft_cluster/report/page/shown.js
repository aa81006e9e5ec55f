// Texts of data, of a model or of a file name. Every one goes into the page by textContent, never as markup.

// Characters that control a terminal or the direction of text become an escape, as in Python's repr; line ends and the
// joiners of scripts and emoji stay. The same as `visible` in page.py.
const HIDDEN = /\p{C}/gu;
const KEPT = new Set(["\n", "\u200c", "\u200d"]);

function escaped(character) {
  const code = character.codePointAt(0);
  const named = { 9: "\\t", 13: "\\r" }[code];
  if (named) return named;
  const digits = code.toString(16);
  return code < 256 ? "\\x" + digits.padStart(2, "0") : code < 65536 ? "\\u" + digits.padStart(4, "0") : "\\U" + digits.padStart(8, "0");
}

function shown(text) {
  return String(text).replace(HIDDEN, (character) => (KEPT.has(character) ? character : escaped(character)));
}

// One row of a CSV file. A spreadsheet would run a cell that begins so as a formula; an apostrophe makes it text.
function csvLine(values) {
  const cell = (value) => {
    const text = typeof value === "string" && /^[=+\-@\t\r]/.test(value) ? "'" + value : String(value ?? "");
    return /[",\n\r]/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text;
  };
  return values.map(cell).join(",") + "\n";
}
