"""Write .env with random secrets, remove what was not chosen, print the next steps."""

import os
import re


def secret(match):
    """Return hexadecimal digits: they have no special meaning in a shell, a URL or .env."""
    return os.urandom(12).hex()


def create_for_its_owner(path, flags):
    return os.open(path, flags, 0o600)


with open(".env.example", encoding="utf-8") as example:
    # For development: the lines up to the first empty one, without the comment on top.
    development = example.read().split("\n\n")[0].splitlines()[1:]
try:
    # "x" does not touch an existing .env: its secrets are in use.
    # Docker and WSL, which read it, know no Windows line ends.
    with open(".env", "x", newline="\n", opener=create_for_its_owner) as env:
        env.writelines(re.sub("change-me", secret, line) + "\n" for line in development)
except FileExistsError:
    pass

# Remove what the answers leave out. Older files are not from this run: they belong to the owner.
written = os.stat(".dropped").st_ctime - 60
project = os.path.realpath(".")


def remove_if_empty(folder):
    """Remove a folder of the project. What is behind a link that leads out of it is not its."""
    is_own = os.path.realpath(folder).startswith(project + os.sep)
    if is_own and os.path.isdir(folder) and not os.listdir(folder):
        os.rmdir(folder)


def drop(path):
    if os.path.isdir(path) and not os.path.islink(path):
        for name in os.listdir(path):
            drop(os.path.join(path, name))
        remove_if_empty(path)
    elif os.path.exists(path) and os.stat(path).st_ctime > written:
        os.remove(path)


with open(".dropped", encoding="utf-8") as dropped:
    for line in dropped.read().split():
        drop(line)
        remove_if_empty(os.path.dirname(line))
os.remove(".dropped")

# Not in the temporary folders of `cruft update`: a shell says in PWD where its command was typed.
if os.path.dirname(project) == os.path.realpath(os.environ.get("PWD", os.pardir)):
    print(f"\nNext:\n\n    cd {os.path.basename(project)}\n    make run\n")
