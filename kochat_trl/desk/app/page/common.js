// Elements, texts in two languages, requests, keys: what the tabs share.

import { texts } from "./texts.js";

export const lang = localStorage.getItem("lang") ?? (navigator.language.startsWith("ko") ? "ko" : "en");

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

/** Who judges: the name that was entered, not one that is half typed. */
export let annotator = "";

export function enter(name) {
  annotator = name;
  remember("annotator", name);
}

/** Keep a text for the next time, if the browser has room. */
export function remember(key, text) {
  try { localStorage.setItem(key, text); } catch { /* it is lost with the page */ }
}

/** Fill an element anew. The focus that the keyboard gave to something in it stays there, unless `isNew`: what is in
 * the same place isn't the same then. What was clicked has none. */
export function redraw(element, fill, isNew = false) {
  const active = document.activeElement;
  const focused = active?.matches(":focus-visible") && !isNew ? active.id : "";
  if (element.contains(active) || isNew) active.blur();
  fill();
  if (focused) document.getElementById(focused)?.focus();
}

/** Whether this is the Enter that ends a syllable; Safari says so by its code alone. */
export const isComposing = (event) => event.isComposing || event.keyCode === 229;

/** Letters that a key stands for, whatever the keyboard is set to. */
export function keyOf(event) {
  if (event.code.startsWith("Key") && !/^[a-z]$/i.test(event.key)) return event.code.slice(3).toLowerCase();
  if (/^(Digit|Numpad)\d$/.test(event.code) && !event.shiftKey) return event.code.at(-1);
  return event.key.length === 1 ? event.key.toLowerCase() : event.key;
}

export const isTyping = (event) => /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName);
