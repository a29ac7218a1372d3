"""A page in a real headless browser: what loads and what it complains about."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
PROBE = """<pre id="probe"></pre><script>
window.addEventListener("load", () => {
  const images = [...document.images].map(image => image.complete ? image.naturalWidth : 0);
  document.getElementById("probe").textContent = JSON.stringify(
    {images: images, headings: document.querySelectorAll("h2").length,
     wider: document.documentElement.scrollWidth - document.documentElement.clientWidth});
});</script></body>"""


def check_page(path, figures, tmp_path):
    """All ``figures`` images of a page load, it fits its window, and the browser reports no error; skips without one.

    The page gets a script that writes what the browser made of it into the document, which the browser then prints.
    """
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is on PATH: no headless browser to open the page in")
    text = path.read_text(encoding="utf-8")
    assert text.count("</body>") == 1
    probed = tmp_path / "probed.html"
    probed.write_text(text.replace("</body>", PROBE), encoding="utf-8")
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1200,900",
         f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--dump-dom", probed.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    found = json.loads(unescape(re.search(r'<pre id="probe">(.*?)</pre>', done.stdout).group(1)))
    assert len(found["images"]) == figures and min(found["images"]) > 100, found
    assert found["headings"] and found["wider"] <= 0, found
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
