"use strict";
(() => {
  const tools = document.getElementById("tools");
  const filter = document.getElementById("filter");
  const shown = document.getElementById("shown");
  const words = document.getElementById("words");
  const scheme = document.getElementById("scheme");
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const marked = "[data-model], [data-kind], [data-prompt]";
  const items = all(marked);
  const groups = all("[data-group]");
  const pictures = all("figure.shot");
  const views = [];
  // What is last within its group decides whether anything of the group is left.
  const leaves = new Map(groups.map((group) => [group, all(marked, group).filter((one) => !one.querySelector(marked))]));

  // Offers a box to tick for every model, or kind, that occurs on the page.
  function offer(choices) {
    const values = [...new Set(items.map((item) => item.dataset[choices.dataset.of]).filter((value) => value !== undefined))];
    choices.closest("fieldset").hidden = values.length < 2;
    for (const value of values) {
      const label = document.createElement("label");
      const box = document.createElement("input");
      box.type = "checkbox";
      box.defaultChecked = true;
      box.value = value;
      label.append(box, value);
      choices.append(label);
    }
    return values.length > 1;
  }

  function chosen(name) {
    return new Set(all(`[data-of="${name}"] input:checked`, tools).map((box) => box.value));
  }

  function apply() {
    const models = chosen("model");
    const kinds = chosen("kind");
    const text = words.value.trim().toLowerCase();
    for (const item of items) {
      const { model, kind, prompt } = item.dataset;
      const off = (model !== undefined && !models.has(model)) || (kind !== undefined && !kinds.has(kind))
        || (prompt !== undefined && !prompt.toLowerCase().includes(text));
      item.classList.toggle("off", off);
    }
    for (const group of groups) {
      const own = group.classList.contains("off");
      group.classList.remove("off");
      group.classList.toggle("off", own || leaves.get(group).every((leaf) => leaf.closest(".off")));
    }
    for (const view of views) view.signal("hidden", [...all(`[data-of="model"] input:not(:checked)`, tools)].map((box) => box.value)).runAsync();
    const left = pictures.filter((picture) => !picture.closest(".off")).length;
    shown.textContent = pictures.length ? `${left} of ${pictures.length} pictures` : "";
  }

  const useful = all(".choices", tools).map(offer).some(Boolean) || pictures.length > 0;
  filter.hidden = !useful;
  tools.querySelector(".words").hidden = !document.querySelector("[data-prompt]");
  filter.addEventListener("submit", (event) => event.preventDefault());
  filter.addEventListener("input", apply);
  filter.querySelector('[type="reset"]').addEventListener("click", (event) => {
    event.preventDefault();
    filter.reset();
    apply();
  });
  // Puts a live chart in the place of its drawing; expressions are interpreted, because the page forbids evaluation.
  async function enliven(plot) {
    const spec = JSON.parse(plot.parentElement.querySelector(".spec").textContent);
    const live = document.createElement("div");
    const options = { renderer: "svg", ast: true, actions: false, tooltip: { theme: "custom" } };
    const { view } = await vegaEmbed(live, spec, options);
    const drawn = live.querySelector("svg");
    drawn.removeAttribute("role");
    drawn.setAttribute("aria-hidden", "true");
    drawn.setAttribute("style", "");
    plot.replaceChildren(live);
    if (spec.params?.some((one) => one.name === "hidden")) views.push(view);
  }

  scheme.addEventListener("change", () => { document.documentElement.style.colorScheme = scheme.value; });
  tools.hidden = false;
  apply();
  if (window.vegaEmbed) Promise.all(all(".plot").map(enliven)).then(apply);
})();
