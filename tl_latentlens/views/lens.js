// The lens switch, the color legend, and what a cell's panel shows.

function addLensButtons(choose) {
  for (const lens of data.lenses) {
    const button = make("button", lens.name);
    button.dataset.key = lens.key;
    button.addEventListener("click", () => choose(lens));
    $("lenses").append(button, " ");
  }
}

function showLens({ key, scale, low, high }) {
  document.documentElement.dataset.lens = key;
  $("key").replaceChildren(`${scale} ${low.toFixed(2)}`, make("i"), high.toFixed(2));
  for (const button of $("lenses").children) button.setAttribute("aria-pressed", button.dataset.key === key);
}

// The color of a cell by the score of its first entry: a neighbor's cosine or chance, or a token's score.
function background({ key, low, high }, found) {
  const value = key !== "latentlens" ? found[1] : data.calibrated ? -Math.log10(found[3]) : found[2];
  const share = Math.min(1, Math.max(0, (value - low) / (high - low)));
  return `rgb(var(--hue) / calc(var(--strength) * ${share.toFixed(3)}))`;
}

function isFaint({ key }, found) { return key === "latentlens" && data.calibrated && found[3] >= data.chance; }

function readings(text, layer, at) {
  const list = make("ol", "", "contexts"), found = text.latentlens[layer][at];
  const parts = [list], step = data.calibrated ? 4 : 3;
  for (let i = 0; i < found.length; i += step) {
    const [before, token, after] = data.contexts[found[i]], item = make("li");
    const figure = found[i + 2].toFixed(3) + (data.calibrated ? `  p ${found[i + 3].toPrecision(2)}` : "");
    item.append(make("span", figure, "figure"), before, make("mark", token), after, " ", make("small", data.hooks[found[i + 1]]));
    if (data.calibrated && found[i + 3] >= data.chance) item.className = "faint";
    list.append(item);
  }
  for (const { key, name } of data.lenses.slice(1)) {
    const tokens = text[key][layer] && text[key][layer][at];
    if (!tokens) continue;
    const line = make("div");
    line.append(make("small", `${name}: `));
    for (let i = 0; i < tokens.length; i += 2) {
      const score = key === "logit_lens" ? `${Math.round(100 * tokens[i + 1])}%` : tokens[i + 1].toFixed(2);
      line.append(make("span", `${data.strings[tokens[i]]}  ${score}`, "chip"));
    }
    parts.push(line);
  }
  return parts;
}
