// Paints the part of a picture that counts: by mouse, finger or pen, or by the arrow keys and Space.
"use strict";
(function () {
  const dialog = document.getElementById("mask");
  if (!dialog) return;
  const canvas = dialog.querySelector("canvas"), brush = dialog.querySelector("#brush"), erase = dialog.querySelector("#erase");
  const pen = canvas.getContext("2d");
  let tile = null, undone = [], at = null, last = null;

  const remember = () => { undone.push(pen.getImageData(0, 0, canvas.width, canvas.height)); if (undone.length > 20) undone.shift(); };
  function dab(x, y) {
    pen.globalCompositeOperation = erase.checked ? "destination-out" : "source-over";
    pen.strokeStyle = pen.fillStyle = "#3b82f6";
    pen.lineCap = "round";
    pen.lineWidth = Number(brush.value) / 100 * canvas.width;
    pen.beginPath();
    pen.moveTo(...(last || [x, y]));
    pen.lineTo(x, y + 0.01);
    pen.stroke();
    last = [x, y];
  }
  const place = (event) => { const box = canvas.getBoundingClientRect(); return [(event.clientX - box.left) * canvas.width / box.width, (event.clientY - box.top) * canvas.height / box.height]; };
  let isDown = false;
  canvas.addEventListener("pointerdown", (event) => { canvas.setPointerCapture(event.pointerId); remember(); isDown = true; last = null; dab(...place(event)); });
  canvas.addEventListener("pointermove", (event) => { if (isDown) dab(...place(event)); });
  for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => { isDown = false; last = null; });
  canvas.addEventListener("keydown", (event) => {
    const step = canvas.width * Number(brush.value) / 200;
    const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!way && event.key !== " ") return;
    event.preventDefault();
    at = at || [canvas.width / 2, canvas.height / 2];
    if (way) at = [Math.min(Math.max(at[0] + way[0] * step, 0), canvas.width), Math.min(Math.max(at[1] + way[1] * step, 0), canvas.height)];
    if (event.key === " " || event.shiftKey) { if (event.key === " ") { remember(); last = null; } dab(...at); }
    dialog.querySelector(".where").textContent = `brush at ${Math.round(100 * at[0] / canvas.width)}% across, ${Math.round(100 * at[1] / canvas.height)}% down`;
  });

  document.addEventListener("click", async (event) => {
    const button = event.target.closest(".paint-mask");
    if (!button) return;
    tile = button.closest(".tile");
    const shelf = tile.closest(".shelf"), img = dialog.querySelector("img");
    dialog.querySelector("h2").textContent = `What counts in ${tile.dataset.name}`;
    img.src = tile.querySelector(".picture").dataset.large;
    await img.decode();
    canvas.width = img.naturalWidth;
    canvas.height = img.naturalHeight;
    undone = []; at = null;
    const answer = await fetch(`/mask/${shelf.dataset.config}?folder=${shelf.dataset.folder}&name=${encodeURIComponent(tile.dataset.name)}`, { headers: { accept: "application/json" } });
    const values = await answer.json();
    if (values.place) {
      const mask = new Image();
      mask.src = `/thumb/${values.place.split("/").map(encodeURIComponent).join("/")}?edge=1280`;
      await mask.decode().catch(() => {});
      pen.globalCompositeOperation = "source-over";
      pen.drawImage(mask, 0, 0, canvas.width, canvas.height);
      const pixels = pen.getImageData(0, 0, canvas.width, canvas.height);
      for (let i = 0; i < pixels.data.length; i += 4) { const level = pixels.data[i]; pixels.data.set([59, 130, 246, level], i); }
      pen.putImageData(pixels, 0, 0);
    }
    dialog.showModal();
    canvas.focus();
  });
  dialog.querySelector(".fill").addEventListener("click", () => { remember(); pen.globalCompositeOperation = "source-over"; pen.fillStyle = "#3b82f6"; pen.fillRect(0, 0, canvas.width, canvas.height); });
  dialog.querySelector(".clear").addEventListener("click", () => { remember(); pen.clearRect(0, 0, canvas.width, canvas.height); });
  dialog.querySelector(".undo-stroke").addEventListener("click", () => { const before = undone.pop(); if (before) pen.putImageData(before, 0, 0); });
  dialog.querySelector(".save-mask").addEventListener("click", async () => {
    const out = document.createElement("canvas");
    out.width = canvas.width;
    out.height = canvas.height;
    const ink = out.getContext("2d"), pixels = pen.getImageData(0, 0, canvas.width, canvas.height);
    let any = false;
    for (let i = 0; i < pixels.data.length; i += 4) { const level = pixels.data[i + 3]; any = any || level > 0; pixels.data.set([level, level, level, 255], i); }
    if (!any) { pixtune.say("Nothing is painted: paint what is to count.", true); return; }
    ink.putImageData(pixels, 0, 0);
    const shelf = tile.closest(".shelf");
    const body = await new Promise((resolve) => out.toBlob(resolve, "image/png"));
    await pixtune.send(`/mask/${shelf.dataset.config}?folder=${shelf.dataset.folder}&name=${encodeURIComponent(tile.dataset.name)}`, {}, { method: "PUT", body });
    dialog.close();
    tile.querySelector(".paint-mask").classList.add("has-mask");
    pixtune.say("Mask saved: the loss counts where you painted");
  });
})();
