"""Write the names of the wheels in the output's vendor/ where templates name them: `make wheel`."""

import re
from pathlib import Path

names = Path("templates/versions.jinja")
text = names.read_text("utf-8")
for wheel in Path("{{cookiecutter.project_slug}}/vendor").glob("*.whl"):
    package = wheel.name.partition("-")[0]
    text = re.sub(rf"{package}-[^/\"]+\.whl", wheel.name, text)
names.write_text(text, "utf-8")
