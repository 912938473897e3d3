"""Give the project its secrets, remove folders that stayed empty, say what comes next."""

import os


def secret():
    """Hexadecimal digits, which no shell, URL or .env parser reads otherwise."""
    return os.urandom(12).hex()


with open(".env.example", encoding="utf-8") as example:
    # What comes before the first empty line is for development.
    development = example.read().split("\n\n")[0].splitlines()[1:]
try:
    # "x" leaves alone an .env that is already there: its secrets are in use.
    with open(".env", "x", opener=lambda path, flags: os.open(path, flags, 0o600)) as env:
        env.writelines(line.replace("change-me", secret()) + "\n" for line in development)
except FileExistsError:
    pass

for folder, _, _ in os.walk(".", topdown=False):
    # Git keeps empty folders of its own and needs them.
    if not folder.startswith(("./.git/", "./.venv/")) and not os.listdir(folder):
        os.rmdir(folder)

print(f"\nNext:\n\n    cd {os.path.basename(os.getcwd())}\n    make run\n")
