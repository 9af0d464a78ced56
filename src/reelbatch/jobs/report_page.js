"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("data").textContent);
  const rows = data.rows.map((values, index) => {
    const row = { index };
    for (let i = 0; i < values.length; i++) row[data.columns[i]] = values[i];
    row.url ??= row.file;
    row.rest = data.requests[row.request] ?? {};
    row.versions = data.versions[row.versions];
    row.took = secondsOf(row);
    return row;
  });
  const count = new Intl.NumberFormat("en");
  const calm = matchMedia("(prefers-reduced-motion: reduce)");

  function secondsOf(row) {
    const known = Object.values(row.seconds ?? {}).filter((value) => Number.isFinite(value));
    return known.length ? known.reduce((sum, value) => sum + value, 0) : null;
  }

  function requestOf(row) {
    return { prompt: row.prompt, ...row.rest, seed: row.rest.seed ?? row.seed, tags: row.rest.tags ?? row.tags ?? [],
             id: row.rest.id ?? row.id };
  }

  function secondsText(seconds) {
    if (seconds === null || seconds === undefined) return null;
    if (seconds < 60) return `${Number(seconds.toPrecision(3))} s`;
    const whole = Math.round(seconds);
    if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
    return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
  }

  function bytesText(bytes) {
    for (const unit of ["B", "KiB", "MiB", "GiB"]) {
      if (bytes < 1024 || unit === "GiB") return `${Number(bytes.toPrecision(3))} ${unit}`;
      bytes /= 1024;
    }
  }

  function timeText(moment) {
    const found = /^(\d{4}-\d\d-\d\d)T(\d\d:\d\d:\d\d)/.exec(moment ?? "");
    return found ? `${found[1]} ${found[2]} UTC` : moment;
  }

  /** The beginning of a text that may be huge; no half of a pair at its end. */
  function beginning(text, length) {
    return text.length <= length ? text : text.slice(0, length).replace(/[\ud800-\udbff]$/, "") + "…";
  }

  function sizeText(row) {
    const { width, height, frames } = row.rest;
    if (!width || !height) return null;
    return `${width}×${height}` + (frames ? ` × ${frames}` : "");
  }

  /** Addresses of a row's pictures: none for what a video element plays, one for GIF, one a frame for a folder of PNG. */
  function picturesOf(row) {
    if (/\.gif$/i.test(row.file)) return [row.url];
    if (/\.(mp4|webm)$/i.test(row.file)) return [];
    const frames = row.rest.frames ?? 1;
    const digits = Math.max(4, String(frames - 1).length);
    return Array.from({ length: frames }, (_, i) => `${row.url}/${String(i).padStart(digits, "0")}.png`);
  }

  // -- filter and sort ---------------------------------------------------------------------------

  const wanted = { text: "", seed: "", tag: "", state: "", job: "", fault: null, sort: "number", turned: false };
  const ORDERS = {
    number: (a, b) => a.job - b.job || a.number - b.number,
    prompt: ((collator) => (a, b) => collator.compare(beginning(a.prompt, 500), beginning(b.prompt, 500)))(
      new Intl.Collator(undefined, { numeric: true })),
    // Seeds have 64 bits, which a number does not hold.
    seed: (a, b) => a.seed.length - b.seed.length || (a.seed < b.seed ? -1 : a.seed > b.seed ? 1 : 0),
    ended: (a, b) => (a.ended < b.ended ? -1 : a.ended > b.ended ? 1 : 0),
    took: (a, b) => a.took - b.took,
  };
  const orders = new Map();
  let shown = [];

  function ordered(sort) {
    if (!orders.has(sort)) {
      const has = (row) => row[sort] !== null && row[sort] !== undefined;
      const there = rows.filter(has).sort((a, b) => ORDERS[sort](a, b) || a.index - b.index);
      orders.set(sort, { there, missing: rows.filter((row) => !has(row)) });
    }
    return orders.get(sort);
  }

  function folded(text) {
    return text.normalize("NFKC").toLowerCase();
  }

  function matches(words) {
    const { seed, tag, state, job, fault } = wanted;
    return (row) =>
      (state === "" || row.state === state) &&
      (job === "" || String(row.job) === job) &&
      (tag === "" || (row.tags ?? []).includes(tag)) &&
      (seed === "" || row.seed.startsWith(seed)) &&
      (fault === null || row.fault === fault) &&
      (words.length === 0 ||
        ((row.folded ??= folded(row.prompt)), words.every((word) => row.folded.includes(word))));
  }

  function apply() {
    const words = folded(wanted.text).split(/\s+/).filter(Boolean);
    const { there, missing } = ordered(wanted.sort);
    const keep = matches(words);
    shown = there.filter(keep);
    if (wanted.turned) shown.reverse();
    shown = shown.concat(missing.filter(keep)); // what has no such value comes last either way
    const all = shown.length === rows.length;
    byId("count").textContent = all ? `${count.format(rows.length)} videos`
      : `${count.format(shown.length)} of ${count.format(rows.length)} videos`;
    if (rows.length === 1 && all) byId("count").textContent = "1 video";
    byId("none").hidden = shown.length > 0;
    byId("none").textContent = rows.length ? "No video is like that." : "No video has been asked for yet.";
    for (const name of ["text", "seed", "tag", "state", "job"]) byId(name).classList.toggle("set", wanted[name] !== "");
    const filtered = ["text", "seed", "tag", "state", "job"].some((name) => wanted[name] !== "") || wanted.fault !== null;
    byId("clear").hidden = !filtered;
    const fault = byId("fault");
    fault.hidden = wanted.fault === null;
    if (wanted.fault !== null) {
      const first = rows.find((row) => row.fault === wanted.fault);
      fault.textContent = `× ${beginning((first?.error ?? "failed").split("\n")[0], 80)}`;
    }
    current = 0;
    lay(true);
  }

  function select(name, values) {
    const control = byId(name);
    if (values.length < (name === "state" ? 1 : 2) && !(name === "tag" && values.length)) control.hidden = true;
    for (const [value, label] of values) control.append(new Option(label, value));
  }

  function counted(values) {
    const counts = new Map();
    for (const value of values) counts.set(value, (counts.get(value) ?? 0) + 1);
    return counts;
  }

  const states = counted(rows.map((row) => row.state));
  const there = data.states.filter((state) => states.has(state));
  select("state", there.map((state) => [state, `${state} (${count.format(states.get(state))})`]));
  const jobs = counted(rows.map((row) => String(row.job)));
  select("job", [...jobs].map(([job, many]) => [job, `job ${job} (${count.format(many)})`]));
  const tags = [...counted(rows.flatMap((row) => row.tags ?? []))].sort((a, b) => b[1] - a[1]);
  select("tag", tags.map(([tag, many]) => [tag, `${beginning(tag, 60)} (${count.format(many)})`]));

  let waiting;
  for (const name of ["text", "seed"]) {
    byId(name).addEventListener("input", () => {
      clearTimeout(waiting);
      waiting = setTimeout(() => {
        for (const typed of ["text", "seed"]) wanted[typed] = byId(typed).value.trim();
        apply();
      }, 120);
    });
  }
  for (const name of ["tag", "state", "job", "sort"]) {
    byId(name).addEventListener("change", (event) => {
      wanted[name] = event.target.value;
      apply();
    });
  }
  byId("turn").addEventListener("click", (event) => {
    wanted.turned = !wanted.turned;
    event.currentTarget.setAttribute("aria-pressed", wanted.turned);
    event.currentTarget.textContent = wanted.turned ? "↓" : "↑";
    apply();
  });
  byId("more").addEventListener("click", (event) => {
    event.currentTarget.setAttribute("aria-expanded", byId("filters").classList.toggle("open"));
  });
  byId("fault").addEventListener("click", () => {
    wanted.fault = null;
    apply();
  });

  function clearFilters() {
    clearTimeout(waiting);
    for (const name of ["text", "seed", "tag", "state", "job"]) wanted[name] = byId(name).value = "";
    wanted.fault = null;
  }
  byId("clear").addEventListener("click", () => {
    clearFilters();
    apply();
    byId("text").focus();
  });
  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-state], [data-fault]");
    if (!button) return;
    clearFilters();
    if (button.dataset.state) wanted.state = byId("state").value = button.dataset.state;
    else wanted.fault = Number(button.dataset.fault);
    open("videos");
    apply();
  });

  // -- the gallery: only cards near the window are in the document, and are used again -----------

  const grid = byId("grid");
  const template = byId("card").content.firstElementChild;
  const GAP = 12;
  const size = { columns: 1, width: 0, height: 0, media: 0 };
  const cells = new Map();
  const spare = [];
  let current = 0; // the card that arrow keys start from
  const ratio = usualRatio();

  /** Width over height of most videos, within what fits a card. */
  function usualRatio() {
    const found = counted(rows.filter((row) => row.rest.width && row.rest.height)
      .map((row) => row.rest.width / row.rest.height));
    const usual = [...found].sort((a, b) => b[1] - a[1])[0]?.[0] ?? 16 / 9;
    return Math.min(16 / 9, Math.max(3 / 4, usual));
  }

  function measure() {
    const width = grid.clientWidth;
    if (!width) return false;
    const rem = parseFloat(getComputedStyle(document.documentElement).fontSize);
    const least = (width < 560 ? 9.4 : 14) * rem;
    size.columns = Math.max(1, Math.floor((width + GAP) / (least + GAP)));
    size.width = (width - GAP * (size.columns - 1)) / size.columns;
    size.media = (size.width - 2) / ratio; // less the card's edges
    const narrow = size.width < 13 * rem; // what is told of a video then takes a third line
    size.height = Math.ceil(size.media + ((tags.length ? 7.1 : 5.7) + (narrow ? 1.2 : 0)) * rem);
    return true;
  }

  /** Places all cards anew; `fresh`: other videos are shown. */
  function lay(fresh) {
    if (!measure()) return;
    const lines = Math.ceil(shown.length / size.columns);
    grid.style.height = `${Math.max(0, lines * (size.height + GAP) - GAP)}px`;
    for (const at of [...cells.keys()]) release(at);
    if (fresh) {
      const tools = grid.previousElementSibling;
      const top = grid.getBoundingClientRect().top - tools.offsetHeight;
      if (top < 0) scrollBy(0, top); // else the list would go on in its middle
    }
    render();
  }

  function release(at) {
    const cell = cells.get(at);
    cells.delete(at);
    for (const shownIn of [cell.video, cell.image]) {
      watcher.unobserve(shownIn);
      unload(shownIn);
    }
    cell.root.hidden = true;
    spare.push(cell);
  }

  function render() {
    if (!size.width || byId("videos").className !== "open") return;
    const step = size.height + GAP;
    const above = -grid.getBoundingClientRect().top;
    const first = Math.max(0, Math.floor((above - 300) / step)) * size.columns;
    const last = Math.min(shown.length, Math.ceil((above + innerHeight + 300) / step) * size.columns);
    for (const [at, cell] of [...cells]) {
      if ((at < first || at >= last) && cell.card !== document.activeElement) release(at);
    }
    for (let at = first; at < last; at++) if (!cells.has(at)) put(at);
  }

  function put(at) {
    const cell = spare.pop() ?? makeCell();
    const row = shown[at];
    const after = Math.min(...[...cells.keys()].filter((other) => other > at));
    grid.insertBefore(cell.root, cells.get(after)?.root ?? null); // Tab and screen readers go by this order
    cells.set(at, cell);
    cell.at = at;
    const { style } = cell.root;
    style.width = `${size.width}px`;
    style.height = `${size.height}px`;
    style.transform = `translate(${(at % size.columns) * (size.width + GAP)}px, ${
      Math.floor(at / size.columns) * (size.height + GAP)}px)`;
    cell.media.style.height = `${size.media}px`;
    cell.root.setAttribute("aria-setsize", shown.length);
    cell.root.setAttribute("aria-posinset", at + 1);
    cell.root.hidden = false;
    fillCard(cell, row);
  }

  function makeCell() {
    const root = template.cloneNode(true);
    const find = (what) => root.querySelector(what);
    const cell = { root, card: find(".card"), media: find(".media"), video: find("video"), image: find("img"), note: find(".note"),
                   badge: find(".badge"), prompt: find(".prompt"), facts: find(".facts"), tags: find(".tags") };
    root.cell = cell;
    return cell;
  }

  function fillCard(cell, row) {
    const done = row.state === "done";
    const [picture] = done ? picturesOf(row) : [];
    cell.video.hidden = !done || picture !== undefined;
    cell.image.hidden = picture === undefined;
    cell.note.textContent = done ? "" : beginning(row.error ?? "", 400);
    cell.note.dir = "auto";
    cell.badge.hidden = done;
    cell.badge.className = `badge ${row.state}`;
    cell.badge.textContent = row.state;
    cell.prompt.textContent = beginning(row.prompt, 300);
    cell.facts.textContent = [
      `seed ${row.seed}`, sizeText(row), row.rest.steps ? `${row.rest.steps} steps` : null, secondsText(row.took),
    ].filter(Boolean).map((part) => part.replaceAll(" ", "\u00a0")).join(" · ");
    cell.tags.replaceChildren(...(row.tags ?? []).slice(0, 12).map((tag) => {
      const mark = document.createElement("bdi");
      mark.className = "tag";
      mark.textContent = beginning(tag, 60);
      return mark;
    }));
    if (done) {
      const shownIn = picture === undefined ? cell.video : cell.image;
      shownIn.dataset.url = picture ?? `${row.url}#t=0.001`; // Safari on a phone draws a first picture only if asked for
      watcher.observe(shownIn);
    }
  }

  // A video's file is opened when its card has stayed near the window for a moment, not while it is scrolled past.
  const watcher = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      clearTimeout(target.soon);
      if (isIntersecting) target.soon = setTimeout(load, 120, target);
      else unload(target);
    }
  }, { rootMargin: "200px 0px" });

  function load(shownIn) {
    if (shownIn.hidden || !shownIn.isConnected || shownIn.hasAttribute("src")) return;
    shownIn.src = shownIn.dataset.url;
  }

  function unload(shownIn) {
    clearTimeout(shownIn.soon);
    if (!shownIn.hasAttribute("src")) return;
    shownIn.pause?.();
    shownIn.removeAttribute("src");
    shownIn.load?.();
  }

  grid.addEventListener("error", ({ target }) => {
    const cell = target.closest(".cell")?.cell;
    if (cell && target.hasAttribute("src")) {
      target.hidden = true;
      cell.note.textContent = "The file is missing or cannot be played.";
    }
  }, true);

  let playing = null;
  function preview(video) {
    if (playing === video) return;
    if (playing) {
      playing.pause();
      if (playing.readyState) playing.currentTime = 0;
    }
    playing = video;
    if (!video || video.hidden || calm.matches) return;
    clearTimeout(video.soon);
    load(video);
    video.play().catch(() => {}); // it may be gone before it begins
  }
  grid.addEventListener("pointerover", (event) => {
    if (event.pointerType === "mouse") preview(event.target.closest(".cell")?.cell.video ?? null);
  });
  grid.addEventListener("pointerleave", () => preview(null));
  grid.addEventListener("focusin", (event) => {
    const cell = event.target.closest(".cell")?.cell;
    if (!cell) return;
    current = cell.at;
    if (cell.card.matches(":focus-visible")) preview(cell.video);
  });
  grid.addEventListener("focusout", () => preview(null));
  grid.addEventListener("click", (event) => {
    const cell = event.target.closest(".cell")?.cell;
    if (cell) view(cell.at);
  });

  function focusCard(at) {
    if (!shown.length) return;
    current = Math.max(0, Math.min(shown.length - 1, at));
    const step = size.height + GAP;
    const top = grid.getBoundingClientRect().top + Math.floor(current / size.columns) * step;
    const hidden = grid.previousElementSibling.offsetHeight + 8; // behind the tools, which stay at the top
    if (top < hidden) scrollBy(0, top - hidden);
    else if (top + size.height > innerHeight - 8) scrollBy(0, top + size.height - innerHeight + 8);
    render();
    cells.get(current)?.card.focus({ preventScroll: true });
  }

  const MOVES = {
    ArrowLeft: () => current - 1, ArrowRight: () => current + 1,
    ArrowUp: () => (current >= size.columns ? current - size.columns : current),
    ArrowDown: () => Math.min(current + size.columns, shown.length - 1),
    Home: () => 0, End: () => shown.length - 1,
  };
  grid.addEventListener("keydown", (event) => {
    if (!MOVES[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    focusCard(MOVES[event.key]());
  });

  let drawn = 0;
  const soon = () => {
    drawn ||= requestAnimationFrame(() => {
      drawn = 0;
      render();
    });
  };
  addEventListener("scroll", soon, { passive: true });
  let width = 0;
  new ResizeObserver(() => {
    if (grid.clientWidth === width) return;
    width = grid.clientWidth;
    lay(false);
  }).observe(grid);
  addEventListener("resize", soon);

  // -- one video, large --------------------------------------------------------------------------

  const dialog = byId("view");
  const large = dialog.querySelector("video");
  const still = dialog.querySelector("img");
  const inView = (what) => dialog.querySelector(what);
  let seen = null;
  let viewed = 0; // its place among those shown

  function view(at) {
    viewed = at;
    seen = shown[at];
    const done = seen.state === "done";
    const pictures = done ? picturesOf(seen) : [];
    large.hidden = !done || pictures.length > 0;
    show(pictures, seen.rest.fps ?? 24);
    inView(".note").hidden = done;
    inView(".note").textContent = done ? "" : [seen.state, seen.error].filter(Boolean).join("\n\n");
    if (!large.hidden) large.src = seen.url;
    else large.removeAttribute("src");
    inView(".prompt").textContent = seen.prompt;
    inView(".place").textContent = `${count.format(at + 1)} of ${count.format(shown.length)}`;
    inView(".previous").disabled = at === 0;
    inView(".next").disabled = at === shown.length - 1;
    const file = inView(".file");
    if (done) file.href = pictures[0] ?? seen.url;
    else file.removeAttribute("href");
    inView(".record").replaceChildren(...recordParts(seen));
    if (!dialog.open) dialog.showModal();
    inView(".stage").focus();
    inView(".side").scrollTop = dialog.scrollTop = 0;
    if (!large.hidden && !calm.matches) large.play().catch(() => {});
  }

  let turning;
  /** Pictures one after the other, round and round; only the first where movement is not wanted. */
  function show(pictures, fps) {
    clearInterval(turning);
    still.hidden = !pictures.length;
    if (!pictures.length) return still.removeAttribute("src");
    let at = 0;
    still.src = pictures[0];
    if (pictures.length > 1 && !calm.matches) {
      turning = setInterval(() => {
        if (still.complete) still.src = pictures[(at = (at + 1) % pictures.length)];
      }, 1000 / fps);
    }
  }

  function recordOf(row) {
    const record = {};
    for (const name of data.columns) if (name !== "url" && name !== "fault") record[name] = row[name];
    return { ...record, request: requestOf(row) };
  }

  function text(value) {
    if (value === null || value === undefined || value === "") return null;
    if (Array.isArray(value)) return value.length ? value.join(", ") : null;
    return typeof value === "object" ? JSON.stringify(value) : String(value);
  }

  function recordParts(row) {
    const request = Object.entries(requestOf(row)).filter(([name]) => name !== "prompt");
    const phases = data.phases.filter((phase) => phase in (row.seconds ?? {}));
    return [
      ["Request", request],
      ["Seconds", phases.map((phase) => [phase, secondsText(row.seconds[phase])])],
      ["Made", [["state", row.state], ["error", row.error], ["job", row.job], ["number", row.number],
        ["attempts", row.attempts], ["step saved", row.step || null], ["largest batch", row.batch],
        ["isolation", row.isolation], ["started", timeText(row.started)], ["ended", timeText(row.ended)]]],
      ["File", [["file", row.file], ["size", row.size === null ? null : bytesText(row.size)], ["sha256", row.sha256],
        ["frames_sha256", row.frames_sha256]]],
      ["Made with", [...Object.entries(row.versions ?? {}), ["model_hash", row.model_hash],
        ["fingerprint", row.fingerprint]]],
    ].flatMap(([title, pairs]) => {
      const known = pairs.filter(([, value]) => text(value) !== null);
      if (!known.length) return [];
      const head = document.createElement("h3");
      head.textContent = title;
      const list = document.createElement("dl");
      for (const [name, value] of known) {
        const term = document.createElement("dt");
        const told = document.createElement("dd");
        term.textContent = name;
        told.textContent = text(value);
        told.dir = "auto";
        list.append(term, told);
      }
      return [head, list];
    });
  }

  const turn = (by) => {
    const at = viewed + by;
    if (at >= 0 && at < shown.length) view(at);
  };
  inView(".previous").addEventListener("click", () => turn(-1));
  inView(".next").addEventListener("click", () => turn(1));
  inView(".close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close(); // outside of it
  });
  dialog.addEventListener("close", () => {
    show([], 1);
    large.pause();
    large.removeAttribute("src");
    large.load();
    focusCard(viewed); // the browser has put the focus back to the card that was opened first
  });
  for (const shownIn of [large, still]) {
    shownIn.addEventListener("error", () => {
      if (!shownIn.hasAttribute("src")) return;
      clearInterval(turning);
      shownIn.hidden = true;
      inView(".note").hidden = false;
      inView(".note").textContent = "The file is missing or cannot be played.";
    });
  }
  dialog.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
      event.preventDefault();
      turn(event.key === "ArrowLeft" ? -1 : 1);
    } else if (event.key === " " && !event.target.closest("button, a")) {
      event.preventDefault();
      if (large.hidden) return;
      if (large.paused) large.play().catch(() => {});
      else large.pause();
    }
  }, true); // before the video's own controls, which would seek

  async function copy(words, button) {
    let worked = true;
    try {
      await navigator.clipboard.writeText(words);
    } catch { // a page over plain http may not
      const area = document.createElement("textarea");
      area.value = words;
      button.after(area);
      area.select();
      worked = document.execCommand("copy");
      area.remove();
      button.focus();
    }
    const label = (button.label ??= button.textContent);
    button.textContent = worked ? "Copied" : "Not allowed";
    setTimeout(() => (button.textContent = label), 1200);
  }
  inView(".copy-prompt").addEventListener("click", (event) => copy(seen.prompt, event.currentTarget));
  inView(".copy-seed").addEventListener("click", (event) => copy(seen.seed, event.currentTarget));
  inView(".copy-record").addEventListener("click", (event) =>
    copy(JSON.stringify(recordOf(seen), null, 2), event.currentTarget));
  for (const button of document.querySelectorAll(".copyable .copy")) {
    button.addEventListener("click", () => copy(button.previousElementSibling.textContent, button));
  }

  // -- the page's parts --------------------------------------------------------------------------

  const links = [...document.querySelectorAll("nav a")];

  function open(name) {
    for (const link of links) {
      const its = link.hash === `#${name}`;
      byId(link.hash.slice(1)).classList.toggle("open", its);
      if (its) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
    if (name !== "videos") preview(null);
    else soon();
  }
  for (const link of links) {
    link.addEventListener("click", (event) => {
      event.preventDefault(); // no jump to the part's beginning
      history.replaceState(null, "", link.hash);
      open(link.hash.slice(1));
    });
  }
  const asked = location.hash.slice(1);
  open(links.some((link) => link.hash === location.hash) ? asked : "videos");
  apply();
})();
