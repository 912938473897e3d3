"""Write the name of the wheel in the output's vendor/ where templates name it: `make wheel`."""

import re
from pathlib import Path

[wheel] = Path("{{cookiecutter.project_slug}}/vendor").glob("*.whl")
choice = Path("templates/durable_jobs/yes.jinja")
text = choice.read_text("utf-8")
choice.write_text(re.sub(r"durable_jobs-[^/\"]+\.whl", wheel.name, text), "utf-8")
