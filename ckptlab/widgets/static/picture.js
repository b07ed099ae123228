// Shows an SVG and tells the kernel which of its cells the mouse is on, and which was clicked.
const CELL = "[data-rank], [data-tp], [data-tensor]";
const REST = 40; // ms: how long the mouse must rest on a cell before it is told

function render({ model, el }) {
  el.classList.add("ckptlab-picture");
  let hovered = null;
  let timer = null;

  const draw = () => {
    el.innerHTML = model.get("svg");
    hovered = null;
  };
  const tell = (event, cell) => model.send({ event, cell: cell ? { ...cell.dataset } : {} });
  const over = ({ target }) => {
    const cell = target.closest(CELL);
    if (cell === hovered) return;
    hovered = cell;
    clearTimeout(timer);
    timer = setTimeout(() => tell("hover", cell), REST);
  };
  const leave = () => over({ target: el });
  const click = ({ target }) => {
    const cell = target.closest(CELL);
    if (cell) tell("click", cell);
  };

  model.on("change:svg", draw);
  el.addEventListener("mouseover", over);
  el.addEventListener("mouseleave", leave);
  el.addEventListener("click", click);
  draw();
  return () => {
    clearTimeout(timer);
    model.off("change:svg", draw);
    el.removeEventListener("mouseover", over);
    el.removeEventListener("mouseleave", leave);
    el.removeEventListener("click", click);
  };
}

export default { render };
