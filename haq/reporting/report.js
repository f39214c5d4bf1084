"use strict";
(() => {
  const specs = JSON.parse(document.getElementById("specs").textContent);
  // ast: expressions are interpreted, so that the page needs no right to evaluate text as code.
  const options = {
    actions: false,
    ast: true,
    defaultStyle: false,
    mode: "vega-lite",
    renderer: "svg",
    tooltip: { disableDefaultStyle: true },
  };
  const draw = async () => {
    for (const charts of document.querySelectorAll(".charts")) {
      // So many columns have room; the box around them scrolls.
      if (charts.dataset.columns > 0) charts.style.minWidth = `${60 + 17 * charts.dataset.columns}px`;
      for (const box of charts.children) {
        try {
          await vegaEmbed(box, specs[box.id], options);
        } catch (error) {
          box.textContent = "This chart could not be drawn; its data are in the table below.";
          console.error(error);
        }
      }
      // Text is seen and the page answers before everything is drawn.
      await new Promise((resolve) => setTimeout(resolve));
    }
    document.documentElement.dataset.charts = "drawn";
  };
  requestAnimationFrame(() => setTimeout(draw));
})();
