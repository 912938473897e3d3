"""`make pictures` retakes the pictures in README.md: docs/page.png and docs/killed.gif."""

import re
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from cookiecutter.main import cookiecutter
from PIL import Image

from .bake import TEMPLATE
from .browser import browser
from .demo import LETTER, QUICK, kill_worker
from .project import Project

DOCS = TEMPLATE / "docs"
TEXT = "document.querySelector('.job').innerText"


@contextmanager
def running(folder, environment=(), **answers):
    """Run a project with these answers. Give its site, and a browser's tab that is logged in."""
    baked = cookiecutter(str(TEMPLATE), None, True, answers, output_dir=str(folder))
    project = Project(baked)
    project.install()
    with project.up(**dict(environment)) as site, browser(folder / "browser") as tab:
        tab.log_in(site)
        yield site, tab


def take_page(folder):
    """The default project's page, while a report is being written."""
    with running(folder) as (site, tab):
        tab.open(site.web, width=1200, height=500)
        tab.click("#start")
        tab.wait("/day (9|1[0-9])/.test(document.querySelector('#message')?.textContent)")
        tab.picture(DOCS / "page.png")


def take_killed(folder):
    """The page of a newsletter whose worker is killed: a frame each time that its text changes."""
    frames, shown, killed = [], None, False
    with running(folder, QUICK, durable_jobs="yes") as (site, tab):
        _, headers, _ = site.request("/api/newsletters/", LETTER)
        tab.open(f"{site.web}/jobs/{headers['Location'].split('/')[-2]}/", width=900, height=360)
        tab.wait("document.querySelector('.job')")
        while "Succeeded" not in (shown or ""):
            text = re.sub("[0-9]+ (s|min)|just now", "", tab.run(TEXT))  # times alone are no change
            if text != shown:
                shown = text
                tab.picture(folder / "frame.png")
                frames.append(Image.open(folder / "frame.png").convert("P", palette=Image.ADAPTIVE))
            if not killed and tab.run("document.querySelector('progress')?.value > 30"):
                killed = True
                kill_worker(site)
            time.sleep(0.1)
    seconds = [400] * (len(frames) - 1) + [4000]
    frames[0].save(
        DOCS / "killed.gif", save_all=True, append_images=frames[1:], duration=seconds, loop=0
    )


if __name__ == "__main__":
    for take in take_page, take_killed:
        with tempfile.TemporaryDirectory() as folder:
            take(Path(folder))
