"""Writes docs/pictures/ui-*.webp: the pages of `pixtune ui`, wide and narrow, light and dark, after a run of the demo.

Needs Chromium and Playwright for Python, and takes some minutes: the small model is trained on the way.

    python scripts/ui_screenshots.py
"""

from __future__ import annotations

import io
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import expect, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ROOT / "docs" / "pictures"
VIEWS = (("wide", 1440, 960, "light"), ("wide-dark", 1440, 960, "dark"), ("narrow", 390, 844, "dark"))
KEPT = {
    "home": ("wide",),
    "pictures": ("wide", "narrow"),
    "plan": ("wide", "narrow"),
    "run": ("wide", "wide-dark", "narrow"),
    "result": ("wide",),
    "compare": ("wide-dark",),
    "queue": ("wide",),
}
"""Views that the documents show of each page."""


def main() -> None:
    """Trains, and takes the pictures."""
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "training"
        for part in ("assets/tiny-qwen-image", "assets/demo-style", "train_configs"):
            shutil.copytree(ROOT / part, home / part)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        env = {**os.environ, "PIXTUNE_QUEUE": f"{folder}/queue", "OMP_NUM_THREADS": "1"}
        words = [sys.executable, "-m", "pixtune.cli", "ui", str(home), "--no-browser", "--port", str(port)]
        server = subprocess.Popen(words, env=env)
        try:
            time.sleep(8)
            with sync_playwright() as driver:
                chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
                browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
                take_all(browser, f"http://127.0.0.1:{port}", home)
                browser.close()
        finally:
            server.terminate()
            server.wait()


def take_all(browser: Any, base: str, home: Path) -> None:
    """Trains two runs on the page, and takes a picture of each page in each view."""
    page = browser.new_context(base_url=base).new_page()
    page.set_default_timeout(600_000)
    for name, rank in (("stickers", "16"), ("stickers-small", "4")):
        page.goto("/")
        page.get_by_label("Name").fill(name)
        page.get_by_role("button", name="Go to the pictures").click()
        page.wait_for_url("**/pictures/**")
        if name == "stickers":
            shutil.copyfile(*(home / "datasets" / name / f"{stem}.png" for stem in ("owl", "owl-again")))
            (home / "datasets" / name / "owl-again.txt").write_text("owl, twemoji style")
            page.get_by_role("button", name="Check the pictures").click()
            expect(page.locator("#check summary").first).to_contain_text("Checked", timeout=600_000)
        page.get_by_role("link", name="Next: the plan").click()
        config = home / "configs" / f"{name}.yaml"
        text = config.read_text().replace("rank: 8", f"rank: {rank}").replace("every: 20", "every: 10")
        config.write_text(text + "validation: {every: 10, num_draws: 1}\n")
        page.reload()
        page.get_by_role("button", name="Start the run").click()
        page.wait_for_url("**/run/**")
        expect(page.locator("#state")).to_have_text("finished", timeout=900_000)
    for name in ("tomorrow", "night"):
        text = (home / "configs" / "stickers.yaml").read_text().replace("runs/stickers", f"runs/{name}")
        (home / "configs" / f"{name}.yaml").write_text(text)
        start_at = {"tomorrow": "+20h", "night": "+2h"}[name]
        fields = {"what": "add", "config": f"here/configs/{name}.yaml", "start_at": start_at}
        page.request.post("/queue", form=fields)
    urls = {
        "home": "/",
        "pictures": "/pictures/here/configs/stickers.yaml",
        "plan": "/plan/here/configs/real.yaml?card=RTX+4090",
        "run": "/run/here/runs/stickers",
        "result": "/result/here/runs/stickers",
        "compare": "/compare?run=here/runs/stickers&run=here/runs/stickers-small",
        "queue": "/queue",
    }
    text = (ROOT / "train_configs" / "train_lora.yaml").read_text()
    (home / "configs" / "real.yaml").write_text(text.replace("./dataset", "datasets/stickers"))
    for view, width, height, colours in VIEWS:
        options = {"viewport": {"width": width, "height": height}, "color_scheme": colours}
        page = browser.new_context(base_url=base, **options).new_page()
        for name, url in urls.items():
            page.goto(url)
            page.wait_for_load_state("networkidle") if name not in ("run", "queue") else page.wait_for_timeout(4000)
            page.wait_for_timeout(1500)
            whole = name in ("run", "compare") and view != "narrow"
            picture: Image.Image = Image.open(io.BytesIO(page.screenshot(full_page=whole)))
            if whole:
                picture = picture.crop((0, 0, picture.width, min(picture.height, 2300)))
            if view in KEPT[name]:
                picture.convert("RGB").save(PICTURES / f"ui-{name}-{view}.webp", quality=80, method=6)
            print(f"{name} {view}", flush=True)


if __name__ == "__main__":
    main()
