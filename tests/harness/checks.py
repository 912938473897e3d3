"""Checks of the files of a baked project, beyond a comparison of their text."""

import ast
import inspect
import itertools
import os
import re
import sys
import tomllib
from collections import Counter
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

import amqp
import yaml
from celery.app.backends import BACKEND_ALIASES
from celery.app.defaults import DEFAULTS
from kombu.transport import TRANSPORT_ALIASES
from markdown_it import MarkdownIt
from mdit_py_plugins.anchors import anchors_plugin

# Commands that check files with these paths, and end with an error if a file is invalid.
CHECKERS = {
    ".github/workflows/*.yml": [
        "check-jsonschema --builtin-schema vendor.github-workflows",
        "zizmor --offline --quiet",
    ],
    ".github/dependabot.yml": ["check-jsonschema --builtin-schema vendor.dependabot"],
    "renovate.json": ["check-jsonschema --builtin-schema vendor.renovate"],
    ".gitlab-ci.yml": ["check-jsonschema --builtin-schema vendor.gitlab-ci"],
    "compose*.yaml": ["check-jsonschema --builtin-schema vendor.compose-spec"],
    "Dockerfile": ["hadolint"],
    # integration/features/test_operation.py runs promtool.
    "deploy/monitoring/*": [],
    # integration/features/test_kubernetes.py checks what kustomize makes of these.
    "deploy/kubernetes/*/*.yaml": [],
    "deploy/kubernetes/overlays/*/*.yaml": [],
}
# Modules whose package has a different name.
PACKAGES = {
    "axes": "django-axes",
    "csp": "django-csp",
    "django_filters": "django-filter",
    "dotenv": "python-dotenv",
    "opentelemetry": "opentelemetry-sdk",
    "rest_framework": "djangorestframework",
}
# What a package or an extra of one brings, and its own documentation imports.
BRINGS = {
    "celery": {"amqp", "billiard", "kombu"},
    "dynamodb": {"boto3", "botocore"},
    "sqs": {"boto3", "botocore"},
}
# Packages that no file of a project names.
INDIRECT = {
    # Parts of the package opentelemetry
    "opentelemetry-exporter-otlp-proto-http",
    "opentelemetry-instrumentation-celery",
    "opentelemetry-instrumentation-django",
    "dj-database-url",  # imported by environs
    "ephem",  # celery.schedules.solar
    "gunicorn",  # started in production, by hand: see docs/production.md
    "psycopg",  # imported by Django, where DATABASE_URL says postgres
    "pytest-django",  # loaded by pytest
}


def check_names(files):
    """Assert that Windows accepts these paths, and that none is lost where case does not count."""
    for file in files:
        for part in Path(file).parts:
            assert len(part) <= 120, f"{file} is too long"  # Windows: 260 with all folders
            assert not re.search(r'[\0-\x1f<>:"/\\|?*]|[. ]$', part), f"Windows refuses {file}"
            device = re.match(r"(?i:aux|con|nul|prn|com\d|lpt\d)(\.|$)", part)
            assert not device, f"{file} has the name of a device on Windows"
    folders = {folder for file in files for folder in Path(file).parents}
    names = Counter(str(path).casefold() for path in folders | set(map(Path, files)))
    assert max(names.values()) == 1, f"these differ only in case: {names.most_common(1)}"


def check_file(project, file, text):
    assert "cookiecutter" not in text, file
    if file.suffix != ".html":  # Django's braces
        # Braces of GitHub, Prometheus, Grafana and f-strings are none of Jinja's.
        braces = r"(?<!\$)\{\{(?! \$| printf |\w+\}\})" if file.suffix != ".py" else r"\{\{-? "
        tags = r"\{%(?! (extends|load|block|endblock|static)\b)"
        assert not re.search(rf"{braces}|{tags}|\{{#", text), f"{file} has a trace of Jinja"
    assert text.strip() or file.name in ("__init__.py", "py.typed"), f"{file} is empty"
    assert not text or (text.endswith("\n") and not text.endswith("\n\n")), file
    prose = re.sub(r"^```python.*?^```", "code", text, flags=re.DOTALL | re.MULTILINE)
    assert "\n\n\n" not in prose or file.suffix == ".py", file
    assert not re.search("[ \t]\n", text), file
    checkers = [commands for pattern, commands in CHECKERS.items() if file.match(pattern)]
    for command in itertools.chain(*checkers):
        project.call(*command.split(), file)
    if file.suffix in (".yml", ".yaml"):
        list(yaml.safe_load_all(text))
        assert checkers, f"{file}: no linter in CHECKERS"
    if file.suffix in (".yml", ".yaml") or file.name == "Dockerfile":
        check_images(project, text)


def check_images(project, text):
    """Assert that each image has a version, and of 0.x all of it, because each 0.x may differ."""
    own = {project.name, project.name.replace("_", "-"), "build"}  # also the Dockerfile's stage
    images = re.findall(r"^ *(?:image: |- name: (?=\S+:)|FROM |COPY --from=)(\S+)", text, re.M)
    for image in set(images) - own:
        assert re.search(r":v?([1-9]|0\.\d+\.\d)", image), f"{image} has no version"


# Settings of Celery


def check_celery(settings, addresses):
    """Assert that Celery knows each setting, and that transport and backend read each option.

    This checks names, not values, and only the outermost name of nested options. A name that is
    read may still have no effect in this configuration: test_run.py tests effects. The addresses in
    the settings or in .env.example say which transport and which backend to check.
    """
    names = set(re.findall(r"^ *(CELERY_\w+)", settings, re.MULTILINE))
    known = DEFAULTS.keys() | texts_in("celery.backends.base") | texts_in("celery.backends.redis")
    unknown = {name for name in names if name.removeprefix("CELERY_").lower() not in known}
    assert not unknown - texts_in("celery.fixups.django"), "Celery knows no such setting"

    urls = settings + addresses
    broker = re.search(r"CELERY_BROKER_URL\b.*?(\w+)://", urls)[1]
    unknown = options(settings, "CELERY_BROKER_TRANSPORT_OPTIONS")
    unknown -= texts_in("kombu.connection") | texts_in(TRANSPORT_ALIASES[broker].split(":")[0])
    if broker == "amqp":  # the client gets them all; each other transport is a virtual one
        unknown -= inspect.signature(amqp.Connection).parameters.keys()
    else:
        unknown -= texts_in("kombu.transport.virtual.base")
    assert not unknown, f"the transport of {broker}:// reads no such option"
    if unknown := options(settings, "CELERY_RESULT_BACKEND_TRANSPORT_OPTIONS"):
        backend = re.search(r"CELERY_RESULT_BACKEND\b.*?(\w+)(?:\+\w+)?://", urls)[1]
        unknown -= texts_in("celery.backends.base")
        unknown -= texts_in(BACKEND_ALIASES[backend].split(":")[0])
        assert not unknown, f"the backend of {backend}:// reads no such option"


def options(settings, name):
    """Return the keys of a setting's dict, all of them literals."""
    found = set()
    for node in ast.walk(ast.parse(settings)):
        match node:
            case (
                ast.Assign(targets=[ast.Name(setting)], value=value)
                | ast.AugAssign(target=ast.Name(setting), value=value)
            ) if setting == name:
                found |= {key.value for key in value.keys}
            case ast.Subscript(ast.Name(setting), ast.Constant(key)) if setting == name:
                found.add(key)
    return found


@cache
def texts_in(module):
    """Return the literals in a module's code. Among them are the names of what it reads."""
    tree = ast.parse(Path(find_spec(module).origin).read_text("utf-8"))
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}


# Dependencies


def check_dependencies(texts):
    """Assert that imports are declared and declarations are used, in production and development."""
    about = tomllib.loads(texts[Path("pyproject.toml")])
    optional = about["project"].get("optional-dependencies", {}).values()
    production = sum(optional, about["project"]["dependencies"])
    groups = sum(about["dependency-groups"].values(), [])
    own = {file.parts[0].removesuffix(".py") for file in texts}
    own |= {file.stem for file in texts if file.parts[0] == "tests"}
    code = [file for file in texts if file.suffix != ".md" and file != Path("pyproject.toml")]
    own_tests = {"tests", "conftest.py", "dev.py", "tests.py"}
    deployed = [file for file in code if not own_tests & set(file.parts)]
    for files, available, declared in (
        (deployed, production, production),
        (code, production + groups, groups),
    ):
        imported = set().union(*(imports(texts[file]) for file in files if file.suffix == ".py"))
        extras = re.findall(r"[\w-]+", " ".join(re.findall(r"\[(.*?)\]", " ".join(available))))
        brought = packages(available) | set(extras)
        brought |= set().union(*(BRINGS.get(name, set()) for name in brought))
        undeclared = packages_of(imported - own - sys.stdlib_module_names) - brought
        assert not undeclared, "imported, but not declared"
        words = set().union(*(words_of(file, texts[file]) for file in files))
        unused = packages(declared) - packages_of(words)
        assert not unused - INDIRECT, "declared, but not used"


def packages(requirements):
    return {re.match("[a-z0-9-]+", requirement)[0] for requirement in requirements}


def packages_of(modules):
    """Return the names of the packages that have these modules."""
    return {PACKAGES.get(module, module.replace("_", "-")) for module in modules}


@cache
def imports(text):
    """Return the modules that Python code imports, up to the first dot of each name.

    Without those that it imports only if apps.is_installed().
    """
    found, nodes = set(), [ast.parse(text)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and "apps.is_installed(" in ast.unparse(node.test):
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.split(".")[0])
    return found


@cache
def words_of(file, text):
    """Return the words of a file; for Python code, its imported modules and words in strings."""
    if file.suffix != ".py":
        return set(re.findall(r"\w+", text))
    nodes = list(ast.walk(ast.parse(text)))
    docstrings = {node.value for node in nodes if isinstance(node, ast.Expr)}
    constants = {node for node in nodes if isinstance(node, ast.Constant)} - docstrings
    strings = " ".join(str(node.value) for node in constants)
    return imports(text) | set(re.findall(r"\w+", strings))


# Pages of Markdown

# Headings have the ids that GitHub gives them.
MARKDOWN = MarkdownIt("commonmark").enable("table").use(anchors_plugin, max_level=6)


@cache
def parse(markdown):
    """Return all tokens of a page; those inside of lines come last."""
    tokens = MARKDOWN.parse(markdown)
    return tokens + [child for token in tokens for child in token.children or []]


def check_links(pages, files):
    """Assert that each relative link leads to a file, and its fragment to a heading, as on GitHub.

    `pages` are paths, `files` all files that a link may lead to, {path: text}.
    """
    for page in pages:
        tokens = parse(files[page])
        links = [token.attrs.get("href") or token.attrs.get("src") for token in tokens]
        for link in map(urlsplit, filter(None, links)):
            if link.scheme:
                scheme = "http" if link.hostname == "127.0.0.1" else "https"
                assert link.scheme == scheme and link.netloc, f"{page}: {link.geturl()}"
                continue
            target = Path(os.path.normpath(page.parent / unquote(link.path))) if link.path else page
            assert target in files, f"{page}: no file {target}"
            if link.fragment:
                ids = {token.attrs.get("id") for token in parse(files[target])}
                assert link.fragment in ids, f"{page}: {target} has no heading #{link.fragment}"


def check_pages(texts, files, template):
    """Assert that pages link to existing files, and name no file or make target that is missing.

    `files` are the paths of the output, `template` those that any output may have; files that a
    reader writes are in neither.
    """
    pages = [file for file in texts if file.suffix == ".md"]
    check_links(pages, texts)
    tokens = [token for page in pages for token in parse(texts[page])]
    code = "\n".join(token.content for token in tokens if token.type.startswith(("code", "fence")))

    targets = set(re.findall(r"^([a-z]+):", texts[Path("Makefile")], re.MULTILINE))
    for command in re.findall(r"\bmake((?: [a-z]+\b(?!=))+)", code):
        assert set(command.split()) <= targets, f"make{command}"

    folders = {path.parts[0] for path in template if len(path.parts) > 1}
    known = {str(path) for path in template}
    files = set(map(str, files))
    for word in re.findall(r"""(?<![\w/."-])[\w.][\w./-]*""", code):
        if word in known or word.split("/")[0] in folders and "/" in word:
            exists = any(file.startswith(word) or f"/templates/{word}" in file for file in files)
            assert exists, f"{word} does not exist"
