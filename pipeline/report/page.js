(() => {
  "use strict";
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const property = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const read = (id) => {
    const text = document.getElementById(id).textContent;
    return JSON.parse(text.replace(/"var:(--[\w-]+)"/g, (_, name) => JSON.stringify(property(name))));
  };
  const config = () => ({
    background: "transparent",
    font: "system-ui, -apple-system, 'Segoe UI', sans-serif",
    view: { stroke: null },
    axis: {
      labelColor: property("--muted"), titleColor: property("--ink"), gridColor: property("--grid"),
      domainColor: property("--line"), tickColor: property("--line"), labelFontSize: 12, titleFontSize: 12,
      titleFontWeight: 600, labelOverlap: true,
    },
  });
  // Labels beside points where they cover neither points nor each other; what finds no room is left out.
  const place = (vega) => {
    const labels = (vega.marks || []).find((mark) => mark.name === "labels_marks");
    if (labels) {
      labels.from = { data: "points_marks" };
      labels.encode = { update: {
        text: { signal: "datum.datum.label" }, fill: { value: property("--ink") }, fontSize: { value: 12 },
      } };
      labels.transform = [{
        avoidMarks: ["front_marks"],
        type: "label", size: { signal: "[max(width, 1), max(height, 1)]" }, anchor: ["top-right", "right", "bottom-right", "top",
          "bottom", "top-left", "left", "bottom-left"], offset: [4, 6, 4, 6, 6, 4, 6, 4],
      }];
    }
    return vega;
  };
  const draw = () => document.querySelectorAll("[data-spec]").forEach((host) => {
    vegaEmbed(host, read(host.dataset.spec), {
      mode: "vega-lite", actions: false, renderer: "svg", config: config(), patch: place,
      tooltip: { theme: dark.matches ? "dark" : "light" },
    }).catch((error) => { host.textContent = `This picture cannot be drawn here: ${error.message}`; });
  });
  draw();
  dark.addEventListener("change", draw);

  document.querySelectorAll("th button").forEach((button) => button.addEventListener("click", () => {
    const heading = button.parentElement, column = heading.cellIndex, body = heading.closest("table").tBodies[0];
    const up = heading.getAttribute("aria-sort") !== "ascending";
    heading.parentElement.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = (row) => {
      const text = row.cells[column].dataset.value;
      return text === undefined ? null : isNaN(text) ? text : Number(text);
    };
    const compare = (a, b) => (typeof a === "number" && typeof b === "number"
      ? a - b : String(a).localeCompare(String(b), "en", { numeric: true }));
    [...body.rows].map((row) => [key(row), row])
      .sort(([a], [b]) => (a === null || b === null ? (a === null) - (b === null) : up ? compare(a, b) : compare(b, a)))
      .forEach(([, row]) => body.append(row));
  }));
})();
