"use strict";
// What the page does beyond showing: a cursor along the iterations, shared by all figures, and the episode browser.
// Without it every figure, table and answer is there. Texts are only ever set as text, never as HTML.

(() => {
  const MINUS = "\u2212";
  const element = (name, className, ...children) => {
    const made = document.createElement(name);
    if (className) made.className = className;
    made.append(...children);
    return made;
  };
  const written = (value) => {
    if (value === null || value === undefined) return "\u2013";
    const size = Math.abs(value);
    const digits = size >= 100 || Number.isInteger(value) ? 0 : size >= 10 ? 1 : size >= 1 ? 2 : 3;
    return value.toLocaleString("en", { maximumFractionDigits: digits }).replace("-", MINUS);
  };

  // ---- the cursor: a range input over each plot gives mouse, touch and keyboard; all plots follow the one that is used ----
  const plots = [...document.querySelectorAll(".area[data-values]")].map((area) => {
    const { x, y } = JSON.parse(area.dataset.values);
    const figure = area.closest("figure");
    const line = element("div", "cursor", element("span"));
    const input = Object.assign(element("input"), { type: "range", min: 0, max: x.length - 1, step: 1, value: x.length - 1 });
    input.setAttribute("aria-label", `Iteration, ${figure.querySelector(".title").textContent}`);
    line.hidden = true;
    area.append(line, input);
    const labels = [...figure.querySelectorAll(".legend .label")].map((label) => label.textContent);
    return { area, x, y, line, input, labels, values: [...figure.querySelectorAll(".legend .value")] };
  });
  const nearest = (x, wanted) => {
    let low = 0, high = x.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (x[middle] <= wanted) low = middle; else high = middle;
    }
    return wanted - x[low] <= x[high] - wanted ? low : high;
  };
  const show = (plot, iteration, marked) => {
    const place = nearest(plot.x, iteration), first = plot.x[0] - 0.5, last = plot.x[plot.x.length - 1] + 0.5;
    const when = plot.values.length === 1 ? ` in iteration ${written(plot.x[place])}` : "";
    plot.values.forEach((value, row) => { value.textContent = written(plot.y[row][place]) + when; });
    plot.input.value = place;
    plot.input.setAttribute("aria-valuetext",
      `iteration ${written(plot.x[place])}: ` + plot.labels.map((label, row) => `${label} ${written(plot.y[row][place])}`).join(", "));
    plot.line.hidden = !marked;
    plot.line.style.left = `${((plot.x[place] - first) / (last - first)) * 100}%`;
    plot.line.firstChild.textContent = written(plot.x[place]);
  };
  const end = Math.max(...plots.map((plot) => plot.x[plot.x.length - 1]));
  let waiting = null;
  const move = (iteration, marked) => {
    const first = waiting === null;
    waiting = [iteration, marked];
    if (first) requestAnimationFrame(() => { plots.forEach((plot) => show(plot, ...waiting)); waiting = null; });
  };
  for (const plot of plots) {
    show(plot, end, false);
    plot.input.addEventListener("input", () => move(plot.x[Number(plot.input.value)], true));
    plot.input.addEventListener("focus", () => move(plot.x[Number(plot.input.value)], true));
    plot.input.addEventListener("blur", () => move(end, false));
    plot.area.addEventListener("pointermove", (event) => {
      if (event.pointerType !== "mouse") return;
      const box = plot.area.getBoundingClientRect(), first = plot.x[0] - 0.5, last = plot.x[plot.x.length - 1] + 0.5;
      move(first + ((event.clientX - box.left) / box.width) * (last - first), true);
    });
    plot.area.addEventListener("pointerleave", () => { if (document.activeElement !== plot.input) move(end, false); });
  }

  // ---- the episode browser ----
  const packed = [...document.querySelectorAll("script.payload")];
  if (!packed.length) return;
  const PAGE = 25, section = document.getElementById("episodes"), list = document.getElementById("list");
  const found = document.getElementById("found"), more = document.getElementById("more"), form = document.getElementById("filters");
  const field = (name) => document.getElementById(`f-${name}`);
  // What cannot be seen is written as a number; marks that turn the direction of writing must not reach beyond their text.
  const visible = (text) => String(text).replace(/[\p{Cc}\p{Cf}\p{Co}\p{Cs}\u2028\u2029]/gu, (character) =>
    "\n\t\u200c\u200d".includes(character) ? character : `[U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}]`);
  const passed = (attempt) => attempt.answers.filter((answer) => answer.correct).length;
  const outcome = (attempt) => {
    const right = passed(attempt), all = attempt.answers.length;
    return !all ? "" : right === 0 ? "none" : right === all ? "all" : "some";
  };

  const unpack = ([iteration, slot, source, kind, passage, attempts], run) => ({
    run, iteration, slot, source, kind, passage,
    attempts: attempts.map(([text, tokens, invalid, grounded, reward, chosen, question, gold, type, answers, read]) => ({
      text, tokens, invalid, grounded, reward, chosen, question, gold, type, read,
      answers: answers.map(([text, extracted, correct, why, reward]) =>
        ({ text, extracted: extracted === 0 ? text.trim() : extracted, correct, why, reward })),
    })),
  });
  const read = async (script, run) => {
    const bytes = Uint8Array.from(atob(script.textContent), (character) => character.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text()).map((episode) => unpack(episode, run));
  };
  // Searched for without regard to case and to how lines are broken.
  const squeezed = (text) => visible(text ?? "").toLowerCase().replace(/\s+/g, " ");
  const haystack = (episode) => episode.hay ??= [episode.source, episode.passage,
    ...episode.attempts.flatMap((attempt) => [attempt.text, attempt.question, attempt.gold, ...attempt.answers.map((answer) => answer.text)]),
  ].map(squeezed).join("\n");

  let episodes = null, matching = [], shown = 0;
  const attemptFits = (attempt, wanted) =>
    (!wanted.valid || (wanted.valid === "valid" ? !attempt.invalid : attempt.invalid === wanted.valid)) &&
    (!wanted.passed || outcome(attempt) === wanted.passed);
  const wantedNow = () => ({
    text: squeezed(field("text").value).trim(), run: field("run")?.value ?? "", from: Number(field("from").value || -Infinity),
    to: Number(field("to").value || Infinity), valid: field("valid").value, passed: field("passed").value,
    order: field("order").value,
  });
  const filter = () => {
    const wanted = wantedNow();
    matching = episodes.filter((episode) =>
      (wanted.run === "" || episode.run === Number(wanted.run)) && episode.iteration >= wanted.from && episode.iteration <= wanted.to &&
      (!(wanted.valid || wanted.passed) || episode.attempts.some((attempt) => attemptFits(attempt, wanted))) &&
      (!wanted.text || haystack(episode).includes(wanted.text)));
    if (wanted.order) matching.reverse();
    list.replaceChildren();
    shown = 0;
    found.textContent = `${matching.length.toLocaleString("en")} of ${episodes.length.toLocaleString("en")} episodes`;
    showMore();
  };
  const showMore = () => {
    const wanted = wantedNow();
    list.append(...matching.slice(shown, shown + PAGE).map((episode) => item(episode, wanted)));
    shown = Math.min(shown + PAGE, matching.length);
    more.hidden = shown >= matching.length;
  };

  const marked = (text, wanted) => {
    const clean = visible(text), lower = clean.toLowerCase(), parts = [];
    if (!wanted || lower.length !== clean.length) return [clean];
    let from = 0;
    for (let at; (at = lower.indexOf(wanted, from)) >= 0; from = at + wanted.length) {
      parts.push(clean.slice(from, at), element("mark", "", clean.slice(at, at + wanted.length)));
    }
    return [...parts, clean.slice(from)];
  };
  const texted = (name, className, text, wanted) => Object.assign(element(name, className, ...marked(text, wanted)), { dir: "auto" });

  const item = (episode, wanted) => {
    const valid = episode.attempts.filter((attempt) => !attempt.invalid), chosen = episode.attempts.find((attempt) => attempt.chosen);
    const runName = packed.length > 1 ? `${packed[episode.run].dataset.run}, ` : "";
    const sum = `${valid.length} of ${episode.attempts.length} attempts valid` +
      (chosen ? `, Reasoner ${passed(chosen)} of ${chosen.answers.length} right` : "");
    const details = element("details", "episode", element("summary", "",
      element("span", "when", `${runName}iteration ${episode.iteration}`),
      texted("span", "first", (chosen?.question || episode.passage).slice(0, 160).replace(/\s+/g, " "), wanted.text),
      element("span", "sum", sum)));
    details.addEventListener("toggle", () => { if (details.open && details.children.length === 1) details.append(opened(episode, wanted)); });
    return element("li", "", details);
  };
  const opened = (episode, wanted) => element("div", "open-episode",
    element("div", "", element("h3", "", `Passage${episode.source ? `, from ${visible(episode.source)}` : ""}`),
      texted("p", "passage", episode.passage, wanted.text)),
    element("div", "", element("h3", "", "Attempts"),
      ...[...episode.attempts].sort((one, other) => attemptFits(other, wanted) - attemptFits(one, wanted) || other.chosen - one.chosen)
        .map((attempt) => attemptOf(attempt, wanted))));
  // The same answer, given several times, stands once.
  const together = (answers) => {
    const counted = new Map();
    for (const answer of answers) {
      const key = JSON.stringify([answer.text.trim(), answer.extracted, answer.correct, answer.why]);
      counted.set(key, [answer, (counted.get(key)?.[1] ?? 0) + 1]);
    }
    return [...counted.values()];
  };
  const remark = (answer, count) => {
    const read = answer.extracted === null ? "no answer read" : answer.extracted === answer.text.trim() ? "" : `read as \u201c${visible(answer.extracted)}\u201d`;
    const parts = [count > 1 ? `${count} times` : "", read, visible(answer.why ?? "").replaceAll("_", " ")].filter(Boolean);
    return ` \u2014 ${parts.join(", ")}`;
  };
  const attemptOf = (attempt, wanted) => {
    const tags = element("p", "tags");
    const tag = (text, className) => tags.append(element("span", className ?? "", text));
    if (attempt.invalid) tag(`invalid: ${attempt.invalid.replaceAll("_", " ")}`, "why");
    if (attempt.type) tag(attempt.type);
    if (attempt.grounded !== null && !attempt.invalid) tag(attempt.grounded ? "answer in the passage" : "answer not in the passage");
    if (attempt.answers.length) tag(`${passed(attempt)} of ${attempt.answers.length} right`);
    if (attempt.read) tag(`${attempt.read[0]} of ${attempt.read[1]} right with the passage in view`);
    if (attempt.reward !== null) tag(`reward ${written(attempt.reward)}`);
    if (attempt.chosen) tag("the Reasoner was trained on it");
    if (attempt.tokens) tag(`${attempt.tokens} tokens`);
    const box = element("div", attempt.invalid ? "attempt invalid" : "attempt");
    if (attempt.question === null) box.append(texted("p", "raw", attempt.text, wanted.text));
    else box.append(texted("p", "question-text", attempt.question, wanted.text),
      element("p", "tags", element("span", "", "Gold answer"), texted("bdi", "gold", attempt.gold, wanted.text)));
    box.append(tags);
    if (attempt.answers.length) box.append(element("ul", "answers", ...together(attempt.answers).map(([answer, count]) => element("li", "",
      element("span", answer.correct ? "right" : "wrong", answer.correct ? "\u2713 right" : "\u2717 wrong"),
      element("span", "", texted("span", "text", answer.text.trim(), wanted.text), element("span", "quiet", remark(answer, count)))))));
    return box;
  };

  const begin = async () => {
    found.textContent = "Reading the episodes\u2026";
    try {
      episodes = (await Promise.all(packed.map(read))).flat();
    } catch (error) {
      found.textContent = `The episodes cannot be read here: ${error.message}`;
      return;
    }
    const reasons = new Set(episodes.flatMap((episode) => episode.attempts.map((attempt) => attempt.invalid)).filter(Boolean));
    field("valid").append(...[...reasons].sort().map((reason) => new Option(`invalid: ${reason.replaceAll("_", " ")}`, reason)));
    const numbers = episodes.map((episode) => episode.iteration);
    field("from").placeholder = numbers.reduce((least, one) => Math.min(least, one), Infinity);
    field("to").placeholder = numbers.reduce((most, one) => Math.max(most, one), -Infinity);
    form.hidden = false;
    filter();
    let timer;
    form.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(filter, 150); });
    form.addEventListener("submit", (event) => event.preventDefault());
    more.addEventListener("click", showMore);
  };
  let reading = null;
  const start = () => (reading ??= begin());
  new IntersectionObserver((entries, observer) => {
    if (entries.some((entry) => entry.isIntersecting)) { observer.disconnect(); start(); }
  }, { rootMargin: "400px" }).observe(section);

  // From a task that was drawn by chance to its episode.
  for (const link of document.querySelectorAll("a.find")) {
    link.hidden = false;
    link.addEventListener("click", async () => {
      await start();
      if (!episodes) return;
      form.reset();
      field("text").value = link.dataset.text;
      field("from").value = field("to").value = link.dataset.iteration;
      filter();
      const first = list.querySelector("details");
      if (first) { first.open = true; first.querySelector("summary").focus({ preventScroll: true }); }
    });
  }
})();
