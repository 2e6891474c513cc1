// Watch: the runs, how far each is, and one of them closely.

import { ask, h, redraw, t } from "./common.js";

const EVERY = 2000; // milliseconds

export function watch(about) {
  const table = h("div", { className: "wide runs" });
  const closely = h("div");
  const element = h("section", {}, table, closely);
  let chosen = null;
  let timer = null;
  let plots = {}; // key → its figure
  let asks = 0; // the last one is answered
  let drawn = ""; // what is shown of the run: drawn again only when it changes

  async function show() {
    clearTimeout(timer);
    const own = ++asks;
    try {
      const runs = await (await ask("/api/runs")).json();
      if (own !== asks) return;
      if (!runs.some((run) => run.name === chosen)) chosen = runs[0]?.name ?? null;
      redraw(table, () => drawTable(runs));
      if (chosen !== null) {
        const { age, ...run } = await (await ask(`/api/run?${new URLSearchParams({ name: chosen })}`)).json();
        if (own !== asks) return;
        if (drawn !== (drawn = JSON.stringify(run))) redraw(closely, () => draw(run));
      }
    } catch { /* it is shown, and asked again */ }
    if (own === asks && !element.hidden) timer = setTimeout(show, EVERY);
  }

  function choose(name) {
    chosen = name;
    plots = {};
    drawn = "";
    closely.replaceChildren();
    show();
  }

  function drawTable(runs) {
    if (!runs.length) return table.replaceChildren(h("p", {}, t("no_runs", about)));
    const heads = [t("run"), t("state"), t("step"), t("written")].map((text) => h("th", {}, text));
    const rows = runs.map((run) => h("tr", { className: run.name === chosen ? "choice chosen" : "choice", onclick: () => choose(run.name) },
      h("td", {}, h("button", { id: `run-${run.name}` }, run.shown)), h("td", { className: run.state }, t(`is_${run.error ? "broken" : run.state}`)),
      h("td", {}, run.max_steps ? `${run.step} / ${run.max_steps}` : `${run.step ?? "–"}`), h("td", {}, ago(run.age))));
    table.replaceChildren(h("table", {}, h("tr", {}, heads), rows));
    return null;
  }

  function draw(run) {
    const query = (more) => new URLSearchParams({ name: run.name, ...more });
    const figures = run.curves.filter((curve) => curve.points > 1).map(({ key, title, points }) => {
      const figure = plots[key] ??= h("figure", {}, h("img", { alt: title }), h("figcaption", {}, title));
      const source = `/plot?${query({ key })}&points=${points}`;
      if (figure.firstChild.getAttribute("src") !== source) {
        const next = new Image(); // the old one stays until the new one is there
        next.alt = title;
        next.onload = () => figure.firstChild.replaceWith(next);
        next.src = source;
        if (!figure.firstChild.getAttribute("src")) figure.firstChild.src = source;
      }
      figure.dataset.points = points;
      return figure;
    });
    const numbers = Object.entries(run.figures).map(([name, value]) => h("span", { className: "soft" }, `${name}: ${Number(value?.toPrecision(4))}`));
    const worries = run.worries.map((worry) => h("div", { className: "worry" }, h("b", {}, worry.sign), h("br"), worry.advice));
    const samples = run.samples.map((sample) => h("div", { className: "card" },
      h("div", {}, h("small", {}, `${t("update", sample)} · ${t("score", { score: Number(sample.score).toFixed(2) })} · KL ${Number(sample.kl).toFixed(2)}`)),
      h("p", { className: "text soft" }, sample.prompt), h("p", { className: "text answer" }, sample.response + (sample.ended ? "" : " …"))));
    const report = run.report ? h("a", { href: `/report?${query()}`, target: "_blank" }, t("report")) : "";
    closely.replaceChildren(h("h2", {}, `${run.shown} `, h("span", { className: run.state }, t(`is_${run.state}`))),
      run.error ? h("p", { className: "worry" }, run.error) : "", h("div", { className: "row" }, report, numbers), ...worries, h("div", { className: "plots" }, figures),
      samples.length ? h("h2", {}, t("samples")) : "", h("div", { className: "side" }, samples));
  }

  const ago = (seconds) => seconds < 90 ? t("seconds_ago", { n: Math.round(seconds) })
    : seconds < 5400 ? t("minutes_ago", { n: Math.round(seconds / 60) })
    : seconds < 172800 ? t("hours_ago", { n: Math.round(seconds / 3600) })
    : t("days_ago", { n: Math.round(seconds / 86400) });

  return { element, show, hide: () => clearTimeout(timer) };
}
