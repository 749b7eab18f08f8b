// Formulas are what arithmatex has marked, and the texts of notebooks; all else is left alone.
window.MathJax = {
  tex: {
    inlineMath: [["\\(", "\\)"], ["$", "$"]],
    displayMath: [["\\[", "\\]"], ["$$", "$$"]],
    processEscapes: true,
    processEnvironments: true,
  },
  options: { ignoreHtmlClass: "md-container", processHtmlClass: "arithmatex|jp-RenderedMarkdown" },
};
