// The grid of pictures: captions saved in place, keyboard, undo, filter, find and replace, dropped files.
"use strict";
(function () {
  const saved = new WeakMap(); // the text of each caption as the server has it
  const areas = (shelf) => [...shelf.querySelectorAll(".tile:not([hidden]) textarea")];

  async function save(area, force = false) {
    const tile = area.closest(".tile"), shelf = area.closest(".shelf");
    const before = saved.get(area) ?? area.defaultValue;
    if (area.readOnly || (area.value.trim() === before.trim() && !force)) return true;
    const mark = tile.querySelector(".saved");
    mark.className = "saved";
    mark.textContent = "…";
    try {
      const fields = { folder: shelf.dataset.folder, file: tile.dataset.file, text: area.value };
      if (!force) fields.before = before;
      const values = await pixtune.send(`/caption/${shelf.dataset.config}`, fields);
      saved.set(area, values.text);
      mark.textContent = "saved";
      setTimeout(() => { mark.textContent = ""; }, 2500);
      tile.querySelectorAll(".mark.error").forEach((each) => { if (values.text && each.textContent === "no caption yet") each.remove(); });
      if (!tile.querySelector(".mark")) tile.classList.remove("marked");
      shelf.querySelector(".undo").disabled = false;
      countMissing();
      document.body.dispatchEvent(new Event("edited"));
      return true;
    } catch (error) {
      mark.classList.add("bad");
      mark.textContent = error.status === 409 ? "changed elsewhere" : "not saved";
      if (error.status === 409 && confirm("This caption was changed elsewhere meanwhile. Save yours over it?")) return save(area, true);
      return false;
    }
  }

  function countMissing() {
    const count = [...document.querySelectorAll(".tile textarea")].filter((each) => !each.value.trim()).length;
    document.getElementById("missing-note").textContent = count ? `, ${count} without a caption` : "";
  }

  // A check or the captioner that has ended leaves new marks and captions; a caption that is being written stays.
  let wasRunning = false;
  document.body.addEventListener("htmx:afterSettle", (event) => {
    if (!["check", "describe-state"].includes(event.detail.target?.id)) return;
    const isRunning = Boolean(document.querySelector("#check .spinner, #describe-state [data-is-running]"));
    if (wasRunning && !isRunning) renew();
    wasRunning = isRunning;
  });
  async function renew() {
    const text = await fetch(location.pathname, { headers: { accept: "text/html" } }).then((answer) => answer.text());
    const fresh = new DOMParser().parseFromString(text, "text/html");
    fresh.querySelectorAll(".shelf").forEach((shelf, number) => {
      const now = new Map([...shelf.querySelectorAll(".tile")].map((tile) => [tile.dataset.name, tile]));
      document.querySelectorAll(".shelf")[number]?.querySelectorAll(".tile").forEach((tile) => {
        const other = now.get(tile.dataset.name);
        if (!other) return;
        const area = tile.querySelector("textarea");
        tile.querySelectorAll(".mark").forEach((each) => each.remove());
        area.before(...other.querySelectorAll(".mark"));
        tile.className = other.className;
        if (area !== document.activeElement && area.value.trim() === (saved.get(area) ?? area.defaultValue).trim()) {
          area.value = other.querySelector("textarea").value;
          saved.set(area, area.value);
        }
      });
    });
    countMissing();
  }

  document.addEventListener("focusin", (event) => { if (event.target.matches(".tile textarea") && !saved.has(event.target)) saved.set(event.target, event.target.defaultValue); });
  document.addEventListener("focusout", (event) => { if (event.target.matches(".tile textarea")) save(event.target); });
  addEventListener("beforeunload", (event) => { // a caption that is being written is sent off with the page
    const area = document.activeElement;
    if (area && area.matches(".tile textarea") && area.value.trim() !== (saved.get(area) ?? area.defaultValue).trim()) {
      const shelf = area.closest(".shelf");
      const fields = { folder: shelf.dataset.folder, file: area.closest(".tile").dataset.file, text: area.value, before: saved.get(area) ?? area.defaultValue };
      fetch(`/caption/${shelf.dataset.config}`, { method: "POST", body: new URLSearchParams(fields), keepalive: true });
    }
  });

  document.addEventListener("keydown", (event) => {
    const area = event.target.closest(".tile textarea");
    if (event.ctrlKey && event.shiftKey && event.key.toLowerCase() === "z") {
      event.preventDefault();
      undo((area || document).closest?.(".shelf") || document.querySelector(".shelf"));
    } else if (area && event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      const all = areas(area.closest(".shelf"));
      const next = all[(all.indexOf(area) + (event.shiftKey ? all.length - 1 : 1)) % all.length];
      next.focus();
      next.scrollIntoView({ block: "center" });
    } else if (area && event.key === "Escape") {
      area.value = saved.get(area) ?? area.defaultValue;
    }
  });

  async function undo(shelf) {
    if (!shelf) return;
    const values = await pixtune.send(`/undo/${shelf.dataset.config}`, { folder: shelf.dataset.folder });
    setTexts(shelf, values.texts);
    pixtune.say(values.words);
  }
  function setTexts(shelf, texts) {
    shelf.querySelectorAll(".tile").forEach((tile) => {
      if (tile.dataset.file in texts) {
        const area = tile.querySelector("textarea");
        area.value = texts[tile.dataset.file];
        saved.set(area, area.value);
      }
    });
  }

  function filter(shelf) {
    const word = shelf.querySelector(".filter").value.toLowerCase();
    const onlyMarked = shelf.querySelector(".only-marked").checked;
    shelf.querySelectorAll(".tile").forEach((tile) => {
      const text = `${tile.dataset.name} ${tile.querySelector("textarea").value}`.toLowerCase();
      tile.hidden = !text.includes(word) || (onlyMarked && !tile.classList.contains("marked"));
    });
  }
  document.addEventListener("input", (event) => { if (event.target.matches(".filter, .only-marked")) filter(event.target.closest(".shelf")); });

  // ---- dialogs
  const large = document.getElementById("large");
  let current = null;
  document.addEventListener("click", (event) => {
    const shelf = event.target.closest(".shelf");
    const picture = event.target.closest(".tile .picture");
    if (picture && picture.dataset.large) {
      const tile = picture.closest(".tile");
      const shown = [...picture.querySelectorAll("img")].map((img) => {
        const copy = document.createElement("img");
        copy.src = img.classList.contains("control") ? img.src.replace(/\?.*|$/, "?edge=1280") : picture.dataset.large;
        copy.alt = img.alt;
        return copy;
      });
      large.querySelector(".large-pictures").replaceChildren(...shown);
      large.querySelector("figcaption").textContent = `${tile.dataset.name}: ${tile.querySelector("textarea").value || "no caption"}`;
      large.showModal();
    } else if (event.target.closest(".swap")) {
      const name = event.target.closest(".tile").dataset.name;
      pixtune.send(`/swap/${shelf.dataset.config}`, { folder: shelf.dataset.folder, name }).then(() => location.reload());
    } else if (event.target.closest(".undo")) {
      undo(shelf);
    } else if (event.target.closest(".open-replace")) {
      current = shelf;
      document.getElementById("replace").showModal();
    } else if (event.target.closest(".open-describe")) {
      current = shelf;
      document.getElementById("describe").showModal();
    }
  });

  const replace = document.getElementById("replace");
  const fields = () => ({ folder: current.dataset.folder, find: replace.querySelector("#find").value, replace: replace.querySelector("#put").value, trigger: replace.querySelector("#find").value ? "" : replace.querySelector("#trigger").value });
  let waiting;
  replace.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(async () => {
      const note = replace.querySelector(".preview");
      if (!fields().find && !fields().trigger) { note.textContent = ""; return; }
      const values = await pixtune.send(`/replace/${current.dataset.config}`, { ...fields(), preview: "yes" });
      const first = values.examples[0];
      note.textContent = values.num_changed ? `${values.num_changed} captions would change, for example: ${first.after}` : "No caption would change.";
    }, 250);
  });
  replace.querySelector(".apply").addEventListener("click", async () => {
    const values = await pixtune.send(`/replace/${current.dataset.config}`, fields());
    replace.close();
    pixtune.say(`${values.num_changed} captions changed`);
    if (values.num_changed) location.reload();
  });

  const describe = document.getElementById("describe");
  describe.querySelector(".apply").addEventListener("click", async () => {
    await pixtune.send(`/describe/${current.dataset.config}`, { preset: describe.querySelector("#preset").value, trigger: describe.querySelector("#describe-trigger").value });
    describe.close();
    location.reload();
  });

  // ---- dropped files
  async function upload(shelf, files) {
    let number = 0, bad = 0;
    const before = document.title;
    for (const file of files) {
      number += 1;
      document.title = `${number} of ${files.length} · ${before}`;
      const progress = document.getElementById("messages");
      progress.replaceChildren(Object.assign(document.createElement("div"), { className: "toast", textContent: `Adding ${number} of ${files.length}: ${file.name}` }));
      try {
        const url = `/upload/${shelf.dataset.config}?folder=${shelf.dataset.folder}&name=${encodeURIComponent(file.name)}`;
        await pixtune.send(url, {}, { method: "PUT", body: file });
      } catch { bad += 1; }
    }
    document.title = before;
    if (bad < number) setTimeout(() => location.reload(), bad ? 6000 : 100);
  }
  document.addEventListener("change", (event) => { if (event.target.matches(".files")) upload(event.target.closest(".shelf"), [...event.target.files]); });
  for (const kind of ["dragenter", "dragover"]) document.addEventListener(kind, (event) => {
    event.preventDefault();
    (event.target.closest?.(".shelf") || document.querySelector(".shelf"))?.classList.add("over");
  });
  for (const kind of ["dragleave", "drop"]) document.addEventListener(kind, (event) => {
    if (kind === "dragleave" && event.relatedTarget) return;
    document.querySelectorAll(".over").forEach((each) => each.classList.remove("over"));
  });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    const shelf = event.target.closest?.(".shelf") || document.querySelector(".shelf");
    if (shelf) upload(shelf, [...event.dataTransfer.files]);
  });
})();
