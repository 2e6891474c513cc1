// The tabs, and which is shown.

import { annotator, ask, isTyping, lang, t, h, turnLanguage } from "./common.js";
import { rank } from "./rank.js";
import { talk } from "./talk.js";
import { watch } from "./watch.js";

const about = await (await ask("/api/about")).json();
const tabs = { rank, talk, watch };
const views = {};
let current = null;

function show(name) {
  views[current]?.hide?.();
  current = name;
  location.hash = name;
  for (const [other, view] of Object.entries(views)) {
    view.element.hidden = other !== name;
    document.getElementById(`tab-${other}`).ariaSelected = other === name;
  }
  views[name].show?.();
}

function draw() {
  document.documentElement.lang = lang;
  for (const element of document.querySelectorAll("[data-text]")) element.textContent = t(element.dataset.text);
  document.getElementById("lang").textContent = lang === "ko" ? "English" : "한국어";
  for (const view of Object.values(views)) view.hide?.();
  for (const [name, make] of Object.entries(tabs)) views[name] = make(about);
  document.querySelector("nav").replaceChildren(...Object.keys(tabs).map((name) =>
    h("button", { role: "tab", id: `tab-${name}`, onclick: (event) => {
      if (event.detail) event.currentTarget.blur(); // of a mouse: Enter is the tab's own then
      show(name);
    } }, t(name))));
  document.querySelector("main").replaceChildren(...Object.values(views).map((view) => view.element));
  const asked = current ?? location.hash.slice(1);
  show(asked in tabs ? asked : about.rank ? "rank" : about.models.length ? "talk" : "watch");
}

const named = document.getElementById("annotator");
named.value ||= localStorage.getItem("annotator") ?? ""; // it may have been typed meanwhile
named.addEventListener("change", () => {
  localStorage.setItem("annotator", annotator());
  named.blur();
  views[current].show?.();
});
named.addEventListener("keydown", (event) => { if (event.key === "Enter" && !event.isComposing) named.blur(); });
document.getElementById("lang").addEventListener("click", () => {
  turnLanguage();
  draw();
});
document.addEventListener("keydown", (event) => {
  if (!isTyping(event) && !event.ctrlKey && !event.metaKey && !event.altKey) views[current].key?.(event);
});
draw();
