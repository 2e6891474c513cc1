// Rank: an item, its answers under numbers, and where each stands.

import { annotator, ask, h, keyOf, problem, redraw, remember, t } from "./common.js";

export function rank(about) {
  const element = h("section");
  let turn = null; // what the server said last
  let who = null; // to whom: the order of the answers is their own
  let places = []; // answer → its place from 0, or null
  let presses = []; // the answers that have one, the last that was placed last
  let tie = false; // the next answer goes to the place of the last one
  let shownAt = 0;
  let busy = false;
  let timer = null;
  const note = h("textarea", { rows: 1, placeholder: t("note"), id: "note", oninput: () => keepDraft(),
    onkeydown: (event) => { if (event.key === "Escape") note.blur(); } });
  const agreement = h("details", { ontoggle: () => agreement.open && agree() }, h("summary", {}, t("agreement")));

  const draft = () => `draft/${who}/${turn.seed}/${turn.item}`; // the seed: another one shows another order
  const placed = () => places.filter((place) => place !== null);

  function keepDraft() {
    remember(draft(), JSON.stringify({ places, note: note.value }));
  }

  async function load(path, name, fields = {}) {
    if (busy) return null;
    busy = true;
    const said = await ask(path, { annotator: name, ...fields }).then((response) => response.json()).catch(() => null);
    busy = false; // an error has been shown
    if (said) take(said, name);
    if (name !== annotator) show(); // somebody else has come meanwhile
    return said;
  }

  function take(said, name) {
    const isNew = said.item !== turn?.item || said.seed !== turn?.seed || who !== name;
    [turn, who] = [said, name];
    clearTimeout(timer);
    if (!turn.item && turn.left) timer = setTimeout(show, 1500); // answers are being made, or are before others
    if (isNew && turn.item) {
      const kept = JSON.parse(localStorage.getItem(draft()) ?? "{}");
      places = turn.answers.map((_, i) => kept.places?.[i] ?? null);
      presses = places.flatMap((place, i) => (place === null ? [] : [i])).sort((a, b) => places[a] - places[b]);
      note.value = kept.note ?? "";
      tie = false;
      shownAt = performance.now();
      scrollTo(0, 0);
    }
    redraw(element, fill, isNew);
  }

  function show() {
    clearTimeout(timer);
    if (!about.rank) return element.replaceChildren(h("p", {}, t("no_items")), h("pre", { className: "text" },
      "kochat app FILE --to outputs/labels.jsonl"), about.journal ? agreement : "");
    if (!annotator) {
      turn = null; // nothing that isn't on the screen can be judged
      element.replaceChildren(h("p", {}, t("who")));
      document.getElementById("annotator").focus();
      return null;
    }
    return load("/api/turn", annotator);
  }

  async function judge(verdict) {
    if (!turn?.item) return;
    if (who !== annotator) { show(); return; } // whose item this was
    const key = draft();
    const seconds = Math.round((performance.now() - shownAt) / 100) / 10;
    const its = { item: turn.item, seed: turn.seed };
    const said = await load("/api/judge", who, { ...its, verdict, seconds, note: note.value.trim() });
    if (said) localStorage.removeItem(key);
    if (said && !said.new) problem(t("already"));
  }

  function submit() {
    if (places.includes(null)) return problem(t("place_all"));
    const tiers = [...new Set(places)].sort((a, b) => a - b);
    return judge(tiers.map((place) => places.flatMap((its, i) => (its === place ? [i] : []))));
  }

  function put(answer, place) {
    places[answer] = place;
    presses = [...presses.filter((its) => its !== answer), ...(place === null ? [] : [answer])];
    tie = false;
    problem();
    keepDraft();
    draw();
  }

  function press(answer) {
    if (places[answer] !== null) return put(answer, null);
    const tiers = [...new Set(placed())].sort((a, b) => a - b);
    places = places.map((place) => (place === null ? null : tiers.indexOf(place))); // no gaps, so there is a place
    return put(answer, tie && tiers.length ? tiers.length - 1 : tiers.length);
  }

  function toggleTie() {
    tie = !tie && placed().length > 0;
    draw();
  }

  async function undo() {
    if (!turn?.last) return;
    if (who !== annotator) { show(); return; }
    const { item, prompt } = turn.last;
    const said = await load("/api/undo", who, { item });
    if (said) problem(t(said.undone ? "undone" : "not_undone", { prompt }));
  }

  function key(event) {
    const pressed = keyOf(event);
    const number = "123456789".indexOf(pressed);
    const does = { "=": toggleTie, x: () => judge("all_bad"), s: () => judge("skip"), u: undo, n: () => note.focus() };
    does.Enter = event.target.matches("button, summary, a") ? null : submit;
    does.Backspace = () => presses.length && put(presses.at(-1), null);
    const isNumber = turn?.item && number >= 0 && number < places.length;
    const acts = does[pressed] && (turn?.item || pressed === "u");
    const clicks = event.target.matches("button, summary, a") && ["Enter", " "].includes(pressed);
    if (!isNumber && !acts && !(clicks && event.repeat)) return;
    event.preventDefault();
    if (event.repeat) return; // a key that is held acts once
    if (isNumber) press(number);
    else does[pressed]();
  }

  function chip(answer) {
    const found = h("button", { className: "chip", id: `chip-${answer}`, title: t("drag") }, `${answer + 1}`);
    found.dataset.answer = answer;
    let from = null;
    const over = (event) => document.elementFromPoint(event.clientX, event.clientY)?.closest("[data-place]");
    found.addEventListener("pointerdown", (event) => {
      from = event;
      found.setPointerCapture(event.pointerId);
    });
    found.addEventListener("pointermove", (event) => {
      if (!from) return;
      found.classList.add("dragged");
      found.style.translate = `${event.clientX - from.clientX}px ${event.clientY - from.clientY}px`;
      for (const place of element.querySelectorAll("[data-place]")) place.classList.toggle("over", place === over(event));
    });
    found.addEventListener("pointerup", (event) => {
      const moved = from && Math.hypot(event.clientX - from.clientX, event.clientY - from.clientY) > 5;
      from = null;
      const place = over(event)?.dataset.place;
      if (moved && place !== undefined) put(answer, place === "" ? null : Number(place));
      else if (moved) draw();
      else press(answer);
    });
    found.addEventListener("pointercancel", () => { from = null; draw(); });
    found.addEventListener("click", (event) => { if (!event.detail) press(answer); }); // by a key
    return found;
  }

  const draw = () => redraw(element, fill);

  function fill() {
    const time = turn.minutes ? t("time", turn) : "";
    if (turn.trouble && !turn.item && !turn.left) problem(turn.trouble);
    const head = h("p", { className: "soft", id: "progress" }, t("progress", turn) + time);
    const button = (text, does, letter, more = {}) =>
      h("button", { id: `key-${letter}`, onclick: does, ...more }, text, h("kbd", {}, letter));
    const undoButton = button(t("undo"), undo, "U", { disabled: !turn.last, title: turn.last?.prompt ?? "" });
    const download = h("a", { href: "/rankings", download: "rankings.json" }, t("download"));
    if (!turn.item) {
      const why = turn.left ? t("waiting") : t("finished");
      element.replaceChildren(head, h("p", { id: "finished" }, why), h("div", { className: "row" }, undoButton, download), agreement);
      return;
    }
    const messages = turn.messages.map(([role, text]) => h("div", { className: `message ${role}` },
      h("small", {}, t(role)), h("p", { className: "text" }, text)));
    const cards = turn.answers.map((answer, i) => h("div", { className: places[i] === null ? "card" : "card placed" },
      h("div", {}, h("button", { className: "number", id: `number-${i}`, onclick: () => press(i) }, `${i + 1}`),
        h("small", {}, places[i] === null ? "" : t("place", { place: places[i] + 1 }))),
      h("p", { className: "text answer" }, answer)));
    const slots = places.map((_, place) => {
      const slot = h("li", {}, h("small", {}, t("place", { place: place + 1 })), h("br"),
        places.flatMap((its, i) => (its === place ? [chip(i)] : [])));
      slot.dataset.place = place;
      return slot;
    });
    const rest = h("li", {}, h("small", {}, t("unplaced")), h("br"), places.flatMap((its, i) => (its === null ? [chip(i)] : [])));
    rest.dataset.place = "";
    const bar = h("div", { className: "bar" }, h("ol", { className: "places" }, ...slots, rest),
      h("div", { className: "row" },
        button(t("submit"), submit, "Enter", { className: "main", id: "submit", disabled: places.includes(null) }),
        button(t("tie"), toggleTie, "=", { ariaPressed: `${tie}`, disabled: !placed().length }),
        button(t("all_bad"), () => judge("all_bad"), "X"), button(t("skip"), () => judge("skip"), "S"), undoButton,
        button(t("note"), () => note.focus(), "N")));
    element.replaceChildren(head, ...messages, ...cards, bar, note,
      h("p", { className: "soft" }, t("keys")), h("p", {}, download), agreement);
  }

  async function agree() {
    const found = await (await ask("/api/agreement")).json();
    const percent = (share) => `${(100 * share).toFixed(1)} %`;
    const cells = (who, figures) => h("tr", {}, h("td", {}, who), h("td", {}, `${figures.pairs}`),
      h("td", {}, `${figures.tied}`), h("td", {}, figures.pairs ? percent(figures.accuracy) : "–"),
      h("td", {}, figures.pairs ? figures.interval.map(percent).join(" – ") : "–"));
    const rows = found.rows.map(([names, how, figures]) =>
      cells(names.join(", ") + (how ? `, ${t(`model_${how}`)}` : ""), figures));
    const alpha = found.alpha === null ? "" : t("alpha", { alpha: found.alpha.toFixed(3) }) +
      (found.interval ? ` (95 %: ${found.interval.map((x) => x.toFixed(3)).join(" – ")})` : "");
    const heads = ["", t("pairs"), t("tied"), t("agree"), "95 %"].map((text) => h("th", {}, text));
    const disputes = found.disputes.slice(0, 20).map((dispute) => h("div", { className: "card" },
      h("p", { className: "text" }, dispute.prompt),
      dispute.prefers.map(([name, answer]) => h("p", { className: "text" }, h("b", {}, `${name}: `), answer))));
    agreement.replaceChildren(agreement.firstChild, h("p", {}, t("judged_by_two", found)),
      h("div", { className: "wide" }, h("table", {}, h("tr", {}, heads), rows)), h("p", {}, alpha),
      disputes.length ? h("h2", {}, t("disputes")) : "", disputes);
  }

  return { element, show, key, hide: () => clearTimeout(timer) };
}
