"""What a page that loads itself again keeps: which sections are open, and how far it is scrolled. Without scripts it begins anew, as ever."""

SCRIPT = """<script>
(() => {
  const key = "plait " + location.pathname, folds = [...document.querySelectorAll("details")];
  const name = (fold) => (fold.querySelector(":scope > [id]") || {}).id || fold.querySelector("summary").textContent;
  const back = () => {
    try {
      const kept = JSON.parse(sessionStorage.getItem(key));
      if (!kept) return;
      for (const fold of folds) if (name(fold) in kept.open) fold.open = kept.open[name(fold)];
      scrollTo(0, kept.top);
    } catch (error) {}
  };
  back();
  addEventListener("load", back);
  addEventListener("pagehide", () => {
    try {
      sessionStorage.setItem(key, JSON.stringify({open: Object.fromEntries(folds.map((fold) => [name(fold), fold.open])), top: scrollY}));
    } catch (error) {}
  });
})();
</script>"""
"""Stands at the end of the page; it asks nothing of the network, and the browser forgets it with the tab."""
