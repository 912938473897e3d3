"""Give the project its secrets, remove folders that stayed empty, say what comes next."""

import os


def secret(size):
    """Hexadecimal digits, which no shell, URL or .env parser reads otherwise."""
    return os.urandom(size).hex()


try:
    # "x" leaves alone an .env that is already there: its secrets are in use.
    with open(".env", "x", opener=lambda path, flags: os.open(path, flags, 0o600)) as env:
        env.write(f"DEBUG=True\nSECRET_KEY={secret(32)}\nFLOWER_BASIC_AUTH=admin:{secret(12)}\n")
        env.write("DJANGO_SUPERUSER_USERNAME=demo\nDJANGO_SUPERUSER_EMAIL=demo@example.com\n")
        env.write(f"DJANGO_SUPERUSER_PASSWORD={secret(12)}\n")
except FileExistsError:
    pass

for folder, _, _ in os.walk(".", topdown=False):
    # Git keeps empty folders of its own and needs them.
    if not folder.startswith(("./.git/", "./.venv/")) and not os.listdir(folder):
        os.rmdir(folder)

print(f"\nNext:\n\n    cd {os.path.basename(os.getcwd())}\n    make run\n")
