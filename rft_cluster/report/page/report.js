// The page of one run, in the order in which a reader meets its parts.

async function start() {
  startTheme();
  startTables();
  await startCharts();
  [run, pictures] = await Promise.all([unpacked("run"), unpacked("pictures")]);
  startConfusion();
  startRollouts();
  document.documentElement.dataset.ready = performance.now().toFixed(0);
}

start();
