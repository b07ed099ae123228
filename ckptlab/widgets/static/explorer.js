// The whole widget. What is wanted is a state, a handful of small values; what is shown is made of parts, each the answer
// to a few fields of a state. A state is shown when all its parts are there, and then all at once: a page never has
// parts of two states. Parts come from the kernel, or lie in the page where it was exported.
const CELL = "[data-rank], [data-tensor], [data-kind], [data-source], [data-tp], [data-dp], [data-count]";
const DEGREES = [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024];
const KEPT = 600; // parts
const SHOWN = 3; // ranks of a cell whose holdings are told
const MATCHES = 200;
const PATIENCE = 20000; // ms without an answer before it is said

const make = (tag, attributes = {}, ...children) => {
  const found = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) found.addEventListener(name.slice(2), value);
    else if (name === "class") found.className = value;
    else if (value !== false && value !== undefined) found.setAttribute(name, value === true ? "" : value);
  }
  found.append(...children.filter((child) => child !== null && child !== undefined));
  return found;
};

// `tp 2 · pp 2 · dp 2` of [["tp", 2], …], in the order in which people name axes.
const spoken = (pairs) => {
  const order = ["tp", "pp", "dp"];
  const place = ([axis]) => (order.includes(axis) ? order.indexOf(axis) : order.length);
  return [...pairs].sort((a, b) => place(a) - place(b)).map(([axis, n]) => `${axis} ${n}`).join(" · ");
};

// 0, 1, 2, 5 of `0-2,5`
const numbers = (text) =>
  text.split(",").flatMap((part) => {
    const [first, last = first] = part.split("-").map(Number);
    return Array.from({ length: last - first + 1 }, (_, i) => first + i);
  });

function render({ model, el }) {
  const live = !model.parts;
  const cache = live ? new Map() : model.parts;
  const { fields, slots, optional, tabs } = model.get("plan");
  const root = make("div", { class: "ckptlab-explorer" });
  el.append(root);

  // ------------------------------------------------------------------ states and parts

  let shown = null; // the state that is shown
  let asked = 0; // number of the last question
  let waiting = false; // for the answer to it
  let pending = false; // whether something was wanted since
  let patience = null;

  const said = () => Object.fromEntries(fields.map((name) => [name, model.get(name)]));
  const first = said();
  // What the hands want. It goes into the model only when it is sent: the kernel echoes what it was sent before, and
  // the echo would undo what the hands did since.
  let hands = first;
  const current = () => hands;
  const key = (slot, state) => slot + JSON.stringify(slots[slot].map((name) => state[name]));
  const part = (slot, state) => cache.get(key(slot, state));
  const complete = (state) => tabs[state.tab].every((slot) => optional.includes(slot) || cache.has(key(slot, state)));

  const want = (changes) => {
    if (!live) {
      const states = part("about", current()) && states_(changes.tensor);
      const next = { ...current(), ...(changes.tensor ? { window: [] } : {}), ...states, ...changes };
      const nearest = [next, { ...next, state: first.state }, { ...next, rank: first.rank, target_rank: first.target_rank }].find(complete);
      if (!nearest) {
        controls(current()); // a slider goes back to where it was
        return say("not in this page: it was exported without its kernel");
      }
      changes = nearest;
    }
    if (changes.tensor && changes.tensor !== hands.tensor && !changes.window) changes = { ...changes, window: [] };
    hands = { ...hands, ...changes };
    pending = live;
    refresh();
    ask();
  };
  // In a page without a kernel: a state that the tensor has.
  const states_ = (tensor) => {
    const has = tensor && part("states", { ...current(), tensor });
    return has && !has.includes(hands.state) ? { state: has[0] } : {};
  };
  const ask = () => {
    if (!pending || waiting) return;
    pending = false;
    waiting = true;
    asked = Math.max(asked, model.get("asked")) + 1;
    for (const [name, value] of Object.entries(hands)) model.set(name, value);
    model.set("asked", asked);
    model.save_changes();
    clearTimeout(patience);
    patience = setTimeout(() => say("no answer from the kernel yet"), PATIENCE);
  };
  const refresh = () => {
    const state = current();
    controls(state);
    if (complete(state)) return show(state);
    busy(true, state);
    if (titles[state.tab]) title.textContent = titles[state.tab]; // that of the pictures, which are another tab's no more
  };
  const answered = () => {
    const view = model.get("view");
    for (const [name, content] of Object.entries(view.parts || {})) {
      cache.delete(name);
      cache.set(name, content);
    }
    for (const name of cache.keys()) {
      if (!live || cache.size <= KEPT) break;
      cache.delete(name);
    }
    if (view.asked >= asked) {
      waiting = false;
      clearTimeout(patience);
      if (!pending) hands = said();
    }
    refresh();
    if (pending) setTimeout(ask); // not within the message that brought the answer
  };
  const busy = (is, state) => {
    root.setAttribute("aria-busy", String(is));
    status.textContent = is ? `computing ${spoken(state.tab === "Model" ? state.source_mesh : state.mesh)} …` : "";
  };
  const say = (text) => {
    status.textContent = text;
    setTimeout(() => status.textContent === text && (status.textContent = ""), 4000);
  };

  // ------------------------------------------------------------------ the frame

  const title = make("h3", { class: "title" });
  const status = make("span", { class: "status", role: "status" });
  const line = make("pre", { class: "line", hidden: true });
  const copy = make("button", { class: "quiet-button", hidden: true, onclick: () => copied(line.textContent) }, "Copy");
  const python = make("button", { class: "quiet-button", "aria-pressed": "false", title: "the Python that does the same" }, "Python");
  python.onclick = () => {
    line.hidden = copy.hidden = !line.hidden;
    python.setAttribute("aria-pressed", String(!line.hidden));
  };
  const copied = async (text) => {
    try {
      await navigator.clipboard.writeText(text);
      say("copied");
    } catch {
      getSelection().selectAllChildren(line);
      say("selected: copy it with the keyboard");
    }
  };
  const tree = make("details", { class: "tree" });
  const bar = make("div", { class: "tabs", role: "tablist" });
  const panels = {};
  const main = make("div", { class: "main" }, bar);
  const tip = make("div", { class: "tip", hidden: true });
  root.append(
    make("div", { class: "head" }, title, status, make("span", { class: "buttons" }, copy, python)),
    line,
    make("div", { class: "body" }, tree, main),
    tip,
  );
  for (const tab of Object.keys(tabs)) {
    const button = make("button", { role: "tab", "data-tab": tab, onclick: () => want({ tab }) }, tab === "Steps" ? "Step by step" : tab);
    bar.append(button);
    panels[tab] = make("div", { class: "panel", role: "tabpanel", "data-tab": tab, hidden: true });
    main.append(panels[tab]);
  }
  bar.addEventListener("keydown", (event) => {
    const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const all = [...bar.children];
    const next = all[all.indexOf(event.target) + way];
    if (way && next) next.focus(), next.click();
  });

  // ------------------------------------------------------------------ sliders

  const slider = (axis, most, now, choose) => {
    const input = make("input", { type: "range", min: 0, step: 1, "aria-label": axis });
    const value = make("output", {});
    const ticks = make("div", { class: "ticks" });
    let options = [];
    let [there, at] = [null, null]; // the degrees that this page has, and the one that is shown
    const box = make("div", { class: "slider", "data-axis": axis }, make("label", {}, axis), make("div", {}, input, ticks), value);
    // In a page without a kernel a hand, or a key, goes on to the next degree that is there.
    const nearest = (degree) => {
      if (live || !there || there.includes(degree)) return degree;
      const ahead = there.filter((n) => Math.sign(n - at) === Math.sign(degree - at));
      return ahead.length ? ahead.reduce((a, b) => (Math.abs(b - at) < Math.abs(a - at) ? b : a)) : degree;
    };
    input.addEventListener("input", () => {
      const degree = nearest(options[input.value]);
      input.value = options.indexOf(degree);
      value.textContent = degree;
      choose(degree);
    });
    // Ticks that have room beside one another: the chosen one before all, then those that work, powers of two first.
    const room = () => {
      const wide = ticks.clientWidth || 180;
      const taken = [];
      const order = [...ticks.children].map((tick, i) => [tick, i]);
      const first = (tick) => (tick.classList.contains("now") ? 0 : tick.classList.contains("no") ? 4 : 2) + (Math.log2(tick.dataset.degree) % 1 ? 1 : 0);
      order.sort(([a, i], [b, j]) => first(a) - first(b) || i - j);
      for (const [tick, i] of order) {
        const middle = options.length > 1 ? (wide * i) / (options.length - 1) : 0;
        const half = 3.4 * tick.textContent.length + 4;
        const free = taken.every(([from, to]) => middle + half <= from || to <= middle - half);
        tick.style.visibility = free ? "" : "hidden";
        if (free) taken.push([middle - half, middle + half]);
      }
    };
    const set = (degree, works) => {
      [there, at] = [works, degree];
      const fixed = axis === "ZeRO" ? most : [...new Set([...DEGREES.filter((n) => n <= Math.max(most, 4 * degree)), ...(works || []), degree])];
      const next = fixed.sort((a, b) => a - b);
      if (String(next) !== String(options)) {
        options = next;
        input.max = options.length - 1;
        ticks.replaceChildren(
          ...options.map((n, i) => {
            const tick = make("button", { tabindex: -1, "data-degree": n, onclick: () => choose(n) }, String(n));
            tick.style.left = `${options.length > 1 ? (100 * i) / (options.length - 1) : 0}%`;
            return tick;
          }),
        );
      }
      if (root.getRootNode().activeElement !== input || Number(options[input.value]) !== degree) input.value = options.indexOf(degree);
      value.textContent = degree;
      for (const tick of ticks.children) {
        const n = Number(tick.dataset.degree);
        tick.classList.toggle("no", Boolean(works) && !works.includes(n));
        tick.classList.toggle("now", n === degree);
        tick.title = works && !works.includes(n) ? `${axis} ${n} does not work here` : "";
      }
      room();
      box.classList.toggle("bad", Boolean(works) && !works.includes(degree));
    };
    return { box, set };
  };
  // Sliders for a mesh and a ZeRO stage: the names of the fields that they set, and the field of degrees that work.
  const sliders = (meshField, stageField, worksSlot) => {
    const box = make("div", { class: "sliders" });
    let made = {};
    const set = (state) => {
      const pairs = state[meshField];
      const works = worksSlot ? part(worksSlot, state) : null;
      const axes = [...pairs.map(([axis]) => axis), ...(model.get("stages").length ? ["ZeRO"] : [])];
      if (String(Object.keys(made)) !== String(axes)) {
        made = Object.fromEntries(
          axes.map((axis) => [
            axis,
            axis === "ZeRO"
              ? slider(axis, model.get("stages"), null, (n) => want({ [stageField]: n }))
              : slider(axis, model.get("most"), null, (n) => want({ [meshField]: hands[meshField].map(([a, m]) => [a, a === axis ? n : m]) })),
          ]),
        );
        box.replaceChildren(...Object.values(made).map((one) => one.box));
      }
      let degrees = works;
      if (!live && worksSlot) degrees = Object.fromEntries(axes.map((axis) => [axis, inPage(state, axis, meshField, stageField)]));
      for (const [axis, n] of pairs) made[axis].set(n, degrees && degrees[axis]);
      made.ZeRO?.set(state[stageField], degrees && degrees.ZeRO);
    };
    return { box, set };
  };
  const inPage = (state, axis, meshField, stageField) => {
    const all = axis === "ZeRO" ? model.get("stages") : DEGREES;
    return all.filter((n) =>
      complete({ ...state, ...(axis === "ZeRO" ? { [stageField]: n } : { [meshField]: state[meshField].map(([a, m]) => [a, a === axis ? n : m]) }) }),
    );
  };

  // ------------------------------------------------------------------ panels

  const cards = (panel, ...names) => {
    const grid = make("div", { class: "cards" });
    for (const name of names) grid.append(make("figure", { "data-slot": name, tabindex: name.includes("holdings") ? undefined : 0 }));
    panel.append(grid);
  };
  const fields_ = {}; // of the model's numbers
  const kept_ = {}; // of its activations
  const parts = {}; // single places of the panels

  if (panels.Model) {
    const presets = model.get("presets");
    const said = make("small", { class: "quiet" });
    const pick = make("select", { "aria-label": "start from a model" }, make("option", { value: "" }, "start from …"), ...Object.keys(presets).map((name) => make("option", { value: name }, name)));
    pick.onchange = () => {
      if (!pick.value) return;
      const { model: numbers, activations } = presets[pick.value];
      want({ model: numbers, activations: { ...hands.activations, sequence: activations.sequence, active: activations.active } });
    };
    // Which model the numbers are of, however they came to be.
    const known = Object.fromEntries(Object.entries(presets).map(([name, preset]) => [JSON.stringify(preset.model), name]));
    parts.preset = (state) => {
      pick.value = known[JSON.stringify(state.model)] || "";
      said.textContent = pick.value ? presets[pick.value].source : "";
    };
    const form = make("div", { class: "numbers" });
    const shownFields = { layers: "", hidden: "", heads: "", kv_heads: "kv heads", ffn: "", vocab: "", head_dim: "head dim", experts: "" };
    const edit = (name, value) => want({ model: { ...hands.model, [name]: value } });
    const otherwise = { kv_heads: "as heads", ffn: "4 × hidden", head_dim: "÷ heads" }; // where nothing is said
    for (const [name, label] of Object.entries(shownFields)) {
      const input = make("input", { type: "number", min: name === "experts" ? 0 : 1, "data-number": name, placeholder: otherwise[name] });
      input.onchange = () => edit(name, input.value === "" ? null : Number(input.value));
      fields_[name] = input;
      form.append(make("label", {}, make("span", {}, label || name), input));
    }
    const dtype = make("select", { "data-number": "dtype" }, ...["bf16", "fp16", "fp32"].map((name) => make("option", {}, name)));
    dtype.onchange = () => edit("dtype", dtype.value);
    fields_.dtype = dtype;
    form.append(make("label", {}, make("span", {}, "dtype"), dtype));
    for (const name of ["tied", "gated"]) {
      const input = make("input", { type: "checkbox", "data-number": name });
      input.onchange = () => edit(name, input.checked);
      fields_[name] = input;
      form.append(make("label", { class: "check" }, input, make("span", {}, name === "tied" ? "tied embeddings" : "gated (SwiGLU)")));
    }
    const kept = make("div", { class: "numbers", role: "group", "aria-label": "activations" });
    const keep = (name, value) => want({ activations: { ...hands.activations, [name]: value } });
    for (const [name, label] of Object.entries({ sequence: "sequence", micro_batch: "micro-batch", active: "of experts" })) {
      const input = make("input", { type: "number", min: 1, "data-kept": name, title: name === "active" ? "to how many experts each token goes" : false });
      input.onchange = () => keep(name, Math.max(1, Math.round(Number(input.value)) || 1));
      kept_[name] = input;
      kept.append(make("label", {}, make("span", {}, label), input));
    }
    const again = make("select", { "data-kept": "recompute" }, ...["nothing", "attention", "layers"].map((name) => make("option", {}, name)));
    again.onchange = () => keep("recompute", again.value);
    kept_.recompute = again;
    kept.append(make("label", {}, make("span", {}, "recompute"), again));
    for (const [name, label] of Object.entries({ flash: "FlashAttention", sequence_parallel: "sequence parallelism", dropout: "dropout" })) {
      const input = make("input", { type: "checkbox", "data-kept": name });
      input.onchange = () => keep(name, input.checked);
      kept_[name] = input;
      kept.append(make("label", { class: "check" }, input, make("span", {}, label)));
    }
    parts.source = sliders("source_mesh", "source_stage", "source.works");
    parts.sourceRefused = make("div", {});
    panels.Model.append(make("div", { class: "presets" }, pick, said), form, kept, parts.source.box, parts.sourceRefused);
    cards(panels.Model, "model.told", "model.zero", "model.mesh");
  }
  if (panels.Look) {
    parts.states = make("div", { class: "choices", role: "radiogroup", "aria-label": "state" });
    panels.Look.append(make("div", { class: "states" }, make("span", { class: "quiet" }, "state"), parts.states));
    cards(panels.Look, "look.mesh", "look.tensor", "look.flat", "look.holdings");
  }
  if (panels.Values) {
    parts.valueStates = make("div", { class: "choices", role: "radiogroup", "aria-label": "state" });
    parts.window = make("div", { class: "window" });
    const hint = make("div", { class: "quiet hint" }, "Hover for value, rank, file and bytes; drag over a part of it to see that part; a click chooses the rank.");
    panels.Values.append(make("div", { class: "states" }, make("span", { class: "quiet" }, "state"), parts.valueStates), parts.window, hint);
    cards(panels.Values, "values.map", "look.mesh");
  }
  if (panels.Reshape) {
    parts.target = sliders("mesh", "zero_stage", "to.works");
    parts.targetRefused = make("div", {});
    panels.Reshape.append(parts.target.box, parts.targetRefused, make("figure", { "data-slot": "to.figures" }));
    cards(panels.Reshape, "to.mesh", "to.tensor", "to.memory", "to.plan", "to.flow", "to.holdings");
  }
  if (panels.Steps) {
    parts.steps = make("div", { class: "choices steps" });
    parts.stepRefused = make("div", {});
    const go = (way) => want({ step: Math.min(Math.max(hands.step + way, 0), model.get("titles").length - 1) });
    parts.back = make("button", { class: "quiet-button", "aria-label": "the step before", onclick: () => go(-1) }, "←");
    parts.next = make("button", { class: "quiet-button", "aria-label": "the next step", onclick: () => go(1) }, "→");
    panels.Steps.append(make("div", { class: "states" }, parts.back, parts.steps, parts.next), parts.stepRefused, make("figure", { "data-slot": "step.text" }), make("figure", { "data-slot": "step.pictures", tabindex: 0 }));
  }

  // What the hands are on: follows the wanted state at once, before anything is computed.
  const controls = (state) => {
    root.dataset.tab = state.tab;
    for (const button of bar.children) {
      const on = button.dataset.tab === state.tab;
      button.setAttribute("aria-selected", String(on));
      button.tabIndex = on ? 0 : -1;
      panels[button.dataset.tab].hidden = !on;
    }
    if (parts.source) {
      parts.source.set(state);
      parts.preset(state);
      for (const [inputs, values] of [[fields_, state.model], [kept_, state.activations]])
        for (const [name, input] of Object.entries(inputs)) {
          if (input.type === "checkbox") input.checked = values[name];
          else if (root.getRootNode().activeElement !== input) input.value = values[name] ?? "";
        }
      kept_.active.parentNode.hidden = !state.model.experts;
    }
    parts.target?.set(state);
    if (parts.steps) {
      const titles = model.get("titles");
      if (parts.steps.childElementCount !== titles.length)
        parts.steps.replaceChildren(...titles.map((name, step) => make("button", { onclick: () => want({ step }) }, name)));
      [...parts.steps.children].forEach((button, i) => button.setAttribute("aria-pressed", String(i === state.step)));
      parts.back.disabled = state.step === 0;
      parts.next.disabled = state.step === titles.length - 1;
    }
    for (const item of tree.querySelectorAll(".leaf")) item.classList.toggle("chosen", item.dataset.name === state.tensor);
  };

  // ------------------------------------------------------------------ showing a state

  const refused = (box, reason, works, meshField, stageField, still) => {
    box.replaceChildren();
    if (!reason) return;
    const chips = Object.entries(works || {}).map(([axis, degrees]) =>
      make(
        "span",
        { class: "works" },
        `${axis} `,
        ...degrees.map((n) =>
          make("button", { "data-axis": axis, "data-degree": n, onclick: () => want(axis === "ZeRO" ? { [stageField]: n } : { [meshField]: hands[meshField].map(([a, m]) => [a, a === axis ? n : m]) }) }, String(n)),
        ),
      ),
    );
    box.append(make("div", { class: "refused", role: "alert" }, reason, chips.length ? make("div", { class: "degrees" }, "Degrees that work, each by itself: ", ...chips) : "", still ? make("div", { class: "quiet" }, still) : ""));
  };

  let ofTab = {}; // the state whose pictures each tab has
  const titles = {}; // and what it is called
  const show = (state) => {
    busy(false);
    const about = part("about", state);
    const figures = tabs[state.tab].includes("to.figures") ? part("to.figures", state) : null;
    const stopped = about.refused || figures?.refused;
    const kept = ofTab[state.tab];
    const mesh = (s) => (s ? spoken(state.tab === "Model" ? s.source_mesh : s.mesh) : "");
    const still = kept ? `The pictures are still of ${mesh(kept)}.` : "";
    root.classList.toggle("stale", Boolean(stopped));
    if (parts.sourceRefused) refused(parts.sourceRefused, about.refused, part("source.works", state), "source_mesh", "source_stage", still);
    if (parts.targetRefused) refused(parts.targetRefused, figures?.refused, part("to.works", state), "mesh", "zero_stage", still);
    if (parts.stepRefused) refused(parts.stepRefused, figures?.refused, part("to.works", state), "mesh", "zero_stage", still);
    line.textContent = part(`line.${state.tab}`, state);
    if (!stopped) {
      ofTab = { ...ofTab, [state.tab]: state };
      title.textContent = titles[state.tab] = figures ? figures.title : about.title;
      fill(tree, part("tensors", state), state);
      for (const box of [parts.states, parts.valueStates]) if (box) choices(box, part("states", state) || [], state);
      if (state.tab === "Values") windows(part("values.map", state)?.grid);
      for (const figure of panels[state.tab].querySelectorAll("figure")) {
        const slot = figure.dataset.slot;
        const content = slot === "to.figures" ? figures.html : part(slot, state);
        if (figure.content !== content) {
          figure.innerHTML = content?.svg || content || "";
          figure.content = content;
          figure.grid = content?.grid && unpacked(content.grid);
          figure.hidden = !content;
          for (const told of figure.querySelectorAll("svg title")) {
            told.parentNode.dataset.tip = told.textContent;
            told.remove();
          }
        }
        figure.dataset.of = slot.startsWith("to.") || slot.startsWith("step") ? spoken(state.mesh) : spoken(about.axes);
      }
      mark(state);
    }
    shown = state;
    root.dataset.shown = spoken(state.tab === "Model" ? state.source_mesh : state.mesh);
  };
  const choices = (box, states, state) => {
    box.replaceChildren(
      ...states.map((name) => make("button", { role: "radio", "aria-checked": String(name === state.state), "aria-pressed": String(name === state.state), onclick: () => want({ state: name }) }, name)),
    );
  };

  // ------------------------------------------------------------------ values

  // What of a tensor is shown: of the last two dims from where to where, of those before them which index.
  const windows = (grid) => {
    parts.window.hidden = !grid;
    if (!grid || parts.window.grid === grid) return;
    parts.window.grid = grid;
    const { dims, shape, window } = grid;
    const field = (i, end) => {
      const lead = i < dims.length - 2;
      const input = make("input", { type: "number", min: end, max: shape[i] - 1 + end, value: window[i][end], "aria-label": `${dims[i]} ${lead ? "index" : end ? "up to" : "from"}` });
      input.onchange = () => {
        const next = window.map((pair) => [...pair]);
        const n = Math.min(Math.max(Math.round(Number(input.value)), end), shape[i] - 1 + end);
        next[i][end] = n;
        if (lead) next[i] = [n, n + 1];
        else if (next[i][0] >= next[i][1]) next[i][1 - end] = end ? n - 1 : n + 1;
        look(next);
      };
      return input;
    };
    const look = (next) => want({ window: next.every(([a, b], i) => a === 0 && b === shape[i]) ? [] : next });
    parts.window.look = look;
    parts.window.replaceChildren(
      ...dims.map((dim, i) => make("label", {}, `${dim} `, field(i, 0), ...(i < dims.length - 2 ? [` of ${shape[i]}`] : [" : ", field(i, 1)]))),
      make("button", { class: "quiet-button", onclick: () => want({ window: [] }) }, "whole"),
    );
    parts.window.lastChild.disabled = window.every(([a, b], i) => a === 0 && b === shape[i]);
  };
  // The cell of a heat map at a place of the page: [row, column].
  const cellAt = (figure, x, y) => {
    const box = figure.querySelector(".heat")?.getBoundingClientRect();
    if (!box) return null;
    const [rows, columns] = figure.grid.cells;
    const at = [Math.floor(((y - box.top) / box.height) * rows), Math.floor(((x - box.left) / box.width) * columns)];
    return at[0] >= 0 && at[0] < rows && at[1] >= 0 && at[1] < columns ? at : null;
  };
  const element = (grid, [i, j], axes) => {
    const k = i * grid.cells[1] + j;
    const index = [...grid.window.slice(0, -2).map(([a]) => a), grid.row[k], grid.column[k]].slice(-grid.dims.length || 3);
    const value = grid.values[k];
    const text = Number.isFinite(value) ? Number(value.toPrecision(grid.digits)) : value;
    const { ranks, file, start, offset } = grid.places[grid.place[k]];
    const first = offset + (grid.at[k] - start) * grid.size;
    const span = grid.size > 1 ? `bytes ${first.toLocaleString("en")}–${(first + grid.size - 1).toLocaleString("en")}` : `byte ${first.toLocaleString("en")}`;
    const most = grid.steps[0] * grid.steps[1] > 1 ? "largest here: " : "";
    const who = ranks.length === 1 ? named(ranks[0], axes) : `ranks ${ranks.slice(0, 8).join(", ")}${ranks.length > 8 ? ` and ${ranks.length - 8} more` : ""}`;
    return [`${most}[${grid.dims.map((dim, d) => `${dim} ${index[d]}`).join(", ")}] = ${text}`, file ? `${who} · ${file}, ${span}` : who];
  };
  // A frame in a heat map around cells, from one corner to the other; nothing takes it away.
  const frame = (figure, from, to) => {
    figure.querySelector(".ckptlab-cursor")?.remove();
    const area = from && figure.querySelector(".heat");
    if (!area) return;
    const [x, y, w, h] = ["x", "y", "width", "height"].map((name) => Number(area.getAttribute(name)));
    const [rows, columns] = figure.grid.cells;
    const mark = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    const low = [0, 1].map((d) => Math.min(from[d], to[d]));
    const high = [0, 1].map((d) => Math.max(from[d], to[d]) + 1);
    const box = { x: x + (w * low[1]) / columns, y: y + (h * low[0]) / rows, width: (w * (high[1] - low[1])) / columns, height: (h * (high[0] - low[0])) / rows };
    for (const [name, value] of Object.entries(box)) mark.setAttribute(name, value);
    mark.setAttribute("class", "ckptlab-chosen ckptlab-cursor");
    area.ownerSVGElement.append(mark);
  };
  const pointAt = (figure, at) => {
    figure.at = at;
    frame(figure, at, at);
    tip.hidden = !at;
    if (!at || !shown) return;
    tip.replaceChildren(...element(figure.grid, at, axesOf("look", shown)).map((text) => make("div", {}, text)));
    const box = figure.querySelector(".ckptlab-cursor").getBoundingClientRect();
    const around = root.getBoundingClientRect();
    tip.style.left = `${Math.min(Math.max(box.left - around.left, 0), Math.max(around.width - tip.offsetWidth - 4, 0))}px`;
    tip.style.top = `${box.bottom - around.top + 8}px`;
  };
  const cut = (figure, from, to) => {
    const { window, steps } = figure.grid;
    const next = window.map((pair) => [...pair]);
    for (const d of [0, 1]) {
      const dim = next.length - 2 + d;
      if (dim < 0) continue;
      const [start, stop] = window[dim];
      next[dim] = [start + Math.min(from[d], to[d]) * steps[d], Math.min(start + (Math.max(from[d], to[d]) + 1) * steps[d], stop)];
    }
    parts.window.look(next);
  };
  let drag = null;
  root.addEventListener("pointerdown", (event) => {
    const figure = event.target.closest?.("figure");
    const at = figure?.grid && cellAt(figure, event.clientX, event.clientY);
    drag = at ? { figure, from: at, to: at } : null;
    if (at) event.preventDefault();
  });
  root.addEventListener("pointermove", (event) => {
    const figure = drag?.figure || event.target.closest?.("figure");
    if (!figure?.grid) return;
    const at = cellAt(figure, event.clientX, event.clientY);
    if (!drag) return pointAt(figure, at);
    drag.to = at || drag.to;
    frame(figure, drag.from, drag.to);
  });
  root.addEventListener("pointerup", () => {
    const done = drag;
    drag = null;
    if (!done) return;
    const far = String(done.from) !== String(done.to);
    if (far) cut(done.figure, done.from, done.to);
    else {
      const k = done.from[0] * done.figure.grid.cells[1] + done.from[1];
      want({ rank: done.figure.grid.places[done.figure.grid.place[k]].ranks[0] });
    }
  });

  // ------------------------------------------------------------------ cells

  const catalogOf = (slot) => (slot.startsWith("to.") ? "to" : "look");
  const axesOf = (slot, state) => (catalogOf(slot) === "to" ? part("to.figures", state)?.axes : part("about", state)?.axes) || [];
  const place = (rank, axes) => {
    const found = {};
    for (const [axis, n] of [...axes].reverse()) {
      found[axis] = rank % n;
      rank = Math.floor(rank / n);
    }
    return found;
  };
  // The ranks that a cell stands for.
  const ranksOf = (cell, axes) => {
    const data = cell.dataset;
    if (data.rank !== undefined) return numbers(data.rank);
    const said = axes.filter(([axis]) => data[axis] !== undefined && axis in data);
    if (!said.length || data.source !== undefined || data.elements !== undefined) return [];
    const size = axes.reduce((product, [, n]) => product * n, 1);
    const allowed = said.map(([axis]) => [axis, new Set(numbers(data[axis]))]);
    const found = [];
    for (let rank = 0; rank < size && found.length < 4096; rank++) {
      const at = place(rank, axes);
      if (allowed.every(([axis, some]) => some.has(at[axis]))) found.push(rank);
    }
    return found;
  };
  const named = (rank, axes) => {
    const at = place(rank, axes);
    return `rank ${rank}: ${spoken(axes.map(([axis]) => [axis, at[axis]]))}`;
  };
  const holds = (table, rank) => (table ? table.lines[table.of[rank] ?? -1] || [] : []);
  const told = (cell, slot, state) => {
    const lines = cell.dataset.tip ? [cell.dataset.tip] : [];
    const axes = axesOf(slot, state);
    const table = part(`${catalogOf(slot)}.held`, state);
    const { tensor, kind, source } = cell.dataset;
    if (!table || kind || source !== undefined || (tensor && tensor !== state.tensor)) return lines;
    const ranks = ranksOf(cell, axes);
    const having = ranks.filter((rank) => holds(table, rank).length);
    if (ranks.length === 1 && !having.length) return [`${named(ranks[0], axes)} · holds nothing of ${state.state} of ${state.tensor}`];
    if (ranks.length === 1) return holds(table, ranks[0]).map((text) => `${named(ranks[0], axes)} · ${text}`);
    for (const rank of having.slice(0, SHOWN)) lines.push(...holds(table, rank).map((text) => `${named(rank, axes)} · ${text}`));
    if (having.length > SHOWN) lines.push(`and ${having.length - SHOWN} more ranks`);
    return lines;
  };
  const chosenRank = (slot, state) => (catalogOf(slot) === "to" ? state.target_rank : state.rank);
  // The chosen rank and the chosen tensor have an outline wherever they are, above all cells.
  const mark = (state) => {
    for (const figure of panels[state.tab].querySelectorAll("figure")) {
      const slot = figure.dataset.slot;
      for (const old of figure.querySelectorAll(".ckptlab-chosen")) old.remove();
      for (const cell of figure.querySelectorAll("svg [data-tensor], svg .rank, svg .region")) {
        const tensor = cell.dataset.tensor === state.tensor;
        const rank = (cell.classList.contains("rank") || cell.classList.contains("region")) && numbers(cell.dataset.rank).includes(chosenRank(slot, state));
        if (!tensor && !rank) continue;
        const frame = cell.cloneNode(false);
        for (const { name } of [...frame.attributes]) if (!["x", "y", "width", "height", "rx", "d"].includes(name)) frame.removeAttribute(name);
        frame.setAttribute("class", `ckptlab-chosen ${tensor ? "of-tensor" : "of-rank"}`);
        cell.ownerSVGElement.append(frame);
      }
    }
  };
  const light = (cell, slot) => {
    for (const old of root.querySelectorAll(".ckptlab-lit")) old.classList.remove("ckptlab-lit");
    if (!cell || !shown) return;
    const axes = axesOf(slot, shown);
    const ranks = new Set(ranksOf(cell, axes));
    const { tensor } = cell.dataset;
    for (const other of panels[shown.tab].querySelectorAll(`figure svg .cell`)) {
      if (!ranks.size && !(tensor && other.dataset.tensor === tensor)) continue;
      if (ranks.size && other.closest("figure").dataset.slot !== slot && !ranksOf(other, axes).some((rank) => ranks.has(rank))) continue;
      if (ranks.size && other.closest("figure").dataset.slot === slot && other !== cell) continue;
      other.classList.add("ckptlab-lit");
    }
  };
  const point = (cell) => {
    const slot = cell?.closest("figure")?.dataset.slot;
    const lines = cell && shown ? told(cell, slot, ofTab[shown.tab] || shown) : [];
    tip.hidden = !lines.length;
    light(cell, slot);
    if (!lines.length) return;
    tip.replaceChildren(...lines.map((text) => make("div", {}, text)));
    const box = cell.getBoundingClientRect();
    const frame = root.getBoundingClientRect();
    const left = Math.min(Math.max(box.left - frame.left, 0), Math.max(frame.width - tip.offsetWidth - 4, 0));
    const below = box.bottom - frame.top + 6;
    tip.style.left = `${left}px`;
    tip.style.top = `${below}px`;
  };
  const press = (cell) => {
    const slot = cell.closest("figure").dataset.slot;
    const state = shown;
    const axes = axesOf(slot, state);
    const ranks = ranksOf(cell, axes);
    const { tensor } = cell.dataset;
    const table = tensor && tensor !== state.tensor ? null : part(`${catalogOf(slot)}.held`, state);
    const rank = (table && ranks.find((one) => holds(table, one).length)) ?? ranks[0];
    const changes = {};
    if (rank !== undefined && state.tab !== "Steps") changes[catalogOf(slot) === "to" ? "target_rank" : "rank"] = rank;
    if (tensor && part("tensors", state)?.names.includes(tensor)) changes.tensor = tensor;
    if (Object.keys(changes).length) want(changes);
  };
  const cellOf = (target) => (target.closest?.("figure svg") ? target.closest(CELL) : null);
  let hovered = null;
  root.addEventListener("mouseover", ({ target }) => {
    const cell = cellOf(target);
    if (cell?.closest("figure").grid) return light((hovered = cell), "values.map");
    if (cell !== hovered) point((hovered = cell));
  });
  root.addEventListener("mouseleave", () => {
    point((hovered = null));
    for (const figure of root.querySelectorAll("figure")) if (figure.grid) frame(figure, null);
  });
  root.addEventListener("click", ({ target }) => {
    const cell = cellOf(target);
    if (cell && !cell.closest("figure").grid) press(cell);
  });
  // Arrows walk from cell to cell of a picture that has the focus; Enter is a click.
  root.addEventListener("keydown", (event) => {
    const figure = event.target.closest?.("figure");
    const ways = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (!figure || event.target !== figure || !(event.key in ways || event.key === "Enter" || event.key === "Escape")) return;
    if (figure.grid) {
      event.preventDefault();
      if (event.key === "Escape") return pointAt(figure, null);
      if (event.key === "Enter") return figure.at && want({ rank: figure.grid.places[figure.grid.place[figure.at[0] * figure.grid.cells[1] + figure.at[1]]].ranks[0] });
      const [right, down] = ways[event.key];
      const at = figure.at ? [figure.at[0] + down, figure.at[1] + right] : [0, 0];
      return at.every((n, d) => n >= 0 && n < figure.grid.cells[d]) && pointAt(figure, at);
    }
    const cells = [...figure.querySelectorAll(`svg :is(${CELL})`)].filter((cell) => cell.getAttribute("pointer-events") !== "none");
    if (!cells.length) return;
    event.preventDefault();
    if (event.key === "Escape") return point((hovered = null));
    if (event.key === "Enter") return cells.includes(hovered) && press(hovered);
    if (!cells.includes(hovered)) return point((hovered = cells[0]));
    const middle = (cell) => {
      const box = cell.getBoundingClientRect();
      return [box.left + box.width / 2, box.top + box.height / 2];
    };
    const [x, y] = middle(hovered);
    const [dx, dy] = ways[event.key];
    const far = (cell) => {
      const [a, b] = middle(cell);
      const along = (a - x) * dx + (b - y) * dy;
      return along > 1 ? along + 3 * Math.abs((a - x) * dy + (b - y) * dx) : Infinity;
    };
    const next = cells.reduce((best, cell) => (far(cell) < far(best) ? cell : best), hovered);
    if (far(next) < Infinity) point((hovered = next));
  });

  // ------------------------------------------------------------------ the tree of names

  const fill = (box, tensors, state) => {
    if (box.tensors === tensors) return;
    box.tensors = tensors;
    const { names, notes } = tensors;
    const search = box.querySelector("input") || make("input", { type: "search", placeholder: "search tensors", "aria-label": "search tensors" });
    const list = make("div", { class: "list" });
    const leaf = (index, text) => {
      const item = make("button", { class: "leaf", "data-name": names[index], title: `${names[index]}  ${notes[index]}`, onclick: () => want({ tensor: names[index] }) }, make("span", {}, text), make("small", {}, notes[index]));
      item.classList.toggle("chosen", names[index] === hands.tensor);
      return item;
    };
    const grow = (parent, map, chosen) => {
      for (let [text, below] of map) {
        while (below instanceof Map && below.size === 1) {
          const [[next, further]] = below;
          text += `.${next}`;
          below = further;
        }
        if (!(below instanceof Map)) {
          parent.append(leaf(below, text));
          continue;
        }
        const inside = make("div");
        const branch = make("details", {}, make("summary", {}, text), inside);
        const size = text.split(".").length;
        const mine = chosen.slice(0, size).join(".") === text;
        branch.addEventListener("toggle", () => branch.open && !inside.childElementCount && grow(inside, below, mine ? chosen.slice(size) : []));
        parent.append(branch);
        if (mine) {
          branch.open = true;
          if (!inside.childElementCount) grow(inside, below, chosen.slice(size));
        }
      }
    };
    const draw = () => {
      list.replaceChildren();
      const words = search.value.trim().toLowerCase().split(/\s+/).filter(Boolean);
      if (!words.length) return grow(list, branches(names), hands.tensor.split("."));
      const found = names.map((name, index) => [name, index]).filter(([name]) => words.every((word) => name.toLowerCase().includes(word)));
      list.append(...found.slice(0, MATCHES).map(([name, index]) => leaf(index, name)));
      if (!found.length) list.append(make("div", { class: "quiet" }, "no tensor has that in its name"));
      if (found.length > MATCHES) list.append(make("div", { class: "quiet" }, `and ${found.length - MATCHES} more`));
    };
    search.oninput = draw;
    box.replaceChildren(make("summary", {}, `${names.length.toLocaleString("en")} tensor${names.length === 1 ? "" : "s"}`), search, list);
    draw();
  };

  // ------------------------------------------------------------------ width

  let settle = null;
  const measure = () => {
    const width = root.clientWidth;
    if (!width) return;
    root.classList.toggle("narrow", width < 900);
    if (root.wasNarrow !== width < 900) tree.open = !(root.wasNarrow = width < 900);
    const panel = main.clientWidth;
    const columns = panel >= 920 ? 2 : 1;
    root.style.setProperty("--columns", columns);
    const column = Math.floor((panel - (columns - 1) * 24 - 2) / columns / 20) * 20;
    if (live && column > 0 && column !== hands.width) want({ width: Math.max(column, 280) });
  };
  const resized = new ResizeObserver(() => {
    clearTimeout(settle);
    settle = setTimeout(measure, shown ? 120 : 0);
  });
  resized.observe(root);

  model.on("change:view", answered);
  const fromKernel = () => {
    if (waiting || pending) return;
    hands = said();
    refresh();
  };
  for (const name of fields) model.on(`change:${name}`, fromKernel);
  answered();
  measure();
  return () => {
    resized.disconnect();
    clearTimeout(settle);
    clearTimeout(patience);
    model.off("change:view", answered);
    for (const name of fields) model.off(`change:${name}`, fromKernel);
  };
}

// The tables of a heat map, from base64.
function unpacked(grid) {
  const read = (text, Kind) => new Kind(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
  return {
    ...grid,
    values: read(grid.values, Float64Array),
    at: read(grid.at, Float64Array),
    row: read(grid.row, Int32Array),
    column: read(grid.column, Int32Array),
    place: read(grid.place, Int32Array),
  };
}

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

export default { render };
