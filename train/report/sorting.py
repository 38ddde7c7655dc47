"""A click on a heading of a table that sorts puts its rows in the order of that column, a second click in the other order."""

SCRIPT = """<script>
(() => {
  const scale = {k: 1e3, M: 1e6, B: 1e9, T: 1e12};
  const value = (row, at) => {
    const text = row.cells[at].firstChild ? row.cells[at].innerText.trim() : "";
    const number = text.replace(/,/g, "").match(/^[-−+]?[0-9.]+(e[-+]?[0-9]+)?/);
    if (!number) return text;
    const rest = text.replace(/,/g, "").slice(number[0].length);
    return parseFloat(number[0].replace("−", "-")) * (scale[rest[0]] || 1);
  };
  for (const table of document.querySelectorAll("table.sorts"))
    [...table.tHead.rows[0].cells].forEach((cell, at) => {
      cell.tabIndex = 0;
      const sort = () => {
        const up = cell.getAttribute("aria-sort") !== "ascending";
        for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
        cell.setAttribute("aria-sort", up ? "ascending" : "descending");
        const order = (a, b) => {
          const [x, y] = [value(a, at), value(b, at)];
          if (typeof x !== typeof y) return typeof x === "number" ? -1 : 1;
          return (x < y ? -1 : x > y ? 1 : 0) * (up ? 1 : -1);
        };
        table.tBodies[0].append(...[...table.tBodies[0].rows].sort(order));
      };
      cell.addEventListener("click", sort);
      cell.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(); });
    });
})();
</script>"""
"""Stands at the end of a page that has such tables."""
