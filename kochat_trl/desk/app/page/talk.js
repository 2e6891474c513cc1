// Talk: one question to several models, their answers side by side.

import { annotator, ask, h, isComposing, problem, t } from "./common.js";

const RANGES = { // of the sliders: least, most, step
  temperature: [0.1, 2, 0.05], top_p: [0.05, 1, 0.05], top_k: [0, 200, 1], repetition_penalty: [1, 2, 0.05],
  max_new_tokens: [8, 256, 8],
};
const SAMPLES = ["temperature", "top_p", "top_k"]; // of no effect where nothing is drawn

export function talk(about) {
  if (!about.models.length) {
    return { element: h("section", {}, h("p", {}, t("no_models")), h("pre", { className: "text" },
      "kochat app --models outputs/demo/base outputs/demo/sft outputs/demo/ppo --reward-model outputs/demo/reward")) };
  }
  const names = shortened(about.models);
  const question = h("textarea", { rows: 2, id: "question", placeholder: t("question"), onkeydown: (event) => {
    if (event.key === "Enter" && !event.shiftKey && !isComposing(event)) { event.preventDefault(); put(); }
  } });
  question.value = sessionStorage.getItem("question") ?? ""; // through another language, and a reload
  question.oninput = () => sessionStorage.setItem("question", question.value);
  const system = h("textarea", { rows: 1, id: "system", placeholder: t("system_message") });
  const seed = h("input", { type: "number", value: 0, min: 0, max: 2 ** 32, id: "seed", size: 6 });
  const preset = h("select", { id: "preset", onchange: settle },
    Object.keys(about.presets).map((name) => h("option", {}, name)));
  preset.value = "top_p";
  const sliders = Object.fromEntries(Object.entries(RANGES).map(([name, [min, max, step]]) => [name,
    h("input", { type: "range", min, max, step, id: `set-${name}`, oninput: say })]));
  const outputs = Object.fromEntries(Object.keys(RANGES).map((name) => [name, h("output")]));
  const boxes = about.models.map((_, i) => h("input", { type: "checkbox", checked: true, id: `model-${i}` }));
  const go = h("button", { className: "main", id: "ask", onclick: () => (running ? running.abort() : put()) }, t("ask"));
  const side = h("div", { className: "side" });
  const status = h("p", { className: "soft", role: "status" });
  let running = null;

  function say() {
    for (const [name, output] of Object.entries(outputs)) output.textContent = sliders[name].value;
  }

  function settle() {
    const values = about.presets[preset.value];
    for (const [name, slider] of Object.entries(sliders)) {
      slider.value = name === "top_k" && !values.top_k ? 0 : values[name];
      slider.disabled = !values.do_sample && SAMPLES.includes(name);
    }
    say();
  }

  async function put() {
    const prompt = question.value.trim();
    const models = boxes.flatMap((box, i) => (box.checked ? [i] : []));
    if (!prompt || !models.length || running) return;
    const settings = Object.fromEntries(Object.entries(sliders).filter(([, slider]) => !slider.disabled)
      .map(([name, slider]) => [name, Number(slider.value)]));
    const asked = { prompt, system: system.value.trim() };
    const answers = models.map((model) => answer(names[model]));
    side.replaceChildren(...answers.map((its) => its.element));
    running = new AbortController();
    go.textContent = t("stop");
    status.textContent = "";
    try {
      const fields = { ...asked, models, preset: preset.value, settings, seed: Number(seed.value) };
      const response = await ask("/api/talk", fields, running.signal);
      for await (const event of linesOf(response)) answers[event.model].take(event);
      offer(asked, answers);
    } catch (error) {
      if (error.name === "AbortError") status.textContent = t("stopped");
      else if (document.getElementById("problem").hidden) problem(error.message);
    } finally {
      running = null;
      go.textContent = t("ask");
    }
  }

  function offer(asked, answers) {
    const said = answers.filter((its) => its.text?.trim());
    if (!about.journal || new Set(said.map((its) => its.text)).size < 2) return;
    const since = performance.now();
    for (const its of said) {
      const button = h("button", { className: "prefer" }, t("prefer"));
      button.onclick = async () => {
        if (!annotator) { problem(t("who")); document.getElementById("annotator").focus(); return; }
        const seconds = Math.round((performance.now() - since) / 100) / 10;
        const best = said.indexOf(its);
        const disable = (off) => said.forEach((one) => { one.element.querySelector(".prefer").disabled = off; });
        disable(true); // a second click would be a second line
        try {
          await ask("/api/prefer", { annotator: annotator, ...asked, answers: said.map((one) => one.text), best, seconds });
        } catch { return disable(false); }
        for (const one of said) one.element.querySelector(".prefer").remove();
        its.element.classList.add("kept");
        status.textContent = t("kept", { journal: about.journal });
      };
      its.element.append(button);
    }
  }

  const label = (name) => h("label", {}, h("span", {}, t(name)), outputs[name], sliders[name]);
  const element = h("section", {}, h("div", { className: "row" },
    about.models.map((path, i) => h("label", { title: path }, boxes[i], ` ${names[i]}`))),
  question, h("details", {}, h("summary", {}, t("settings")), system,
    h("div", { className: "row" }, h("label", {}, `${t("preset")} `, preset), h("label", {}, `${t("seed")} `, seed)),
    h("div", { className: "sliders" }, Object.keys(RANGES).map(label))),
  h("div", { className: "row" }, go, status), side);
  settle();
  return { element, show: () => question.focus() };
}

/** An answer that grows. */
function answer(name) {
  const text = h("p", { className: "text answer" });
  const figures = h("small");
  const found = { element: h("div", { className: "card" }, h("div", {}, h("b", {}, name), figures), text), text: null };
  found.take = (event) => {
    if (event.error) { figures.textContent = event.error; return; }
    if (!event.done) { text.textContent += event.shown; return; }
    found.text = event.text;
    text.textContent = (event.shown || t("empty")) + (event.ended ? "" : " …");
    const score = event.score === null ? [] : [t("score", { score: event.score.toFixed(2) })];
    figures.textContent = [...score, t("tokens", event)].join(" · ");
  };
  return found;
}

/** The JSON lines of a response, as they come. */
async function* linesOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    yield* lines.map((line) => JSON.parse(line));
  }
}

/** Paths without the folders that all have. */
function shortened(paths) {
  const parts = paths.map((path) => path.split("/"));
  while (parts.every((its) => its.length > 1 && its[0] === parts[0][0])) parts.forEach((its) => its.shift());
  return parts.map((its) => its.join("/"));
}
