// The curves, by uPlot. All of a page share one cursor.

const COLOURS = ["--c0", "--c1", "--c2", "--c3", "--c4"];
const short = (value) => (value === null || value === undefined ? "–" : Math.abs(value) >= 1000 ? value.toFixed(0) : Number(value.toPrecision(3)).toString());

function axis(size) {
  return { stroke: resolved("--muted"), grid: { stroke: resolved("--line"), width: 1 }, ticks: { show: false }, size, font: "12px system-ui, sans-serif", gap: 6 };
}

// `series`: [{name, values, band: [low, high], points}]; draws into `holder`, again when colours or width change.
function drawChart(holder, { title, unit, reading, steps, series, height = 150, range }) {
  const legend = make("div", { class: "legend" });
  const canvas = make("div");
  const values = series.map(() => make("b"));
  legend.append(...series.map((one, i) => make("span", {}, make("span", { class: "key k" + (i % 5) }), make("span", {}, series.length > 1 ? shown(one.name) : "", values[i]))));
  const when = make("span", { class: "muted" });
  legend.append(when);
  holder.append(make("figure", {}, make("figcaption", {}, make("strong", {}, title), make("span", { class: "unit" }, unit), make("span", { class: "reading" }, reading)), canvas, legend));
  const last = (list) => list.findLast((value) => value !== null);
  const tell = (index) => {
    const at = index ?? null;
    series.forEach((one, i) => { values[i].textContent = " " + short(at === null ? last(one.values) : one.values[at]); });
    when.textContent = "step " + (at === null ? steps.at(-1) : steps[at]);
  };
  let chart = null;
  const paint = () => {
    if (!canvas.clientWidth) return;
    chart?.destroy();
    const data = [steps], lines = [{}], bands = [];
    series.forEach((one, i) => {
      const stroke = resolved(COLOURS[i % 5]);
      const points = { show: one.points ?? steps.length < 3, size: 6, fill: stroke };
      lines.push({ stroke, width: 1.75, points, spanGaps: true, label: one.name, ...(one.scattered ? { paths: () => null } : {}) });
      data.push(one.values);
      if (one.band && !one.scattered) {
        const at = data.length;
        data.push(one.band[1], one.band[0]);
        lines.push({ stroke: "transparent", points: { show: false }, spanGaps: true }, { stroke: "transparent", points: { show: false }, spanGaps: true });
        bands.push({ series: [at, at + 1], fill: stroke.replace("rgb(", "rgba(").replace(")", ", .16)") });
      }
    });
    chart = new uPlot({
      width: canvas.clientWidth, height, series: lines, bands, legend: { show: false },
      axes: [{ ...axis(24), space: 60 }, { ...axis(48), space: 34, values: (_, ticks) => ticks.map(short) }],
      scales: { x: { time: false }, y: range ? { range: (_, low, high) => range(low, high) } : {} },
      cursor: { y: false, sync: { key: "steps" }, points: { size: 6 } },
      hooks: { setCursor: [(plot) => tell(plot.cursor.idx)] },
    }, data, canvas);
    tell(null);
  };
  repainted.push(paint);
  new ResizeObserver(() => { if (canvas.clientWidth && (!chart || chart.width !== canvas.clientWidth)) paint(); }).observe(canvas);
}

function drawEvaluations(holder, evaluations) {
  const steps = [...new Set(evaluations.map((row) => row.step))].sort((a, b) => a - b);
  const splits = ["validation", "test"].filter((split) => evaluations.some((row) => row.split === split));
  const series = splits.map((split) => {
    const at = new Map(evaluations.filter((row) => row.split === split).map((row) => [row.step, row]));
    const column = (read) => steps.map((step) => (at.has(step) ? 100 * read(at.get(step)) : null));
    // Two measurements, before and after, are no curve.
    return { name: split, points: true, scattered: at.size < 3, values: column((row) => row.accuracy_strict), band: [column((row) => row.interval[0]), column((row) => row.interval[1])] };
  });
  if (steps.length > 1) {
    drawChart(holder, { title: "Accuracy", unit: "%", reading: "Strict, on images that are not trained on, with 95 % intervals.", steps, series, height: 210, range: () => [0, 100] });
  }
}

async function startCharts() {
  const curves = await unpacked("curves");
  drawEvaluations(byId("evaluation-chart"), curves.evaluations);
  const more = curves.charts.some((chart) => !chart.first);
  byId("more-charts").parentElement.hidden = !more;
  for (const chart of curves.charts) {
    const series = Object.entries(chart.series).map(([name, values]) => ({ name, values }));
    drawChart(byId(chart.first ? "charts" : "more-charts"), { ...chart, steps: curves.step, series });
  }
}
