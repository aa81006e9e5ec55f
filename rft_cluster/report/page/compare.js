// The page of several runs.

async function start() {
  startTheme();
  startTables();
  const curves = await unpacked("curves");
  for (const chart of curves.charts) drawChart(byId("charts"), { ...chart, steps: curves.step });
  document.documentElement.dataset.ready = performance.now().toFixed(0);
}

start();
