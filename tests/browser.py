"""Pages of reports: their tags, their data, and how a headless Chromium shows them in a sandboxed iframe."""

from __future__ import annotations

import asyncio
import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import aiohttp
import pytest

WIDTHS = (390, 1280)
_WRAPPED = """<!doctype html><meta charset="utf-8"><body><pre id="out"></pre><script>
const page = {page}, widths = {widths}, out = [];
addEventListener("message", (event) => {{
  out.push(event.data);
  if (out.length === widths.length) document.getElementById("out").textContent = JSON.stringify(out);
}});
for (const width of widths) {{
  const frame = document.createElement("iframe");
  frame.sandbox = "allow-scripts";
  frame.style = `width:${{width}}px;height:800px;border:0`;
  frame.src = URL.createObjectURL(new Blob([page], {{ type: "text/html" }}));
  document.body.append(frame);
}}
</script>"""


def told_by(page: str, watch: str, scheme: str, folder: Path) -> list[dict[str, Any]]:
    """What a script put at the head of a page posts to its parent, at each of `WIDTHS`; there is no network.

    Args:
        scheme: light or dark.
        folder: for the browser's profile.
    """
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium on this machine")
    watched = json.dumps(page.replace("<head>", f"<head>{watch}", 1)).replace("</", "<\\/")
    wrapped = folder / "wrapped.html"
    wrapped.write_text(_WRAPPED.format(page=watched, widths=list(WIDTHS)))
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder / 'profile'}"]
    command += [f"--blink-settings=preferredColorScheme={'0' if scheme == 'dark' else '1'}"]
    command += [wrapped.as_uri()]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            told = json.loads(asyncio.run(_text(folder / "profile" / "DevToolsActivePort")))
        finally:
            process.terminate()
    assert sorted(frame["width"] for frame in told) == list(WIDTHS)
    return list(told)


async def _text(port_file: Path, limit_s: float = 60.0) -> str:
    """What the page that a browser shows writes into its `#out`."""
    ask = {"expression": 'document.getElementById("out")?.textContent', "returnByValue": True}
    async with asyncio.timeout(limit_s):
        while not port_file.exists() or "\n" not in port_file.read_text():
            await asyncio.sleep(0.1)
        port = port_file.read_text().split()[0]
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json") as answer:
                pages = [found for found in await answer.json() if found["type"] == "page"]
            async with session.ws_connect(pages[0]["webSocketDebuggerUrl"]) as socket:
                while True:
                    await socket.send_json({"id": 1, "method": "Runtime.evaluate", "params": ask})
                    if told := (await socket.receive_json())["result"]["result"].get("value"):
                        return str(told)
                    await asyncio.sleep(0.2)


class Tags(html.parser.HTMLParser):
    """Every tag with its attributes; those left open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def specifications(text: str) -> list[dict[str, Any]]:
    """The pictures' data, as the page's script reads them."""
    return [
        json.loads(found) for found in re.findall(r'type="application/json" id="[^"]+">(.*?)</script>', text)
    ]
