// Draws an image with its patches, one layer at a time; which layer and which patch is what the page's cell says.
// Files that are dropped on the page or pasted go the way of chosen ones.
(() => {
  const { element, select, legend } = window.explore;
  const LARGEST = 32 * 2 ** 20; // bytes of an upload
  const TALLEST = 66; // percent of the window's height, before zoom
  const kept = { zoom: 1, bare: false }; // from image to image

  const labelled = (name, ...controls) => {
    const label = element("label", name);
    label.append(...controls);
    return label;
  };
  const range = (name, least, most, step) =>
    element("input", "", { type: "range", min: least, max: most, step, value: least, "aria-label": name });

  const drawImage = (grid, place, cell) => {
    const { image } = grid;
    const layers = [...grid.rows].reverse(); // the first layer first
    const positions = grid.columns.map((column) => column.pos);
    const at = new Map(positions.map((pos, i) => [pos, i]));
    const levels = [...new Set(image.places.map((where) => where[0]))].sort();
    let level = levels.at(-1);
    let layer = layers.length >> 1;
    let painted = null;
    let chosen = null;

    const stage = element("div", "", { class: "stage" });
    const frame = element("div", "", { class: "frame" });
    const picture = element("img", "", { alt: "the image that the model sees" });
    stage.style.aspectRatio = `${image.width} / ${image.height}`;
    stage.append(picture);
    const patches = image.boxes.map(([x0, y0, x1, y1], i) => {
      const patch = element("button", "", { type: "button", tabindex: -1, "aria-pressed": "false", "data-at": i });
      patch.append(element("span", ""));
      Object.assign(patch.style, { left: `${x0}%`, top: `${y0}%`, width: `${x1 - x0}%`, height: `${y1 - y0}%` });
      return patch;
    });
    stage.append(...patches);
    frame.append(stage);

    const slider = range("layer", 0, layers.length - 1, 1);
    const name = element("output", "");
    const zoom = range("zoom", 1, 6, 0.25);
    const words = element("button", "words and color", { type: "button", "aria-pressed": String(!kept.bare) });
    const part = element("select", "", { "aria-label": "part of the image" });
    part.append(...levels.map((one) => new Option(image.levels[one], one)));
    const layerLabel = labelled("layer", slider, name);
    layerLabel.hidden = layers.length < 2;
    part.hidden = levels.length < 2;
    const controls = element("div", "", { class: "looks" });
    controls.append(layerLabel, labelled("zoom", zoom), part, words);

    const fit = () => {
      const shown = patches.find((patch) => !patch.hidden);
      const width = shown ? shown.offsetWidth : 0;
      stage.style.fontSize = `${Math.min(15, Math.max(8, width / 6)).toFixed(1)}px`;
      stage.classList.toggle("small", width < 24);
      stage.classList.toggle("tight", width < 64);
      picture.classList.toggle("enlarged", picture.clientWidth > 3 * picture.naturalWidth);
    };
    const paint = () => {
      const spread = grid.high - grid.low || 1;
      painted = `${layer} ${level}`;
      slider.value = layer;
      name.textContent = layers[layer].label;
      layerLabel.title = layers[layer].hook;
      part.value = level;
      patches.forEach((patch, i) => {
        const [lead, token, tail, score] = layers[layer].cells[i] || ["", "", "", null];
        patch.hidden = image.places[i][0] !== level;
        patch.firstChild.replaceChildren(lead, element(lead || tail ? "b" : "i", token.trim()), tail);
        patch.firstChild.hidden = !token;
        patch.title = score === null ? "" : `${lead}${token.trim()}${tail}  ${score.toFixed(3)}`;
        patch.style.setProperty("--s", score === null ? 0 : Math.min(1, Math.max(0, (score - grid.low) / spread)).toFixed(3));
      });
      fit();
    };
    const find = (row, column) =>
      image.places.findIndex((where) => where[0] === level && where[1] === row && where[2] === column);
    const choose = (i) => {
      if (i >= 0) select(layers[layer].hook, positions[i]);
    };
    const middle = () => {
      const here = image.places.filter((where) => where[0] === level);
      return find(...[1, 2].map((axis) => (Math.max(...here.map((where) => where[axis])) + 1) >> 1));
    };

    const mark = (i) => {
      if (chosen !== null) {
        patches[chosen].setAttribute("aria-pressed", "false");
        patches[chosen].tabIndex = -1;
      }
      const follows = chosen !== null && document.activeElement === patches[chosen];
      chosen = i;
      if (i === null) return;
      patches[i].setAttribute("aria-pressed", "true");
      patches[i].tabIndex = 0;
      if (follows) patches[i].focus();
    };
    const show = (chosenCell, sent) => {
      if (sent && sent.name === image.name && picture.dataset.name !== sent.name) {
        picture.dataset.name = sent.name;
        picture.src = sent.uri;
      }
      const row = chosenCell ? layers.findIndex((one) => one.hook === chosenCell.hook) : -1;
      const i = chosenCell ? at.get(chosenCell.pos) : undefined;
      if (row < 0 || i === undefined) {
        if (painted === null) paint();
        mark(null);
        return;
      }
      [layer, level] = [row, image.places[i][0]];
      if (painted !== `${layer} ${level}`) paint();
      mark(i);
    };

    stage.addEventListener("click", (event) => {
      const patch = event.target.closest("button");
      if (!patch) return;
      patch.focus();
      choose(Number(patch.dataset.at));
    });
    stage.addEventListener("keydown", (event) => {
      const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      if (!move || chosen === null) return;
      event.preventDefault();
      choose(find(image.places[chosen][1] + move[0], image.places[chosen][2] + move[1]));
    });
    slider.addEventListener("input", () => {
      layer = Number(slider.value);
      paint();
      choose(chosen === null ? middle() : chosen);
    });
    const zoomed = () => {
      stage.style.width = `calc(${kept.zoom} * min(100%, ${(TALLEST * image.width / image.height).toFixed(2)}vh))`;
      fit();
    };
    zoom.addEventListener("input", () => {
      kept.zoom = Number(zoom.value);
      zoomed();
      if (chosen === null) return;
      const { offsetLeft, offsetTop, offsetWidth, offsetHeight } = patches[chosen];
      frame.scrollTo(offsetLeft + (offsetWidth - frame.clientWidth) / 2, offsetTop + (offsetHeight - frame.clientHeight) / 2);
    });
    part.addEventListener("change", () => {
      level = Number(part.value);
      choose(middle());
    });
    words.addEventListener("click", () => {
      kept.bare = stage.classList.toggle("bare");
      words.setAttribute("aria-pressed", String(!kept.bare));
    });
    picture.addEventListener("load", fit);
    new ResizeObserver(fit).observe(frame);

    stage.classList.toggle("bare", kept.bare);
    zoom.value = kept.zoom;
    place.append(controls, frame, legend(grid));
    watchEdges(frame);
    zoomed();
    const known = cell && at.has(cell.pos);
    if (!known || !layers.some((one) => one.hook === cell.hook)) choose(known ? at.get(cell.pos) : middle());
    return { show };
  };
  window.explore.drawImage = drawImage;

  const say = (text) => dash_clientside.set_props("message", { children: text });
  // What is too large, or of another kind, the upload drops without a word; and it takes the same file once only.
  document.addEventListener("change", (event) => {
    const id = event.target.closest?.("#image, #upload")?.id;
    const file = event.target.files?.[0];
    if (!id || !file) return;
    if (file.size > LARGEST) {
      say(`${file.name} has ${Math.ceil(file.size / 2 ** 20)} MB; at most ${LARGEST / 2 ** 20} MB can be given`);
    } else if (id === "image") {
      if (!file.type.startsWith("image/")) say(`${file.name} is no image`);
      else dash_clientside.set_props("image", { contents: null });
    }
  }, true);
  const give = (event, files) => {
    const input = document.querySelector("#image input[type=file]");
    if (!input || !files?.length || event.target.closest?.("#upload")) return;
    event.preventDefault();
    event.stopPropagation();
    input.files = files;
    input.dispatchEvent(new Event("change", { bubbles: true }));
  };
  document.addEventListener("dragover", (event) => {
    if (document.getElementById("image") && event.dataTransfer?.types.includes("Files")) event.preventDefault();
  });
  document.addEventListener("drop", (event) => give(event, event.dataTransfer?.files), true);
  document.addEventListener("paste", (event) => give(event, event.clipboardData?.files), true);
})();
