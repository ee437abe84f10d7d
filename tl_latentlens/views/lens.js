// The lens switch, the color legend, and what a cell's panel shows.

function addLensButtons(choose) {
  for (const lens of data.lenses) {
    const button = make("button", lens.switch);
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
const isOfVocabulary = key => key === "logit_lens" || key === "embedding_lens";

// What a lens puts into a cell: the letters before, the token or word, the letters after; null where it did not read.
function entry({ key }, text, layer, at) {
  const found = text[key][layer] && text[key][layer][at];
  if (!found) return null;
  if (key === "latentlens") {
    const [, token, , lead, tail] = data.contexts[found[0]];
    return [lead, token, tail];
  }
  return found.length ? ["", data.strings[found[0]], ""] : ["", "", ""];
}

// Show it in a node: a token that is a part of its word in bold, a faint point where there is no word.
function fill(node, shown) {
  const [lead, token, tail] = shown || ["", "", ""];
  node.classList.toggle("none", !!shown && !token);
  if (!lead && !tail) node.textContent = shown && !token ? "·" : token;
  else node.replaceChildren(lead, make("b", token), tail);
}

// The color of a cell: how well the bank knows the token, or the score of the cell's first entry.
function background({ key, scale, low, high }, text, layer, at) {
  const found = isOfVocabulary(key) ? text[key][layer] && text[key][layer][at] : text.latentlens[layer][at];
  if (!found) return "";
  const value = isOfVocabulary(key) ? found[1] : scale === "known" ? text.known[layer][at] : found[2];
  const share = Math.min(1, Math.max(0, (value - low) / (high - low)));
  return `rgb(var(--hue) / calc(var(--strength) * ${share.toFixed(3)}))`;
}

function isUnknown(text, layer, at) {
  const known = numberAt(text.known, layer, at);
  return known !== null && known <= data.unknown;
}

const isFaint = ({ key }, text, layer, at) => !isOfVocabulary(key) && isUnknown(text, layer, at);

function knownLine(known, use) {
  const line = make("div", `known ${known < 0.01 ? "<.01" : known.toFixed(2)}`, "known");
  line.title = "the share of the bank's own tokens that are no nearer to their nearest use";
  if (known <= data.unknown) line.append(": the bank does not know this token");
  if (use !== null) line.append(` · as near to the first: ${Math.round(100 * use)}% of the token's other uses`);
  return line;
}

// A line of words, or of tokens with their scores.
function chips(name, texts, scores) {
  const line = make("div", undefined, "reading");
  line.append(make("small", `${name}: `));
  if (!texts.length) line.append(make("small", "none"));
  texts.forEach((text, i) => line.append(make("span", scores ? `${text}  ${scores[i]}` : text, "chip")));
  return line;
}

function uses(text, layer, at) {
  const list = make("ol", "", "contexts"), found = text.latentlens[layer][at];
  for (let i = 0; i < found.length; i += 3) {
    const [before, token, after] = data.contexts[found[i]], item = make("li"), rank = i / 3;
    item.append(make("span", found[i + 2].toFixed(3), "figure"), before, make("mark", token), after, " ", make("small", data.hooks[found[i + 1]]));
    const also = text.also && data.strings[text.also[layer][at][rank]];
    if (also) item.append(" ", make("small", also));
    if (text.jumps[layer][at].includes(rank)) {
      item.classList.add("jump");
      item.title = data.jump;
    }
    list.append(item);
  }
  return list;
}

// What one lens reads in a cell, as a part of a panel.
function reading({ key, name }, found, text, layer, at) {
  if (key === "latentlens") return uses(text, layer, at);
  if (!isOfVocabulary(key)) return chips(name, found.map(i => data.strings[i]));
  const format = key === "logit_lens" ? score => `${Math.round(100 * score)}%` : score => score.toFixed(2);
  return chips(name, found.filter((_, i) => i % 2 === 0).map(i => data.strings[i]), found.filter((_, i) => i % 2).map(format));
}

// From top to bottom: how well the bank knows the token, its other words, words around, its uses, what the other lenses read.
function readings(text, layer, at) {
  const known = numberAt(text.known, layer, at), parts = [];
  if (known !== null) parts.push(knownLine(known, numberAt(text.use, layer, at)));
  for (const key of ["words", "around", "latentlens", "logit_lens", "embedding_lens"]) {
    const lens = data.lenses.find(one => one.key === key), found = lens && text[key][layer] && text[key][layer][at];
    if (!found || key === "around" && !found.length) continue;
    const part = reading(lens, found, text, layer, at);
    part.classList.toggle("faint", isFaint(lens, text, layer, at));
    parts.push(part);
  }
  return parts;
}

// The other words of a token over all layers: a line for each run of layers that read alike; a click chooses its last layer.
function strip(text, layer, at, choose) {
  const part = make("section", undefined, "strip"), list = make("ol");
  part.append(make("h3", `«${text.tokens[at].trim()}» over the layers`), list, make("small", data.strip));
  for (const [first, last, words] of [...text.strips[at]].reverse()) {
    const line = make("li"), button = make("button", first === last ? data.headings[first] : `${data.headings[first]}–${data.headings[last]}`);
    button.addEventListener("click", () => choose(last));
    if (first <= layer && layer <= last) line.setAttribute("aria-current", "true");
    const layers = Array.from({ length: last - first + 1 }, (_, i) => first + i);
    const isDim = !words.length || layers.every(one => isUnknown(text, one, at));
    line.append(button, make("span", words.map(i => data.strings[i]).join(", ") || "·", isDim ? "none" : ""));
    list.append(line);
  }
  return part;
}
