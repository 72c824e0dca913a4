/* Sorting and filtering of the pictures in report.html. Copied into the page; loads nothing, keeps nothing. */
"use strict";
(() => {
  const root = document.getElementById("pictures");
  const tools = root && root.querySelector(".tools");
  if (!tools) return;
  const list = root.querySelector(".cards");
  const rows = [...list.children].map((card, place) => ({
    card, place,
    text: card.dataset.text,
    objects: Number(card.dataset.objects),
    failures: Number(card.dataset.failures),
    scores: JSON.parse(card.dataset.scores),
  }));
  const part = (name) => tools.querySelector("#pictures-" + name);
  const [by, order, text, least, most, count] = ["by", "order", "text", "least", "most", "count"].map(part);
  const value = (row, key) => {
    if (key === "place") return row.place;
    if (key === "objects") return row.objects;
    if (key === "failures") return row.failures;
    const score = row.scores[key.slice(6)];
    return score === undefined ? null : score;
  };
  const update = () => {
    const key = by.value, option = by.selectedOptions[0];
    /* The worst of a score first unless the best is asked for; of what is no score the smallest. */
    const rising = (order.value === "worst") === (option.dataset.better !== "lower");
    const sorted = rows.map((row) => [value(row, key), row]).sort(([a, one], [b, other]) => {
      if (a === null || b === null) return (a === null) - (b === null) || one.place - other.place;
      return (rising ? a - b : b - a) || one.place - other.place;
    });
    list.append(...sorted.map(([, row]) => row.card));
    const words = text.value.toLowerCase().split(/\s+/).filter(Boolean);
    const from = least.value === "" ? 0 : Number(least.value), to = most.value === "" ? Infinity : Number(most.value);
    let shown = 0;
    for (const row of rows) {
      const fits = row.objects >= from && row.objects <= to && words.every((word) => row.text.includes(word));
      row.card.hidden = !fits;
      shown += fits;
    }
    count.textContent = shown + " of " + rows.length;
  };
  tools.addEventListener("input", update);
  tools.hidden = false;
  update();
})();
