// The tabs, and which is shown.

import { ask, enter, h, isComposing, isTyping, lang, remember, t } from "./common.js";
import { rank } from "./rank.js";
import { talk } from "./talk.js";
import { watch } from "./watch.js";

const about = await (await ask("/api/about")).json();
const named = document.getElementById("annotator");
const turnLanguage = document.getElementById("lang");
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

named.value ||= localStorage.getItem("annotator") ?? ""; // it may have been typed meanwhile
enter(named.value.trim());
named.addEventListener("change", () => {
  enter(named.value.trim());
  named.blur();
  views[current].show?.();
});
named.addEventListener("keydown", (event) => { if (event.key === "Enter" && !isComposing(event)) named.blur(); });
document.documentElement.lang = lang;
for (const element of document.querySelectorAll("[data-text]")) element.textContent = t(element.dataset.text);
turnLanguage.textContent = lang === "ko" ? "English" : "한국어";
turnLanguage.addEventListener("click", () => {
  remember("lang", lang === "ko" ? "en" : "ko");
  location.reload();
});
document.addEventListener("keydown", (event) => {
  if (!isTyping(event) && !event.ctrlKey && !event.metaKey && !event.altKey) views[current].key?.(event);
});

const views = { rank: rank(about), talk: talk(about), watch: watch(about) };
document.querySelector("nav").append(...Object.keys(views).map((name) =>
  h("button", { role: "tab", id: `tab-${name}`, onclick: (event) => {
    if (event.detail) event.currentTarget.blur(); // of a mouse: Enter is the tab's own then
    show(name);
  } }, t(name))));
document.querySelector("main").append(...Object.values(views).map((view) => view.element));
const asked = location.hash.slice(1);
show(asked in views ? asked : about.rank ? "rank" : about.models.length ? "talk" : "watch");
