// Charts: a legend whose entries hide, tooltips, zoom.
const figures = JSON.parse(document.getElementById("figures").textContent);
for (const place of document.querySelectorAll("[data-figure]")) {
  const panels = figures.panels[place.dataset.figure];
  place.append(...panels.map(() => document.createElement("div")));
  for (const [n, panel] of panels.entries()) {
    const box = place.children[n], width = box.clientWidth;
    const columns = Math.max(1, Math.floor(width / 210));
    const fit = { orient: "bottom", columns, labelLimit: width - 40 };
    const legend = { ...figures.config.legend, ...fit };
    const spec = {
      ...panel, width: "container", height: Math.min(400, Math.max(260, width * 0.8)),
      autosize: { type: "fit-x", contains: "padding" }, background: null,
    };
    const options = {
      mode: "vega-lite", renderer: "svg", config: { ...figures.config, legend },
      actions: { export: true, source: false, compiled: false, editor: false },
      tooltip: { theme: matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "" },
    };
    vegaEmbed(box, spec, options).catch((error) => console.error(error));
  }
}

// Tables: a click on a head sorts, a word filters, a button downloads what is shown.
const plain = (text) => text.trim().replaceAll("−", "-").replace(/(\d),(?=\d{3})/g, "$1");

function valueOf(cell) {
  const text = plain(cell.textContent);
  if (text === "–") return Infinity;
  const time = text.match(/^(\d+):(\d\d):(\d\d)$/);
  if (time) return time[1] * 3600 + time[2] * 60 + +time[3];
  const number = parseFloat(text);
  return Number.isNaN(number) ? text : number;
}

function sort(head, column, body) {
  const isDown = head.getAttribute("aria-sort") === "ascending";
  for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", isDown ? "descending" : "ascending");
  const rows = [...body.rows].map((row) => [valueOf(row.cells[column]), row]);
  const isText = rows.some(([value]) => typeof value === "string");
  rows.sort(([a], [b]) =>
    isText ? String(a).localeCompare(String(b), "en", { numeric: true }) : a - b || 0);
  if (isDown) rows.reverse();
  body.append(...rows.map(([, row]) => row));
}

function asCsv(table) {
  const rows = [...table.rows].filter((row) => !row.hidden)
    .map((row) => [...row.cells].map((cell) => plain(cell.textContent)));
  // An interval gets its own column; a spreadsheet must not take a text for a formula.
  const halves = rows[0].map((_, n) => rows.some((row) => row[n]?.includes(" ± ")));
  const quote = (text) =>
    `"${(/^[=@]|^[+-](?![\d.])/.test(text) ? "'" + text : text).replaceAll('"', '""')}"`;
  return rows.map((row, line) => row.flatMap((text, n) => {
    if (!halves[n]) return [text];
    return line ? [text.split(" ± ")[0], text.split(" ± ")[1] ?? ""] : [text, `${text} ±`];
  }).map(quote).join(",")).join("\r\n") + "\r\n";
}

function headingOf(node) {
  while (node && !/^H[123]$/.test(node.tagName)) node = node.previousElementSibling;
  return node?.id || "table";
}

function download(name, text) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
  link.download = name;
  link.click();
  URL.revokeObjectURL(link.href);
}

function button(text, action) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = text;
  made.addEventListener("click", action);
  return made;
}

for (const table of document.querySelectorAll("main table")) {
  const body = table.tBodies[0], name = `${headingOf(table)}.csv`;
  const tools = document.createElement("div"), scroll = document.createElement("div");
  tools.className = "tools";
  scroll.className = "scroll";
  table.before(tools, scroll);
  scroll.append(table);
  if (table.tHead.rows[0].cells.length < 3) continue; // It has no numbers.
  if (body.rows.length > 5) {
    const words = tools.appendChild(document.createElement("input"));
    words.type = "search";
    words.placeholder = "filter rows";
    words.setAttribute("aria-label", "filter rows");
    words.addEventListener("input", () => {
      const wanted = words.value.toLowerCase().split(/\s+/);
      for (const row of body.rows)
        row.hidden = !wanted.every((w) => row.textContent.toLowerCase().includes(w));
    });
  }
  tools.append(button("CSV", () => download(name, asCsv(table))));
  if (body.rows.length < 2) continue;
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    head.classList.add("sorts");
    head.tabIndex = 0;
    head.addEventListener("click", () => sort(head, column, body));
    head.addEventListener("keydown", (event) => {
      if (event.key === "Enter") sort(head, column, body);
    });
  });
}

for (const block of document.querySelectorAll("pre")) {
  const text = block.textContent.trim();
  const copy = button("copy", () => navigator.clipboard?.writeText(text));
  copy.className = "copy";
  block.append(copy);
}

// On a narrow screen the contents start closed.
if (innerWidth < 1200) document.querySelector("nav details").open = false;
