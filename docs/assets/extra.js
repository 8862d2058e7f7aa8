// What the theme leaves out for keyboards and screen readers.
document.querySelectorAll("[data-md-component=search]").forEach((dialog) => {
  dialog.ariaLabel = "Search";
});
addEventListener("load", () => {
  const scrolled = ".md-typeset__scrollwrap, .highlight-ipynb, .jp-OutputArea-output, pre";
  document.querySelectorAll(scrolled).forEach((element) => {
    if (element.scrollWidth > element.clientWidth) element.tabIndex = 0;
  });
  document.querySelectorAll(".md-code__nav").forEach((nav, index) => {
    nav.ariaLabel = `Code ${index + 1}`;
  });
});
