"""A headless Chromium that a test controls with the DevTools protocol over two pipes."""

import base64
import json
import os
import shutil
from contextlib import contextmanager

from . import missing
from .project import Process, started, wait_for


@contextmanager
def browser(folder):
    """Give a Browser with its profile in this folder, until the block ends."""
    if not (command := shutil.which("chromium") or shutil.which("google-chrome")):
        missing("chromium is not installed: sudo apt install chromium")
    options = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --hide-scrollbars"
    (orders, write), (read, answers) = os.pipe(), os.pipe()
    # Chromium reads from descriptor 3 and writes to 4. Not sh: dash takes none above 9.
    command = ["bash", "-c", f'exec "$0" {options} "$@" 3<&{orders} 4>&{answers}', command]
    command += ["--remote-debugging-pipe", f"--user-data-dir={folder}"]
    with started(Process(command, folder.with_suffix(".log"), pass_fds=[orders, answers])):
        os.close(orders)
        os.close(answers)
        yield Browser(open(read, "rb", buffering=0), open(write, "wb", buffering=0))


class Browser:
    """One tab."""

    def __init__(self, answers, orders):
        self.answers, self.orders, self.rest = answers, orders, b""
        self.number, self.session = 0, {}
        self.events = []  # events of the protocol's domains that were enabled
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}

    def send(self, method, **params):
        """Send a command of the protocol and return its result."""
        self.number += 1
        order = {"id": self.number, "method": method, "params": params, **self.session}
        self.orders.write(json.dumps(order).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                self.rest += (part := self.answers.read(65536))
                assert part, "the browser has ended"
            text, _, self.rest = self.rest.partition(b"\0")
            answer = json.loads(text)
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def run(self, script):
        """Return the value of a JavaScript expression, or None while a page loads."""
        return self.send("Runtime.evaluate", expression=script)["result"].get("value")

    def wait(self, script):
        """Wait until the expression is true."""
        wait_for(lambda: self.run(f"!!({script})"))

    def open(self, url, width=1280, height=800):
        size = {"width": width, "height": height, "deviceScaleFactor": 1}
        self.send("Emulation.setDeviceMetricsOverride", mobile=width < 500, **size)
        self.send("Page.navigate", url=url)
        self.wait("document.readyState == 'complete' && location.href != 'about:blank'")

    def log_in(self, site):
        """Log in through the form, as the demo user of `make run`."""
        self.open(f"{site.web}/login/")
        for field in ("USERNAME", "PASSWORD"):
            self.run(f"id_{field.lower()}.value = {site.user()[field]!r}")
        self.run("document.querySelector('form [type=submit]').click()")
        self.wait(
            "document.querySelector('#jobs, #task, #message') && document.readyState == 'complete'"
        )

    def click(self, selector):
        self.run(f"document.querySelector({selector!r}).click()")

    def picture(self, path):
        data = self.send("Page.captureScreenshot")["data"]
        path.write_bytes(base64.b64decode(data))
