// Elements, texts in two languages, requests, keys: what the tabs share.

import { texts } from "./texts.js";

export let lang = localStorage.getItem("lang") ?? (navigator.language.startsWith("ko") ? "ko" : "en");

/** Draw everything in the other language. */
export function turnLanguage() {
  lang = lang === "ko" ? "en" : "ko";
  localStorage.setItem("lang", lang);
}

/** The text of a key in the page's language, with `{name}` filled in. */
export function t(key, values = {}) {
  return texts[key][lang].replace(/\{(\w+)\}/g, (whole, name) => values[name] ?? whole);
}

/** An element. Children are elements or texts: nothing is ever read as markup. */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

export function problem(text) {
  const place = document.getElementById("problem");
  place.textContent = text ?? "";
  place.hidden = !text;
}

/** What the server says to a question; its errors are shown, and thrown. */
export async function ask(path, fields, signal) {
  let response;
  try {
    response = await fetch(path, fields && {
      method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(fields), signal,
    });
  } catch (error) {
    if (error.name !== "AbortError") problem(t("unreachable"));
    throw error;
  }
  if (!response.ok) {
    const said = await response.text();
    let error = said;
    try { error = JSON.parse(said).error; } catch { /* a plain text */ }
    problem(error);
    throw new Error(error);
  }
  problem();
  return response;
}

export const annotator = () => document.getElementById("annotator").value.trim();

/** Letters that a key stands for, whatever the keyboard is set to. */
export function keyOf(event) {
  if (event.code.startsWith("Key") && !/^[a-z]$/i.test(event.key)) return event.code.slice(3).toLowerCase();
  if (/^(Digit|Numpad)\d$/.test(event.code) && !event.shiftKey) return event.code.at(-1);
  return event.key.length === 1 ? event.key.toLowerCase() : event.key;
}

export const isTyping = (event) => /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName);
