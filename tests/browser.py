"""A real Chromium for the tests of pages."""

import contextlib
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

from tests.services import program

# Text looks the same wherever the tests run: Roboto, and DejaVu for code.
_FONTS = """<?xml version="1.0"?><!DOCTYPE fontconfig SYSTEM "urn:fontconfig:fonts.dtd">
<fontconfig>
  <dir>{roboto}</dir><dir>/usr/share/fonts</dir><cachedir>{cache}</cachedir>
  <match target="pattern">
    <test name="family" compare="not_contains"><string>mono</string></test>
    <edit name="family" mode="append" binding="strong"><string>Roboto</string></edit>
  </match>
  <match target="pattern">
    <edit name="family" mode="append" binding="strong"><string>DejaVu Sans Mono</string></edit>
  </match>
</fontconfig>
"""


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """A browser without windows. The test is skipped if it is not here."""
    executable = program("chromium-headless-shell")
    font = importlib.util.find_spec("font_roboto")
    assert font is not None
    assert font.origin is not None
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "fonts.conf"
        roboto = Path(font.origin).parent / "files"
        config.write_text(_FONTS.format(roboto=roboto, cache=folder))
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=executable,
                env={**os.environ, "FONTCONFIG_FILE": str(config)},
                # Containers have no user namespaces, and a small /dev/shm.
                args=[
                    "--no-sandbox",
                    "--disable-dev-shm-usage",
                    "--use-fake-device-for-media-stream",  # a camera that shows a test card
                    "--use-fake-ui-for-media-stream",
                ],
            )
            yield browser
            browser.close()


def faults_of(page: Page) -> list[str]:
    """What the page logs as errors from now on, such as broken policies and exceptions. Answers
    with an error are not among them."""
    faults: list[str] = []

    def note(text: str) -> None:
        if "Failed to load resource" not in text:
            faults.append(text)

    page.on("console", lambda message: note(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: note(str(error)))
    return faults
