// Column heads become buttons that sort the problems; without this script the table stands in the run's order.
for (const table of document.querySelectorAll("table.problems")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const value = ({ cells }) => cells[column].dataset.value ?? "";
      const missing = (row) => head.dataset.sort === "number" && value(row) === "";
      const order = (a, b) =>
        head.dataset.sort === "number"
          ? value(a) - value(b)
          : cells(a).localeCompare(cells(b), undefined, { numeric: true });
      const cells = (row) => row.cells[column].textContent;
      const rows = [...body.rows].sort(
        (a, b) => missing(a) - missing(b) || (up ? 1 : -1) * order(a, b),
      );
      body.append(...rows);
    });
  });
}
