"""The scripts that Redis runs. Each begins with start.lua, and says what its KEYS and ARGV are."""

from importlib import resources


def read(name):
    lines = resources.files(__package__).joinpath(f"{name}.lua").read_text("utf-8").splitlines()
    return "\n".join(line for line in lines if not line.lstrip().startswith("--"))


def script(name):
    return f"{read('start')}\n{read(name)}"


DELAY = script("delay")
FORGET = script("forget")
LAPSED = script("lapsed")
PUT = script("put")
RELEASE = script("release")
RENEW = script("renew")
SEND = script("send")
TAKE = script("take")
