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

const numberAt = (numbers, layer, at) => numbers ? numbers[layer][at] : null;

// The color of a cell: how well the bank knows the token, or the score of the cell's first entry.
function background({ key, scale, low, high }, found, known) {
  const value = key !== "latentlens" ? found[1] : scale === "known" ? known : found[2];
  const share = Math.min(1, Math.max(0, (value - low) / (high - low)));
  return `rgb(var(--hue) / calc(var(--strength) * ${share.toFixed(3)}))`;
}

function isFaint({ key }, known) { return key === "latentlens" && known !== null && known <= data.unknown; }

function knownLine(known, use) {
  const line = make("div", `known ${known < 0.01 ? "<.01" : known.toFixed(2)}`, "known");
  if (known <= data.unknown) line.append(": the bank does not know this token");
  if (use !== null) line.append(` · as near to the first: ${Math.round(100 * use)}% of the token's other uses`);
  return line;
}

function readings(text, layer, at) {
  const list = make("ol", "", "contexts"), found = text.latentlens[layer][at];
  const known = numberAt(text.known, layer, at), parts = [list];
  if (known !== null) parts.unshift(knownLine(known, numberAt(text.use, layer, at)));
  if (isFaint(data.lenses[0], known)) list.classList.add("faint");
  for (let i = 0; i < found.length; i += 3) {
    const [before, token, after] = data.contexts[found[i]], item = make("li");
    item.append(make("span", found[i + 2].toFixed(3), "figure"), before, make("mark", token), after, " ", make("small", data.hooks[found[i + 1]]));
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
