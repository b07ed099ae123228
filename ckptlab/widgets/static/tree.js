// A tree of dotted names with a box to search it. Branches are made when they are first unfolded: 10,000 names are fine.
const MATCHES = 200;

// Names → nested maps; a leaf is the index of its name.
function branches(names) {
  const root = new Map();
  names.forEach((name, index) => {
    const parts = name.split(".");
    let at = root;
    for (const part of parts.slice(0, -1)) {
      if (!(at.get(part) instanceof Map)) at.set(part, new Map());
      at = at.get(part);
    }
    const last = parts[parts.length - 1];
    at.set(at.get(last) instanceof Map ? `${last} ` : last, index);
  });
  return root;
}

function render({ model, el }) {
  el.classList.add("ckptlab-tree");
  const box = document.createElement("input");
  box.type = "search";
  box.placeholder = "search tensors";
  box.setAttribute("aria-label", "search tensors");
  const list = document.createElement("div");
  list.className = "list";
  el.append(box, list);

  const names = () => model.get("names");
  const leaf = (index, text) => {
    const item = document.createElement("button");
    item.className = "leaf";
    item.dataset.name = names()[index];
    item.title = `${names()[index]}  ${model.get("notes")[index]}`;
    const label = document.createElement("span");
    label.textContent = text;
    const note = document.createElement("small");
    note.textContent = model.get("notes")[index];
    item.append(label, note);
    item.onclick = () => {
      model.set("chosen", names()[index]);
      model.save_changes();
    };
    return item;
  };
  const grow = (parent, map, chosen) => {
    for (let [part, below] of map) {
      let text = part;
      while (below instanceof Map && below.size === 1) {
        const [[next, further]] = below;
        text += `.${next}`;
        below = further;
      }
      if (!(below instanceof Map)) {
        parent.append(leaf(below, text));
        continue;
      }
      const branch = document.createElement("details");
      const head = document.createElement("summary");
      head.textContent = text;
      branch.append(head);
      const inside = document.createElement("div");
      branch.append(inside);
      const unfold = () => {
        if (!inside.childElementCount) grow(inside, below, chosen);
      };
      branch.addEventListener("toggle", () => branch.open && (unfold(), mark()));
      parent.append(branch);
      if (chosen.slice(0, text.split(".").length).join(".") === text) {
        branch.open = true;
        const rest = chosen.slice(text.split(".").length);
        if (!inside.childElementCount) grow(inside, below, rest);
      }
    }
  };
  const mark = () => {
    for (const item of list.querySelectorAll(".leaf")) {
      item.classList.toggle("chosen", item.dataset.name === model.get("chosen"));
    }
  };
  const draw = () => {
    list.replaceChildren();
    const wanted = box.value.trim().toLowerCase().split(/\s+/).filter(Boolean);
    if (wanted.length) {
      const found = names().map((name, index) => [name, index])
        .filter(([name]) => wanted.every((word) => name.toLowerCase().includes(word)));
      found.slice(0, MATCHES).forEach(([name, index]) => list.append(leaf(index, name)));
      if (found.length !== 1 && (found.length > MATCHES || !found.length)) {
        const rest = document.createElement("div");
        rest.className = "rest";
        rest.textContent = found.length ? `and ${found.length - MATCHES} more` : "no tensor has that in its name";
        list.append(rest);
      }
    } else {
      grow(list, branches(names()), model.get("chosen").split("."));
    }
    mark();
  };

  box.addEventListener("input", draw);
  model.on("change:names", draw);
  model.on("change:chosen", mark);
  draw();
  return () => {
    model.off("change:names", draw);
    model.off("change:chosen", mark);
  };
}

export default { render };
