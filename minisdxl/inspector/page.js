// Panels of the page. `state` says what is chosen; `render` draws all that depends on it.
const data = JSON.parse(document.getElementById("data").textContent);
const by = (id) => document.getElementById(id);
const plans = data.runs.map((_, i) => i).filter((i) => i > 0 || data.runs.length === 1); // what panels of tokens show
const [rows, columns] = data.sites[0].grid;
const state = {
  step: data.steps.length - 1,
  site: 0,
  token: Math.floor(rows / 2) * columns + Math.floor(columns / 2),
  plan: plans[0], // whose attention is shown
  view: "kept",
  word: Math.max(0, data.words.findIndex((word) => word.length > 3)),
  wordSite: "all",
};

// ---- small helpers -------------------------------------------------------------------------------------------------

function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made && name !== "list") made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

function cached(make) {
  const known = new Map();
  return (...key) => {
    const name = key.join("/");
    if (!known.has(name)) known.set(name, make(...key));
    return known.get(name);
  };
}

function thousands(n) {
  for (const [unit, size] of [["T", 1e12], ["G", 1e9], ["M", 1e6], ["k", 1e3]]) {
    if (n >= size * 0.9995) return `${(n / size).toPrecision(3)} ${unit}`;
  }
  return `${n} `;
}
const flopsText = (n) => `${thousands(n)}FLOPs`;
const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)}\u00a0%`;
const short = (x) => (x === 0 ? "0" : Math.abs(x) < 1e-3 || Math.abs(x) >= 1e5 ? x.toExponential(1) : x.toPrecision(3));
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const place = (site, token) => `row ${Math.floor(token / site.grid[1]) + 1}, column ${(token % site.grid[1]) + 1}`;

// Dark violet, blue, green, yellow: even in lightness, for all kinds of color vision.
const STOPS = [[56, 8, 82], [62, 73, 137], [38, 130, 142], [79, 195, 107], [253, 231, 37]];
function ramp(share) {
  const at = Math.min(1, Math.max(0, share)) * (STOPS.length - 1);
  const low = Math.min(STOPS.length - 2, Math.floor(at));
  return STOPS[low].map((c, i) => Math.round(c + (STOPS[low + 1][i] - c) * (at - low)));
}
const rgb = ([r, g, b], alpha = 1) => `rgba(${r}, ${g}, ${b}, ${alpha})`;

// ---- data of the chosen step ---------------------------------------------------------------------------------------

const picture = cached((run, step) => {
  const image = new Image();
  image.src = `data:image/webp;base64,${data.runs[run].pictures[step]}`;
  return { image, ready: image.decode() };
});
const counted = (site) => site.grid[0] * site.grid[1];
const reductions = cached((run, site, step) => {
  const found = data.runs[run].reductions[data.sites[site].name];
  return found ? found[step].map((each) => reductionOf(each, counted(data.sites[site]))) : [];
});
const attention = cached((run, site, step) => {
  const found = (data.runs[run].attention[data.sites[site].name] || {})[step];
  return found ? attentionOf(found) : null;
});
const cost = (run, step) => data.runs[run].costs[data.runs[run].cost[step]];
const spent = cached((run) => {
  let sum = 0;
  return data.steps.map((_, step) => (sum += cost(run, step).total));
});
// Bits of the tokens that stay to the block's end, counted without unpacking scores.
const staying = cached((run, site, step) => {
  const found = (data.runs[run].reductions[data.sites[site].name] || [])[step] || [];
  if (!found.length) return null;
  return bitsOf(found[found.length - 1].kept, counted(data.sites[site])).reduce((a, b) => a + b, 0);
});
const recordedSteps = (run) => Object.keys(Object.values(data.runs[run].attention)[0] || {}).map(Number);
// A block does no work where the step is a forecast, or shallow and the block lies below its branch.
const ran = (run, site, step) => cost(run, step).blocks[data.sites[site].name] > 0;
const isEarly = (run, step) => data.steps[step].number <= data.runs[run].early;

// Why a block keeps all tokens, in a few words.
function untouched(run, site, step) {
  const { kind, reductions: all } = data.runs[run];
  if (!ran(run, site, step)) return "does not run at this step";
  if (kind === "dense") return "all stay: dense";
  if (!all[data.sites[site].name]) return kind === "merging" ? "never merged" : "never pruned";
  const done = kind === "merging" ? "unmerged" : "unpruned";
  return isEarly(run, step) ? `${done}: early step of DSAP` : `${done} at this step`;
}

// ---- steps ---------------------------------------------------------------------------------------------------------

function stepText() {
  const { number, sigma } = data.steps[state.step];
  const early = plans.some((run) => isEarly(run, state.step)) ? " · early step (DSAP)" : "";
  const costs = data.runs.map((run, i) => {
    const share = i > 0 ? ` (${percent(spent(i)[state.step] / spent(0)[state.step])} of dense)` : "";
    const did = run.did[state.step] ? `: ${run.did[state.step]}` : "";
    return `${run.name} ${flopsText(spent(i)[state.step])}${share}${did}`;
  });
  return `Step ${number} of ${data.settings.steps} · σ = ${short(sigma)}${early} · spent so far: ${costs.join("; ")}`;
}

function renderSteps() {
  by("step").value = state.step;
  by("step").setAttribute("aria-valuetext", `step ${data.steps[state.step].number}`);
  by("step-text").textContent = stepText();
  by("previous").disabled = state.step === 0;
  by("next").disabled = state.step === data.steps.length - 1;
}

// ---- pictures ------------------------------------------------------------------------------------------------------

function planLabel(run) {
  return element("b", { className: `plan-${run}` }, data.runs[run].name);
}

function buildPictures() {
  data.runs.forEach((run, i) => {
    by("pictures").append(element("figure", {}, element("img", { id: `picture-${i}` }), element("figcaption", {}, planLabel(i))));
  });
  if (data.runs.length === 1) {
    by("pair").closest("p").hidden = true;
    return;
  }
  const caption = element("figcaption", { id: "difference-text" });
  by("pictures").append(element("figure", {}, element("canvas", { id: "difference", role: "img" }), caption));
  data.changes.forEach((change, i) => {
    by("pair").append(element("option", { value: i }, change.runs.map((run) => data.runs[run].name).join(" − ")));
  });
}

function renderPictures() {
  data.runs.forEach((run, i) => {
    const shown = by(`picture-${i}`);
    shown.src = picture(i, state.step).image.src;
    shown.alt = `${run.name}: the picture that step ${data.steps[state.step].number} heads for`;
  });
  if (data.runs.length > 1) renderDifference();
}

async function renderDifference() {
  const change = data.changes[by("pair").value || 0], gain = Number(by("gain").value), step = state.step;
  const loaded = change.runs.map((run) => picture(run, step));
  await Promise.all(loaded.map((each) => each.ready));
  if (step !== state.step) return; // another one was chosen meanwhile
  const { naturalWidth: width, naturalHeight: height } = loaded[0].image;
  const canvas = by("difference"), context = canvas.getContext("2d", { willReadFrequently: true });
  Object.assign(canvas, { width, height });
  const [a, b] = loaded.map((each) => {
    context.drawImage(each.image, 0, 0);
    return context.getImageData(0, 0, width, height);
  });
  let sum = 0;
  for (let i = 0; i < a.data.length; i++) {
    if (i % 4 === 3) continue;
    const difference = Math.abs(a.data[i] - b.data[i]);
    sum += difference;
    a.data[i] = gain * difference;
  }
  context.putImageData(a, 0, 0);
  const names = change.runs.map((run) => data.runs[run].name).join(" − ");
  const mean = (sum / (a.data.length * 0.75)).toFixed(1);
  const text = `${names}: mean difference ${mean} of 255; latents differ by ${percent(change.values[step])}`;
  by("difference-text").textContent = text;
  canvas.setAttribute("aria-label", text);
}

// ---- blocks --------------------------------------------------------------------------------------------------------

function buildBlocks() {
  for (const run of plans) {
    const body = element("tbody");
    data.sites.forEach((site, i) => {
      const strip = element("canvas", { width: 600, height: 28, role: "img" });
      strip.addEventListener("click", (event) => {
        const box = strip.getBoundingClientRect();
        choose({ site: i, step: Math.min(data.steps.length - 1, Math.floor(((event.clientX - box.left) / box.width) * data.steps.length)) });
      });
      const pick = element("button", { type: "button", onclick: () => choose({ site: i }) }, site.name);
      body.append(element("tr", {}, element("th", { scope: "row" }, pick), element("td", { className: "strip" }, strip),
        element("td"), element("td", { className: "why" }), element("td"), element("td")));
    });
    const head = ["block", `steps ${data.steps[0].number} to ${data.settings.steps}`, "tokens that stay", "", "FLOPs", "of dense"];
    const foot = ["whole U-Net", "", "", "", "", ""], ranking = ["ranking, recovery (not in the sum)", "", "", "", "", ""];
    const row = (cells, tag) => element("tr", {}, ...cells.map((cell, i) => element(i === 0 ? "th" : tag, i === 3 ? { className: "why" } : {}, cell)));
    by("blocks").append(element("div", { className: "scroll", tabindex: 0, role: "region", "aria-label": `Blocks under ${data.runs[run].name}` },
      element("table", { id: `blocks-${run}` }, element("caption", {}), element("thead", {}, row(head, "th")), body,
        element("tfoot", {}, row(foot, "td"), row(ranking, "td")))));
  }
  const shades = { "kept-few": 0, "kept-many": 0.9, low: 0, high: 1 };
  for (const [name, share] of Object.entries(shades)) {
    document.querySelectorAll(`.swatch.${name}`).forEach((swatch) => (swatch.style.background = rgb(ramp(share))));
  }
}

function drawStrip(canvas, run, site) {
  const context = canvas.getContext("2d"), width = canvas.width / data.steps.length, height = canvas.height;
  context.clearRect(0, 0, canvas.width, height);
  let pruned = 0, idle = 0;
  data.steps.forEach((_, step) => {
    const stay = staying(run, site, step), left = step * width;
    if (!ran(run, site, step)) {
      idle++;
      context.fillStyle = color("--soft");
      context.fillRect(left, height / 2 - 1, width - (width > 4 ? 1 : 0), 2);
      return;
    }
    if (stay !== null) pruned++;
    context.fillStyle = stay === null ? color("--line") : rgb(ramp(stay / counted(data.sites[site])));
    context.fillRect(left, 0, width - (width > 4 ? 1 : 0), height);
    if (stay === null && data.runs[run].reductions[data.sites[site].name]) {
      context.save();
      context.beginPath();
      context.rect(left, 0, width - (width > 4 ? 1 : 0), height);
      context.clip();
      context.fillStyle = color("--card");
      context.fillRect(left, 0, width, height);
      context.strokeStyle = color("--ink");
      context.lineWidth = 1;
      for (let x = left - height; x < left + width; x += 6) {
        context.beginPath();
        context.moveTo(x, height);
        context.lineTo(x + height, 0);
        context.stroke();
      }
      context.restore();
    }
  });
  context.strokeStyle = color("--ink");
  context.lineWidth = 3;
  context.strokeRect(state.step * width + 1.5, 1.5, Math.max(2, width - 3), height - 3);
  const unused = idle ? `, does not run in ${idle}` : "";
  canvas.setAttribute("aria-label", `${data.sites[site].name}: fewer tokens in ${pruned} of ${data.steps.length} steps${unused}`);
}

function renderBlocks() {
  for (const run of plans) {
    const table = by(`blocks-${run}`);
    table.caption.textContent = `${data.runs[run].name}, step ${data.steps[state.step].number}`;
    const now = cost(run, state.step), dense = cost(0, state.step);
    data.sites.forEach((site, i) => {
      const row = table.tBodies[0].rows[i], stay = staying(run, i, state.step), all = counted(site);
      row.className = i === state.site ? "chosen" : "";
      row.cells[0].firstChild.setAttribute("aria-pressed", i === state.site);
      drawStrip(row.cells[1].firstChild, run, i);
      row.cells[2].textContent = `${!ran(run, i, state.step) ? 0 : stay === null ? all : stay} / ${all}`;
      row.cells[3].textContent = stay === null ? untouched(run, i, state.step) : percent(stay / all);
      row.cells[4].textContent = thousands(now.blocks[site.name]);
      row.cells[5].textContent = percent(now.blocks[site.name] / dense.blocks[site.name]);
    });
    const [total, ranking] = table.tFoot.rows;
    total.cells[4].textContent = thousands(now.total);
    total.cells[5].textContent = percent(now.total / dense.total);
    ranking.cells[4].textContent = thousands(now.ranking);
    ranking.cells[5].textContent = percent(now.ranking / dense.total);
  }
}

// ---- token grids ---------------------------------------------------------------------------------------------------

const GRID_SIDE = 512; // pixels of a canvas's longer side

function gridCanvas(id, onPick) {
  const canvas = element("canvas", { id, className: "pick", tabIndex: 0, role: "application" });
  const pick = (row, column) => {
    const [rows, columns] = data.sites[state.site].grid;
    onPick(Math.min(rows - 1, Math.max(0, row)) * columns + Math.min(columns - 1, Math.max(0, column)));
  };
  canvas.addEventListener("click", (event) => {
    const box = canvas.getBoundingClientRect(), [rows, columns] = data.sites[state.site].grid;
    pick(Math.floor(((event.clientY - box.top) / box.height) * rows), Math.floor(((event.clientX - box.left) / box.width) * columns));
  });
  canvas.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!move) return;
    event.preventDefault();
    const columns = data.sites[state.site].grid[1], token = state.token;
    pick(Math.floor(token / columns) + move[0], (token % columns) + move[1]);
  });
  return canvas;
}

// Draws a run's picture, in gray if colors stand for numbers, and, over it, each cell of a grid by `paint(context, cell, x, y, width, height)`.
async function drawGrid(canvas, run, grid, gray, paint, marks = () => {}) {
  const asked = (canvas.asked = (canvas.asked || 0) + 1), { image, ready } = picture(run, state.step);
  await ready;
  if (canvas.asked !== asked) return; // another drawing was asked for meanwhile
  const scale = GRID_SIDE / Math.max(image.naturalWidth, image.naturalHeight);
  canvas.width = Math.round(image.naturalWidth * scale);
  canvas.height = Math.round(image.naturalHeight * scale);
  const context = canvas.getContext("2d"), [rows, columns] = grid;
  context.drawImage(image, 0, 0, canvas.width, canvas.height);
  if (gray) {
    context.globalCompositeOperation = "saturation";
    context.fillStyle = "#808080";
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.globalCompositeOperation = "source-over";
  }
  const width = canvas.width / columns, height = canvas.height / rows;
  for (let cell = 0; cell < rows * columns; cell++) { // in whole pixels, so that no seams show
    const row = Math.floor(cell / columns), column = cell % columns, x = Math.round(column * width), y = Math.round(row * height);
    paint(context, cell, x, y, Math.round((column + 1) * width) - x, Math.round((row + 1) * height) - y);
  }
  marks(context, (cell) => [((cell % columns) + 0.5) * width, (Math.floor(cell / columns) + 0.5) * height], width, height);
}

function markToken(context, center, width, height) {
  const [x, y] = center(state.token), [w, h] = [Math.max(width, 9), Math.max(height, 9)];
  for (const [style, line] of [["#000", 5], ["#fff", 2.5]]) {
    context.strokeStyle = style;
    context.lineWidth = line;
    context.strokeRect(x - w / 2, y - h / 2, w, h);
  }
}

function arrow(context, [fromX, fromY], [toX, toY]) {
  const angle = Math.atan2(toY - fromY, toX - fromX);
  for (const [style, line] of [["#000", 6], ["#ff3d8b", 3]]) {
    context.strokeStyle = style;
    context.lineWidth = line;
    context.beginPath();
    context.moveTo(fromX, fromY);
    context.lineTo(toX, toY);
    for (const turn of [2.6, -2.6]) {
      context.moveTo(toX, toY);
      context.lineTo(toX + 14 * Math.cos(angle + turn), toY + 14 * Math.sin(angle + turn));
    }
    context.stroke();
  }
}

// ---- tokens --------------------------------------------------------------------------------------------------------

function buildTokens() {
  data.sites.forEach((site, i) => by("site").append(element("option", { value: i }, `${site.name} (${site.grid[0]} × ${site.grid[1]})`)));
  for (const run of plans) {
    const caption = element("figcaption", { id: `tokens-text-${run}`, role: "status" });
    const canvas = gridCanvas(`tokens-${run}`, (token) => choose({ token, plan: run }));
    canvas.setAttribute("aria-describedby", caption.id);
    by("tokens").append(element("figure", {}, canvas, caption));
  }
}

function renderTokens() {
  const site = data.sites[state.site], [rows, columns] = site.grid;
  by("site").value = state.site;
  by("view").value = state.view;
  const legend = { kept: "covered: pruned, merged or left out · clear: stays", scores: "dark violet: low score · yellow: high score · ×: pruned", picture: "the picture alone" };
  const chosen = "□ the chosen token · the arrow starts where it is copied from";
  by("tokens-legend").replaceChildren(...[legend[state.view], chosen].map((text) => element("span", {}, text)));
  for (const run of plans) {
    const done = reductions(run, state.site, state.step), last = done[done.length - 1], first = done[0];
    const gone = (cell) => last && !last.kept[cell];
    let low = Infinity, high = -Infinity;
    if (first && first.scores) for (const score of first.scores) { low = Math.min(low, score); high = Math.max(high, score); }
    const level = (score) => (high === low ? 1 : low > 0 ? Math.log(score / low) / Math.log(high / low) : (score - low) / (high - low));
    const gray = state.view === "scores" && first && first.scores;
    drawGrid(by(`tokens-${run}`), run, site.grid, gray, (context, cell, x, y, width, height) => {
      if (gray) {
        context.fillStyle = rgb(ramp(level(first.scores[cell])), 0.85);
        context.fillRect(x, y, width, height);
        if (gone(cell)) {
          context.fillStyle = "rgba(0, 0, 0, 0.75)";
          context.fillRect(x + width * 0.35, y + height * 0.35, width * 0.3, height * 0.3);
        }
      } else if (state.view === "kept" && gone(cell)) {
        context.fillStyle = "rgba(16, 18, 24, 0.78)";
        context.fillRect(x, y, width, height);
      }
    }, (context, center, width, height) => {
      for (const source of sourcesOf(done, state.token)) if (source !== state.token) arrow(context, center(source), center(state.token));
      markToken(context, center, width, height);
    });
    by(`tokens-text-${run}`).replaceChildren(planLabel(run), ` ${blockText(run, last)}`, ...tokenText(run, done));
    by(`tokens-${run}`).setAttribute("aria-label", `Tokens of ${site.name} under ${data.runs[run].name}, ${rows} rows, ${columns} columns`);
  }
}

function blockText(run, last) {
  const site = data.sites[state.site];
  if (!last) return `${site.name}: ${untouched(run, state.site, state.step)}, ${counted(site)} tokens.`;
  const verb = data.runs[run].kind === "merging" ? data.runs[run].wording.stay : "stay";
  const again = data.runs[run].kind === "merging" ? "; each layer matches anew, this is the first" : "";
  return `${site.name}: ${last.stay} of ${counted(site)} tokens ${verb} (${percent(last.stay / counted(site))})${again}`;
}

// Where a token that went is copied from, in the layer in which it went.
function sourcesOf(done, token) {
  const went = done.find((each) => each.held[token] && !each.kept[token]);
  return went && went.sources ? went.sources[token] : [];
}

function tokenText(run, done) {
  const site = data.sites[state.site], { kind, wording, ranking, recovery } = data.runs[run], lines = [];
  if (!ran(run, state.site, state.step)) return [element("br"), `Token in ${place(site, state.token)}.`];
  const went = done.find((each) => each.held[state.token] && !each.kept[state.token]);
  const fate = !done.length ? "stays" : !went ? "stays" : kind === "merging" ? wording.fate : `pruned after layer ${went.layer + 1}`;
  lines.push(`Token in ${place(site, state.token)}: ${fate}.`);
  if (went) {
    const sources = sourcesOf(done, state.token).map((source) => place(site, source)).join(" and ");
    if (kind === "merging") lines.push(...(sources ? [`${wording.source} ${sources}.`] : []));
    else if (sources && sourcesOf(done, state.token)[0] === state.token) lines.push(`Recovery “${recovery}”: adds its own change of an earlier step.`);
    else if (sources) lines.push(`Recovery “${recovery}”: ${recovery.includes("change") ? "adds the change of" : "copied from"} the token in ${sources}.`);
    else lines.push(`Recovery “${recovery}” reads no other token.`);
  }
  for (const each of done) {
    if (each.scores && each.held[state.token]) {
      const held = each.held.reduce((a, b) => a + b, 0);
      lines.push(`Rank ${each.ranks[state.token]} of ${held} by ${ranking}, score ${short(each.scores[state.token])}${done.length > 1 ? ` in layer ${each.layer + 1}` : ""}.`);
    }
  }
  if (kind === "merging" && done.length) lines.push(wording.note);
  return lines.flatMap((line) => [element("br"), line]);
}

// ---- self-attention ------------------------------------------------------------------------------------------------

const SIDES = [["rows", "attends to", "Row: what the token attends to"], ["columns", "attend to it", "Column: who attends to the token"]];

function buildAttention() {
  plans.forEach((run) => by("plan").append(element("option", { value: run }, data.runs[run].name)));
  by("plan").closest("label").hidden = plans.length === 1;
  for (const [side, , title] of SIDES) {
    const caption = element("figcaption", { id: `${side}-text` });
    const canvas = gridCanvas(`${side}-map`, (token) => choose({ token }));
    canvas.setAttribute("aria-label", title);
    canvas.setAttribute("aria-describedby", caption.id);
    by("attention").append(element("figure", {}, canvas, caption));
  }
  by("attention").append(element("figure", {}, element("div", { id: "iterations" }), element("figcaption", { id: "iterations-text" })));
}

function notRecorded(run) {
  const numbers = recordedSteps(run).map((step) => data.steps[step].number);
  return numbers.length ? `Attention was recorded at the steps ${numbers.join(", ")}, not at this one.` : "No attention was recorded.";
}

function renderAttention() {
  const run = state.plan, site = data.sites[state.site], recorded = recordedSteps(run), found = attention(run, state.site, state.step);
  by("plan").value = run;
  by("recorded").replaceChildren(element("option", { value: "" }, "go to …"), ...recorded.map((step) => element("option", { value: step }, `step ${data.steps[step].number}`)));
  by("recorded").value = found ? state.step : "";
  by("attention").hidden = !found;
  by("attention-note").textContent = !found
    ? notRecorded(run)
    : `${data.runs[run].name}, ${site.name}, ${place(site, state.token)}.`;
  if (!found) return;
  for (const [side, verb, title] of SIDES) {
    const top = found[side](state.token), most = Math.max(...top.map(([, weight]) => weight));
    const weights = new Map();
    for (const [position, weight] of top) if (weight > 0) weights.set(position, Math.max(weight, weights.get(position) || 0));
    drawGrid(by(`${side}-map`), run, site.grid, true, (context, cell, x, y, width, height) => {
      context.fillStyle = weights.has(cell) ? rgb(ramp(weights.get(cell) / (most || 1)), 0.9) : "rgba(16, 18, 24, 0.55)";
      context.fillRect(x, y, width, height);
    }, markToken);
    const sum = top.reduce((total, [, weight]) => total + weight, 0);
    const first = top.slice(0, 3).map(([position, weight]) => `${place(site, position)} (${percent(weight)})`).join("; ");
    const share = side === "rows" ? ` together ${percent(Math.min(1, sum))} of its attention` : ` together ${short(sum)}, where a whole column has 1 on average`;
    by(`${side}-text`).textContent = most === 0 ? `${title}. None does: it is not read.` : `${title}. The largest ${top.length}:${share}. ${verb === "attends to" ? "Most to" : "Most from"} ${first}.`;
  }
  renderIterations(found, counted(site), run);
}

function renderIterations(found, count, run) {
  const { iterations, scores } = found, cross = data.runs[run].ranking === "ca-wpr";
  if (!iterations.length) {
    by("iterations").replaceChildren();
    by("iterations-text").textContent = "G-WPR needs a vote of every token on every other, which this method does not compute.";
    return;
  }
  const line = iterations.map((_, t) => scores[t * count + state.token] * count);
  const stay = staying(run, state.site, state.step), series = [{ name: "this token", values: line, className: `plan-${run}` }];
  if (stay !== null && ["gwpr", "ca-wpr", "one-vote", "lowest", "covered"].includes(data.runs[run].ranking)) {
    const border = iterations.map((_, t) => Float64Array.from(scores.subarray(t * count, (t + 1) * count)).sort()[count - stay] * count);
    series.push({ name: "lowest that stays", values: border, className: "plan-0" });
  }
  by("iterations").replaceChildren(chart(iterations, series, "iteration of G-WPR", "score × N", "Score through the iterations of G-WPR"));
  const steps = iterations.map((n, t) => `${n}: ${line[t].toFixed(2)}`).join(", ");
  by("iterations-text").textContent = `Score × N through the iterations of G-WPR on ${cross ? "cross-attention" : "self-attention"} (Algorithm 1), 1 is the mean: ${steps}.`;
}

// ---- words ---------------------------------------------------------------------------------------------------------

function buildWords() {
  data.words.forEach((word, i) => by("words").append(element("button", { type: "button", onclick: () => choose({ word: i }) }, word)));
  if (!data.words.length) by("words").append("The prompt has no words.");
  by("word-site").append(element("option", { value: "all" }, "average of all blocks"));
  data.sites.forEach((site, i) => by("word-site").append(element("option", { value: i }, site.name)));
  for (const run of plans) {
    by("word-figures").append(element("figure", {}, element("canvas", { id: `word-map-${run}`, role: "img" }), element("figcaption", { id: `word-text-${run}` })));
  }
}

// The map of the chosen word in one block, or of all blocks averaged on the finest of their grids.
function wordMap(run, step) {
  const maps = (state.wordSite === "all" ? data.sites.map((_, i) => i) : [Number(state.wordSite)]).map((site) => attention(run, site, step).words);
  const grid = maps.reduce((best, map) => (map.grid[0] > best[0] ? map.grid : best), [0, 0]), [rows, columns] = grid;
  const values = new Float64Array(rows * columns);
  for (const map of maps) {
    const start = state.word * map.grid[0] * map.grid[1];
    for (let i = 0; i < values.length; i++) {
      const row = Math.floor((Math.floor(i / columns) * map.grid[0]) / rows), column = Math.floor(((i % columns) * map.grid[1]) / columns);
      values[i] += map.values[start + row * map.grid[1] + column] / maps.length;
    }
  }
  return { grid, values };
}

function renderWords() {
  by("word-site").value = state.wordSite;
  [...by("words").querySelectorAll("button")].forEach((button, i) => button.setAttribute("aria-pressed", i === state.word));
  for (const run of plans) {
    const canvas = by(`word-map-${run}`), caption = by(`word-text-${run}`), recorded = recordedSteps(run);
    canvas.hidden = !recorded.includes(state.step) || !data.words.length;
    if (canvas.hidden) {
      caption.replaceChildren(planLabel(run), ` ${notRecorded(run)}`);
      continue;
    }
    const { grid, values } = wordMap(run, state.step), low = Math.min(...values), high = Math.max(...values);
    drawGrid(canvas, run, grid, true, (context, cell, x, y, width, height) => {
      context.fillStyle = rgb(ramp((values[cell] - low) / (high - low || 1)), 0.75);
      context.fillRect(x, y, width, height);
    });
    const peak = values.indexOf(high), where = `row ${Math.floor(peak / grid[1]) + 1} of ${grid[0]}, column ${(peak % grid[1]) + 1} of ${grid[1]}`;
    const block = state.wordSite === "all" ? "average of all blocks" : data.sites[state.wordSite].name;
    const text = ` “${data.words[state.word]}”, ${block}: ${percent(low)} to ${percent(high)} of a token's attention, most in ${where}`;
    caption.replaceChildren(planLabel(run), text);
    canvas.setAttribute("aria-label", `${data.runs[run].name}${text}`);
  }
}

// ---- where the pictures part ---------------------------------------------------------------------------------------

function renderChanges() {
  by("changes-section").hidden = data.runs.length === 1;
  if (data.runs.length === 1) return;
  const number = (step) => data.steps[step].number, classes = ["plan-1", "plan-2", "plan-0"];
  const series = data.changes.map((change, i) => ({ name: change.runs.map((run) => data.runs[run].name).join(" − "), values: change.values.map((x) => 100 * x), className: classes[i] }));
  by("parting").replaceChildren(...data.changes.map((change, i) => {
    const far = change.far === null ? `never by more than ${percent(change.threshold)}` : `by more than ${percent(change.threshold)} first at step ${number(change.far)}`;
    const text = change.first === null ? "are the same at every step" : `part at step ${number(change.first)}, ${far}; now ${percent(change.values[state.step])}, at the end ${percent(change.values.at(-1))}`;
    const names = change.runs.map((run) => data.runs[run].name).join(" and ");
    return element("li", {}, element("b", { className: classes[i] }, names), ` ${text}`);
  }));
  by("changes").replaceChildren(chart(data.steps.map((step) => step.number), series, "step", "%", "Difference of denoised latents by step", state.step));
}

// A line chart: `xs` are shared, `series` are [{name, values, className}], `now` is the index of a dashed line.
function chart(xs, series, xLabel, yLabel, title, now = null) {
  const make = (tag, attributes, ...children) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  };
  const [width, height, left, bottom] = [460, 240, 44, 34], all = series.flatMap((each) => each.values);
  const top = Math.max(...all, 1e-9), low = Math.min(0, ...all);
  const x = (i) => left + ((width - left - 12) * i) / Math.max(1, xs.length - 1);
  const head = 14 + 13 * series.length; // of the series' names
  const y = (value) => height - bottom - ((height - bottom - head) * (value - low)) / (top - low);
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title }, make("title", {}, title));
  for (const value of [low, (low + top) / 2, top]) {
    svg.append(make("line", { class: "axis", x1: left, x2: width - 12, y1: y(value), y2: y(value) }),
      make("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, short(value)));
  }
  const ticks = [...new Set([0, Math.floor((xs.length - 1) / 2), xs.length - 1])];
  for (const i of ticks) svg.append(make("text", { x: x(i), y: height - bottom + 14, "text-anchor": "middle" }, xs[i]));
  svg.append(make("text", { x: (width + left) / 2, y: height - 4, "text-anchor": "middle" }, xLabel), make("text", { x: 4, y: 12 }, yLabel));
  if (now !== null) svg.append(make("line", { class: "now", x1: x(now), x2: x(now), y1: head, y2: height - bottom }));
  series.forEach((each, n) => {
    svg.append(make("polyline", { class: each.className, points: each.values.map((value, i) => `${x(i)},${y(value)}`).join(" ") }));
    svg.append(make("text", { class: each.className, style: "fill: currentColor; stroke: none", x: width - 12, y: 12 + 13 * n, "text-anchor": "end" }, each.name));
  });
  return svg;
}

// ---- all together --------------------------------------------------------------------------------------------------

function render() {
  renderSteps();
  renderPictures();
  renderBlocks();
  renderTokens();
  renderAttention();
  renderWords();
  renderChanges();
}

function choose(changes) {
  if (changes.site !== undefined && changes.site !== state.site && changes.token === undefined) {
    const [from, to] = [data.sites[state.site].grid, data.sites[changes.site].grid]; // the token at the same place
    const row = Math.floor((Math.floor(state.token / from[1]) * to[0]) / from[0]);
    changes.token = row * to[1] + Math.floor(((state.token % from[1]) * to[1]) / from[1]);
  }
  Object.assign(state, changes);
  state.step = Math.min(data.steps.length - 1, Math.max(0, state.step));
  render();
}

function listen() {
  by("step").addEventListener("input", () => choose({ step: Number(by("step").value) }));
  by("previous").addEventListener("click", () => choose({ step: state.step - 1 }));
  by("next").addEventListener("click", () => choose({ step: state.step + 1 }));
  by("pair").addEventListener("change", renderDifference);
  by("gain").addEventListener("change", renderDifference);
  by("site").addEventListener("change", () => choose({ site: Number(by("site").value) }));
  by("view").addEventListener("change", () => choose({ view: by("view").value }));
  by("plan").addEventListener("change", () => choose({ plan: Number(by("plan").value) }));
  by("recorded").addEventListener("change", () => by("recorded").value !== "" && choose({ step: Number(by("recorded").value) }));
  by("word-site").addEventListener("change", () => choose({ wordSite: by("word-site").value }));
  document.addEventListener("keydown", (event) => {
    if (event.defaultPrevented || event.altKey || event.ctrlKey || event.metaKey || event.target.closest("input, select")) return;
    const to = { ArrowLeft: state.step - 1, ArrowRight: state.step + 1, Home: 0, End: data.steps.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    choose({ step: to });
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", render);
}

by("step").max = data.steps.length - 1;
const { model, sampling, steps, cfg, seed, size, negative } = data.settings;
by("settings").textContent = `${model}, ${size} px, ${sampling}, ${steps} steps, CFG ${cfg}, seed ${seed}${negative ? `, without “${negative}”` : ""}`;
buildPictures();
buildBlocks();
buildTokens();
buildAttention();
buildWords();
listen();
render();
