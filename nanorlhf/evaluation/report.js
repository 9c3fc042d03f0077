"use strict";
// Search and sort the samples. Without this script they are all there, in the order of the data.
(function () {
  const box = document.getElementById("search"), order = document.getElementById("order");
  const list = document.getElementById("samples"), count = document.getElementById("count");
  if (!list) return;
  const articles = Array.from(list.children);
  const texts = articles.map((article) => article.textContent.toLowerCase());
  document.getElementById("controls").hidden = false;

  function search() {
    const wanted = box.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    articles.forEach((article, i) => {
      article.hidden = !wanted.every((word) => texts[i].includes(word));
      shown += article.hidden ? 0 : 1;
    });
    count.textContent = shown + " of " + articles.length;
  }

  function sort() {
    const [name, direction] = order.value.split(" ");
    const value = (article) => (article.dataset[name] === undefined ? NaN : Number(article.dataset[name]));
    const sign = direction === "down" ? -1 : 1;
    articles
      .map((article, i) => [value(article), i, article])
      .sort((a, b) => isNaN(a[0]) - isNaN(b[0]) || sign * (a[0] - b[0]) || a[1] - b[1])
      .forEach(([, , article]) => list.appendChild(article));
  }

  box.addEventListener("input", search);
  order.addEventListener("change", sort);
  search();
})();
