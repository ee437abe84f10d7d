// The card of one feature of the page of features, and the search in the contexts of all cards.

const arrays = {};
let unpacking, unpacked = false;

async function unpackAll() {
  await (unpacking ??= Promise.all(Object.keys(data.arrays).map(unpack)));
  unpacked = true;
}

async function unpack(name) {
  const { type, data: text } = data.arrays[name], binary = atob(text), bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  arrays[name] = new globalThis[type](await new Response(stream).arrayBuffer());
}

function part(name, at) {
  const size = data.arrays[name].shape.slice(1).reduce((a, b) => a * b, 1);
  return arrays[name].subarray(at * size, (at + 1) * size);
}

function shape(tag, attributes) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

function bars(counts, extra) {
  const most = Math.max(1, ...counts), svg = shape("svg", { viewBox: `0 0 ${counts.length || 1} 1`, preserveAspectRatio: "none", "aria-hidden": true });
  svg.append(...counts.map((count, i) => shape("rect", { x: i + 0.05, width: 0.9, y: 1 - count / most, height: count / most, ...extra })));
  return svg;
}

const isKnown = value => value !== undefined && value !== null;

function scores(line) {
  const grid = make("div", undefined, "scores");
  for (const { name, heading, p: pName, low, high, nulls, counts: countsOf, beside } of data.scores) {
    const value = figures[name][line], bin = nulls.length > 1 ? data.bins[line] : 0, null_ = nulls[bin] ?? null;
    if (value === null) continue;
    const counts = countsOf[bin] || [], svg = bars(counts, { class: "null" }), width = counts.length || 1;
    const x = figure => width * Math.min(1, Math.max(0, (figure - low) / (high - low)));
    const line_ = (figure, extra) => shape("rect", { x: x(figure) - width * 0.006, width: width * 0.012, y: 0, height: 1, ...extra });
    const [from, to] = [figures[`${name}_low`], figures[`${name}_high`]].map(values => values && values[line]);
    if (isKnown(from)) svg.append(shape("rect", { x: x(from), width: x(to) - x(from), y: 0.3, height: 0.4, class: "interval" }));
    if (null_ !== null && !counts.length) svg.append(line_(null_, { class: "null" }));
    svg.append(line_(value, { class: "value" }));
    const p = figures[pName], parts = [figure(value)];
    if (isKnown(from)) parts[0] += ` (${figure(from)} to ${figure(to)})`;
    if (null_ !== null) parts.push(`${beside}\u00a0${figure(null_)}`);
    if (p) parts.push(`p\u00a0${figure(p[line])}`);
    grid.append(make("span", heading), svg, make("small", parts.join(" · ")));
  }
  return grid;
}

function histogram(counts, line) {
  const from = counts.findIndex(count => count), to = counts.findLastIndex(count => count), box = make("div", undefined, "histogram");
  const shown = Array.from(counts.slice(from, to + 1)), ends = make("div");
  ends.append(make("small", from ? figure(data.edges[from - 1]) : "0"), make("small", figure(to < data.edges.length ? data.edges[to] : figures.max_activation[line])));
  box.append(bars(shown, {}), ends);
  const svg = box.firstChild;
  svg.removeAttribute("aria-hidden");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", "histogram of activations");
  return box;
}

function marked(token) {
  const bare = token.trimStart();
  return bare ? [token.slice(0, token.length - bare.length), make("mark", bare)] : [make("mark", "␣".repeat(token.length))];
}

function context(place, shades, largest) {
  const { tokens } = arrays, parts = [];
  let at = place, from = place, to = place;
  while (tokens[at] === JOINED) at--;
  while (from > place - BEFORE && tokens[from - 1] > END) from--;
  while (to < place + AFTER && tokens[to + 1] > END) to++;
  while (tokens[from] === JOINED) from++;
  if (from > place - BEFORE ? tokens[from - 1] === CUT : tokens[from - 1] !== END) parts.push("…");
  for (let i = from; i <= to; i++) {
    if (tokens[i] === JOINED) continue;
    const text = strings[tokens[i]], shown = i === at ? marked(text) : [text];
    if (!shades) { parts.push(...shown); continue; }
    let shade = shades[i - place + BEFORE];
    for (let j = i + 1; j <= to && tokens[j] === JOINED; j++) shade = Math.max(shade, shades[j - place + BEFORE]);
    const known = shade !== data.unknown, span = make("span", undefined, known ? "" : "faint");
    span.title = known ? figure(largest * shade / 254) : "not in the bank";
    if (known && shade) span.style.background = `rgb(var(--shade) / ${(0.75 * shade / 254).toFixed(3)})`;
    span.append(...shown);
    parts.push(span);
  }
  if (tokens[to + 1] !== END) parts.push("…");
  return parts;
}

// ----------------------------------------------------------------------------------------------- the search in contexts

let stream;

// The text of all contexts in small letters, where each token begins in it, and the first and last token of its text.
function readStream() {
  const { tokens } = arrays, small = strings.map(text => text.toLowerCase()), n = tokens.length;
  small[CUT] = small[END] = "\0";
  small[JOINED] = "";
  const starts = new Uint32Array(n + 1), firsts = new Uint32Array(n), lasts = new Uint32Array(n);
  for (let i = 0; i < n; i++) {
    starts[i + 1] = starts[i] + small[tokens[i]].length;
    firsts[i] = tokens[i] <= END ? i + 1 : i ? firsts[i - 1] : 0;
  }
  for (let i = n - 1; i >= 0; i--) lasts[i] = tokens[i] <= END ? i - 1 : i < n - 1 ? lasts[i + 1] : i;
  return { text: Array.from(tokens, token => small[token]).join(""), starts, firsts, lasts };
}

// Scripts that put spaces between words: there a word is found where it begins, so "river" is not found in "driver".
const UNSPACED = /[\u0E00-\u0EFF\u1000-\u109F\u1780-\u17FF\u2E80-\u{10FFFF}]/u, LETTER = /[\p{L}\p{N}]/u;
const isLetter = sign => sign !== undefined && LETTER.test(sign) && !UNSPACED.test(sign);

// How many places with a word begin before each token, and how many end at it or before.
function findContexts(wanted) {
  const { text, starts } = (stream ??= readStream()), n = starts.length - 1;
  const begun = new Uint32Array(n + 1), ended = new Uint32Array(n + 1);
  for (let at = text.indexOf(wanted), token = 0; at >= 0; at = text.indexOf(wanted, at + 1)) {
    if (isLetter(wanted[0]) && isLetter(text[at - 1])) continue;
    while (starts[token + 1] <= at) token++;
    let last = token;
    while (starts[last + 1] < at + wanted.length) last++;
    begun[token + 1]++;
    ended[last]++;
  }
  for (let i = 1; i <= n; i++) {
    begun[i] += begun[i - 1];
    ended[i] += ended[i - 1];
  }
  return { begun, ended };
}

// The first place of a feature, among its nearest rows and its most active ones, whose context has the word; 0: none has.
function placeOf(line) {
  const at = data.found[line];
  if (at < 0) return 0;
  for (const name of ["positive", "top"])
    for (const place of name in arrays ? part(name, at) : []) {
      const from = Math.max(place - BEFORE, stream.firsts[place]), to = Math.min(place + AFTER, stream.lasts[place]);
      if (place && found.ended[to] > found.begun[from]) return place;
    }
  return 0;
}

function contexts(places, values, { shades, hooks, digits = 3 } = {}) {
  const list = make("ol", undefined, "contexts"), window = BEFORE + 1 + AFTER;
  places.forEach((place, i) => {
    if (!place) return;
    const item = make("li");
    item.append(make("span", digits ? values[i].toFixed(digits) : figure(values[i]), "figure"),
                ...context(place, shades && shades.subarray(i * window, (i + 1) * window), values[0]));
    if (hooks) item.append(" ", make("small", data.hooks[hooks[i]]));
    list.append(item);
  });
  return list;
}

// Texts as chips, each with a figure where there are figures, behind a word that says what they are.
function chips(title, texts, values) {
  const box = make("p", undefined, "chips");
  box.append(make("small", title), ...Array.from(texts, (text, i) => {
    const chip = make("span", text, "chip");
    if (values) chip.append(" ", make("small", values[i].toFixed(1)));
    return chip;
  }));
  return box;
}

// What the label rests on: what the feature does, in words, and a bar for each text with its share of the activation.
function labelParts(line) {
  const kind = data.kinds[line];
  if (!kind) return [make("p", `no label: ${data.why[line]}`, "faint")];
  const grid = make("div", undefined, kind === "mixed" ? "parts mixed" : "parts");
  for (const [text, share] of data.parts[line]) {
    const bar = make("span", undefined, "bar"), fill = make("i");
    fill.style.width = `${100 * share}%`;
    bar.append(fill);
    grid.append(make("span", text, "text"), bar, make("small", `${Math.round(100 * share)} %`));
  }
  const nodes = [make("h3", data.says[kind]), grid];
  if (kind === "mixed") nodes.push(make("p", data.why[line], "faint"));
  if (data.near[line].length) nodes.push(chips("near", data.near[line]));
  return nodes;
}

function facts(line) {
  const [density, mean, most, precision] = ["density", "mean_activation", "max_activation", "precision"].map(name => figures[name]?.[line]);
  const text = `active on ${figure(100 * density)} % of the rows; mean ${figure(mean)}, at most ${figure(most)}`;
  const named = isKnown(precision) ? `; what the label names activates it most in ${figure(100 * precision)} % of the contexts that hold it` : "";
  return make("p", text + named, "faint");
}

// Words and next tokens of one end of the direction; nothing where there are none.
function ends(line, at, words, tokens) {
  const nodes = words[line] ? [chips("words", words[line].split(", "))] : [];
  if (tokens in arrays) {
    const values = `${tokens}_values` in arrays ? part(`${tokens}_values`, at) : undefined;
    nodes.push(chips("next tokens", Array.from(part(tokens, at), i => strings[i]), values));
  }
  return nodes;
}

function card(line) {
  const at = data.found[line], parts = [make("h2", `feature ${data.features[line]}`)];
  if (data.sentences[line]) parts.push(make("p", data.sentences[line]));
  parts.push(...labelParts(line));
  const add = (title, ...nodes) => { if (nodes.length) parts.push(make("h3", title), ...nodes); };
  if (at < 0) return parts;
  if ("density" in figures) parts.push(facts(line));
  add("writes", ...ends(line, at, data.words, "logit_positive"));
  const opposite = data.label_negative[line] ? [chips("nearest rows", [whole(data.label_negative[line])])] : [];
  add("opposite", ...opposite, ...ends(line, at, data.words_negative, "logit_negative"));
  const isActive = figures.max_activation && figures.max_activation[line];
  if (isActive) add("where it is most active", contexts(part("top", at), part("top_values", at), { shades: part("shades", at), digits: 0 }));
  for (const [name, title] of [["positive", "nearest rows to v"], ["negative", "nearest rows to −v"]])
    add(title, contexts(part(name, at), Array.from(part(`${name}_cosines`, at), cosine => cosine / 1e4),
                        { hooks: `${name}_hooks` in arrays ? part(`${name}_hooks`, at) : undefined }));
  add("scores, and those of wrong labels and directions (gray)", scores(line));
  if (isActive) {
    const counts = part("histogram", at), rows = counts.reduce((a, b) => a + b, 0).toLocaleString("en");
    add(`activations on the ${rows} rows where it is active (each bin √2 times the one before)`, histogram(counts, line));
  }
  return parts;
}
