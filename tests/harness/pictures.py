"""`make pictures` retakes the picture in README.md: a report whose worker is killed."""

import tempfile
import time
from pathlib import Path

from cookiecutter.main import cookiecutter
from PIL import Image

from .bake import TEMPLATE
from .browser import browser
from .demo import QUICK, kill_worker
from .outputs import ORDER
from .project import Project

PICTURE = TEMPLATE / "docs/killed.gif"
DONE = "document.querySelector('#bar').value"
STATE = "document.querySelector('#state').textContent"
CAPTION = "document.querySelector('h1').textContent = "
BEFORE = "A worker runs the task"
KILLED = "kill -9: the worker is dead"
AFTER = "Redis delivers the task again, to a new worker"


def take(site, tab, folder):
    """Return a frame for each change of the default project's page, and how long each is shown."""
    frames, caption, last = [], BEFORE, None
    site.request("/api/orders/", ORDER)
    tab.open(site.web, width=800, height=480)
    tab.click("#start")
    tab.wait(f"{STATE} == 'Running'")
    while not last or last[1] != "Done":
        done, state = tab.run(DONE), tab.run(STATE)
        if caption == BEFORE and done > 9:
            kill_worker(site)
            caption = KILLED
        elif caption == KILLED and done < last[0]:
            caption = AFTER
        if (done, state, caption) != last:
            last = done, state, caption
            tab.run(f"{CAPTION}{caption!r}")
            tab.picture(folder / "frame.png")
            picture = Image.open(folder / "frame.png").convert("P", palette=Image.ADAPTIVE)
            frames.append((picture, 2000 if caption == KILLED else 250))
        time.sleep(0.1)
    return frames


def main(folder):
    project = Project(cookiecutter(str(TEMPLATE), None, True, output_dir=str(folder)))
    project.install()
    with project.up(**QUICK) as site, browser(folder / "browser") as tab:
        tab.log_in(site)
        (first, *rest), (*milliseconds, _) = zip(*take(site, tab, folder), strict=True)
    durations = [*milliseconds, 4000]
    first.save(PICTURE, save_all=True, append_images=rest, duration=durations, loop=0)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        main(Path(name))
