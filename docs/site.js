"use strict";
// What the theme leaves undone for those who don't see the page, or have no mouse.
(() => {
  const name = (element, words) => {
    element.setAttribute("role", "group");
    element.setAttribute("aria-label", words);
  };
  const scrolls = (element) =>
    element.scrollWidth > element.clientWidth + 1 && ["auto", "scroll"].includes(getComputedStyle(element).overflowX);
  const show = (element) => {
    const left = Math.abs(element.scrollLeft);
    element.classList.toggle("more-left", left > 1);
    element.classList.toggle("more-right", left + element.clientWidth < element.scrollWidth - 1);
  };
  const update = () => {
    const wide = ".md-typeset__scrollwrap, .md-typeset table[class], .md-typeset pre, .md-typeset pre > code, .md-typeset div";
    for (const element of document.querySelectorAll(wide)) {
      if (!scrolls(element)) {
        element.classList.remove("more-left", "more-right");
        continue;
      }
      if (!element.dataset.scrolls) {
        element.dataset.scrolls = "true";
        element.tabIndex = 0; // the keyboard scrolls it
        if (element.tagName === "DIV") name(element, element.querySelector("table") ? "Table" : "Output");
        element.addEventListener("scroll", () => show(element), { passive: true });
      }
      show(element);
    }
  };
  // A section whose page is its index has a label without words, so its list would have no name.
  const nameLists = () => {
    for (const list of document.querySelectorAll("nav[aria-labelledby]")) {
      const title = list.querySelector(":scope > .md-nav__title")?.textContent.trim();
      if (!title) continue;
      list.removeAttribute("aria-labelledby");
      list.setAttribute("aria-label", title);
    }
  };
  // The corner of a table is no heading of anything.
  const emptyCorners = () => {
    for (const corner of document.querySelectorAll(".md-typeset th")) {
      if (!corner.textContent.trim() && !corner.firstElementChild) corner.replaceWith(document.createElement("td"));
    }
  };
  // Every block of code gets a part of navigation without a name, for its button alone.
  const hushButtons = () => {
    for (const part of document.querySelectorAll("nav.md-code__nav:not([role])")) part.setAttribute("role", "none");
  };
  addEventListener("load", () => {
    nameLists();
    emptyCorners();
    hushButtons();
    new MutationObserver(hushButtons).observe(document.body, { childList: true, subtree: true });
    update();
    document.documentElement.dataset.ready = "true";
  });
  addEventListener("resize", update);
})();
