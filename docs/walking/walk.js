// Hovering, focusing or tapping a token lights it at every station.
const light = (t, on) => document.querySelectorAll('[data-t="' + t + '"]').forEach((e) => e.classList.toggle("lit", on));
let kept = null;
const of = (event) => event.target.closest && event.target.closest("[data-t]");
for (const [name, on] of [["mouseover", true], ["mouseout", false], ["focusin", true], ["focusout", false]]) {
  document.addEventListener(name, (event) => {
    const token = of(event);
    if (token && token.dataset.t !== kept) light(token.dataset.t, on);
  });
}
document.addEventListener("click", (event) => {  // a tap keeps it lit, a second one lets it go
  const token = of(event);
  if (!token) return;
  const before = kept;
  if (before !== null) light(before, false);
  kept = token.dataset.t === before ? null : token.dataset.t;
  if (kept !== null) light(kept, true);
});
document.querySelectorAll("nav details a").forEach((a) => a.addEventListener("click", () => {
  document.querySelector("nav details").open = false;
}));
