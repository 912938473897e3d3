"""Answers: hostile texts reach the output unchanged, wrong answers are refused."""

import ast
import json
import keyword
import os
import pty
import re
import stat
import subprocess
import sys
import tomllib
from contextlib import suppress
from email.headerregistry import Address

import pytest
import yaml
from cookiecutter.exceptions import FailedHookException
from cookiecutter.utils import create_env_with_context
from markdown_it import MarkdownIt

from harness.bake import CHOICES, DEFAULTS, OPTIONS, OUTPUT, TEMPLATE
from harness.project import Project

# Complete and valid, as in a replay file.
TEXTS = {option: text for option, text in OPTIONS.items() if isinstance(text, str)}
ANSWERS = {**TEXTS, **DEFAULTS, "project_slug": "shop"}

NAMES = [
    "Shop",
    "My-Project 2.0 (beta)",
    # Quotes and backslashes
    "O'Brien's",
    'The "Best" Shop',
    """Both "kinds" of 'quotes'""",
    """More "of" "these" than of 'those'""",
    '"',
    "'",
    '""" + 1',
    "''' + 1",
    '"}""" + 1',
    "\\",
    "ends with \\",
    'ends with \\"',
    "C:\\new\\tests",
    "\\N{BULLET} \\u0041 \\x41 \\101",
    # Code
    "'; import os; os.abort()  #",
    '"); raise SystemExit  #',
    "$(id) `id` ${HOME} $HOME %PATH% !!",
    "{0} {name} %s %(name)s {}",
    "{ braces } }} %}",
    "name | upper",
    # TOML and YAML
    "# no comment",
    "no # comment",
    "key: value",
    "- item",
    "null",
    "2026-01-31",
    "[table]",
    "&anchor *alias !tag @at",
    "a, b",
    # HTML and Markdown
    "<script>alert(1)</script>",
    "</title><!-- comment",
    "Tom & Jerry &amp; &#65;",
    "*bold* _it_ **b** __b__ ~~gone~~ `code`",
    "[link](https://example.com) ![image](a.png)",
    "<https://example.com>",
    "| a | b |",
    "+ item",
    "= = =",
    "---",
    "1. one",
    "1) one",
    "> quote",
    "```",
    "$x$ and $$y$$",
    "ends with #",
    "    indented",
    # Unicode
    "🚀 Shop",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇨🇭",
    "Überraschung für Straße",
    "名前 プロジェクト",
    "חנות متجر",
    "e\u0301 o\u0308",
    "no\u00a0break soft\u00adhyphen zero\u200bwidth",
    # Length
    "x" * 200,
    "many words " * 18 + "and 👩‍👩‍👧‍👦",
]

# Cookiecutter renders answers given with --no-input, but not those that are typed or replayed.
BRACES = [
    "{{ 7*7 }}",
    "{% raw %}",
    "{% endraw %} {{ cookiecutter.project_slug }}",
    "{# comment",
    "{{ cookiecutter.__class__.__mro__ }}",
    "{{",
]

SLUGS = {
    "no identifier": [
        "my-shop",
        "my shop",
        "my.shop",
        "1shop",
        "sh/op",
        "../shop",
        "a$b",
        "shop\n",
    ],
    "bad style": ["Shop", "SHOP", "_shop", "__init__", "shop_", "s" * 41],
    "not ASCII": ["größe", "店", "ｓhop", "s٣"],
    "server": ["pg_shop", "a___b"],
}
# Names that mean something else where the slug is written. Each is refused, and no others are.
MEANINGS = {
    "a word of YAML, not text": {"false", "n", "no", "null", "off", "on", "true", "y", "yes"},
    "a database or role of PostgreSQL": {"none", "postgres", "public", "template0", "template1"},
    "a user of RabbitMQ": {"guest"},  # may log in from the server's own machine only
    "a namespace of Kubernetes": {"default", "kube_node_lease", "kube_public", "kube_system"},
    "an image that the project uses": {"python", "rabbitmq", "redis"},
    "a device on Windows": {
        *("aux", "con", "nul", "prn"),
        *(f"{port}{number}" for port in ("com", "lpt") for number in range(1, 10)),
    },
}

ADDRESSES = ["o'brien+django@mail.example.co.uk", "a.b-c_d@ex-ample.org", "A@B.CH"]
NO_ADDRESSES = [
    *(
        "",
        " ",
        "you",
        "you@",
        "@example.com",
        "you@localhost",
        "you@@example.com",
        "a b@example.com",
    ),
    *("you@example.com ", "You <you@example.com>", "you@example.com, me@example.com"),
    *(".you@example.com", "you.@example.com", "y..ou@example.com", "you@-example.com"),
    *("you@example..com", "you@example.com.", "yöu@example.com", "you@exämple.com"),
    *('"you"@example.com', "you@[127.0.0.1]", "you@example.com\n", 'you"@example.com'),
]

INVISIBLE = [
    *("\x00", "\t", "\n", "\r", "\x1b[31m", "\x7f", "\x85", "\u2028", "\u2029", "\ud800"),
    *("\u202a", "\u202b", "\u202c", "\u202d", "\u202e", "\u2066", "\u2067", "\u2068", "\u2069"),
]


@pytest.fixture
def run(tmp_path):
    """A function that runs cookiecutter in a process; the output goes to `tmp_path / "out"`."""

    def run(*arguments, typed=None, out="out"):
        config = tmp_path / "config.yaml"
        config.write_text(f"replay_dir: {tmp_path}/replay\ncookiecutters_dir: {tmp_path}/cloned\n")
        command = [sys.executable, "-m", "cookiecutter", TEMPLATE, "--config-file", config]
        return subprocess.run(
            [*command, "--output-dir", tmp_path / out, *arguments],
            input=typed,
            capture_output=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONUTF8": "1", "TMPDIR": str(tmp_path)},
        )

    return run


@pytest.fixture
def replay(run, tmp_path):
    """A function that replays the valid answers, with some replaced."""

    def replay(**answers):
        file = tmp_path / "answers.json"
        file.write_text(json.dumps({"cookiecutter": {**ANSWERS, **answers}}))
        return run("--replay-file", file)

    return replay


@pytest.fixture
def refusal(bake, capfd, tmp_path):
    """A function that bakes with a wrong answer and returns what the hook prints."""

    def refusal(**answers):
        with pytest.raises(FailedHookException):
            bake(**answers)
        assert has_no_files(tmp_path / "cookies")
        return capfd.readouterr().err

    return refusal


def has_no_files(folder):
    return not any(path.is_file() for path in folder.rglob("*"))


def macros():
    source = (TEMPLATE / "templates/text.jinja").read_text("utf-8")
    return create_env_with_context({}).from_string(source).module


def literal_texts(markdown):
    """Yield (tag, text) of each heading and paragraph that is only text, as a reader sees it."""
    parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    opening = None
    for token in parser.parse(markdown):
        if token.type == "inline" and all(child.type == "text" for child in token.children):
            yield opening, "".join(child.content for child in token.children)
        opening = token.tag


def assert_holds(project, text):
    """Assert that the project is valid, and that name, description and author are this text."""
    about = tomllib.loads((project / "pyproject.toml").read_text("utf-8"))["project"]
    assert about["description"] == text
    assert about["authors"][0]["name"] == text

    settings = ast.parse((project / "config/settings.py").read_text("utf-8"))
    dicts = [node for node in ast.walk(settings) if isinstance(node, ast.Dict)]
    pairs = [pair for node in dicts for pair in zip(node.keys, node.values, strict=True)]
    [title] = [value.value for key, value in pairs if key and ast.unparse(key) == "'TITLE'"]
    assert title == text

    readme = list(literal_texts((project / "README.md").read_text("utf-8")))
    assert readme[0] == ("h1", text.strip())
    assert ("p", text.strip()) in readme

    for file in project.files():
        source = file.read_text("utf-8")
        assert "cookiecutter" in text or "cookiecutter" not in source, file
        if file.suffix == ".py":
            compile(source, file, "exec")
        elif file.suffix == ".toml":
            tomllib.loads(source)
        elif file.suffix in (".yaml", ".yml"):
            list(yaml.safe_load_all(source))
        elif file.suffix == ".json":
            json.loads(source)


@pytest.mark.parametrize("name", NAMES)
def test_a_hostile_name_reaches_the_output_unchanged(bake, name):
    project = bake(project_name=name, project_slug="shop", description=name, author_name=name)

    assert_holds(project, name)
    project.run("ruff", "check", "--no-cache")
    project.run("ruff", "format", "--check", "--no-cache")


@pytest.mark.parametrize("character", ["x", "x ", "'", '"', "\\", "名", "e\u0301", "👩‍👩‍👧‍👦"])
def test_settings_are_formatted_however_long_the_name(bake, character):
    project = bake()
    settings = (project / "config/settings.py").read_text("utf-8")
    default = macros().python(ANSWERS["project_name"])
    assert default in settings

    for length in range(1, 201):
        literal = macros().python((character * length)[:length])
        file = project / f"config/settings_{length}.py"
        file.write_text(settings.replace(default, literal), "utf-8")

    project.run("ruff", "format", "--check", "--no-cache")


def test_python_strings_have_the_quotes_that_ruff_chooses(bake):
    project = bake()
    names = "".join(f"    {macros().python(name)},\n" for name in NAMES)
    (project / "names.py").write_text(f"NAMES = [\n{names}]\n", "utf-8")

    project.run("ruff", "format", "--check", "--no-cache", "names.py")


@pytest.mark.parametrize(
    ("name", "escaped"),
    [
        ("My-Project 2.0 (beta)", "My-Project 2.0 (beta)"),
        ("O'Brien's: 100% + more = 1. choice!", "O'Brien's: 100% + more = 1. choice!"),
        ("a | b, $x$", "a \\| b, \\$x\\$"),  # a cell of a table, a formula on GitHub
    ],
)
def test_markdown_escapes_only_risky_characters(name, escaped):
    assert macros().markdown(name) == escaped


@pytest.mark.parametrize("braces", BRACES)
def test_typed_braces_are_text(run, tmp_path, braces):
    typed = {"project_name": braces, "project_slug": "shop", "description": braces}
    typed |= {"author_name": braces}
    result = run(typed="".join(typed.get(option, "") + "\n" for option in OPTIONS))

    assert result.returncode == 0, result.stderr
    assert_holds(Project(tmp_path / "out/shop"), braces)


@pytest.mark.parametrize("name", [*BRACES, *NAMES[:8]])
def test_replayed_texts_are_text(replay, tmp_path, name):
    result = replay(project_name=name, description=name, author_name=name)

    assert result.returncode == 0, result.stderr
    assert_holds(Project(tmp_path / "out/shop"), name)


def test_typed_answers_can_be_replayed(run, tmp_path):
    assert run(typed="{{ 7*7 }}\nshop\n" + "\n" * len(OPTIONS)).returncode == 0
    [answers] = (tmp_path / "replay").iterdir()
    assert run("--replay-file", answers, out="again").returncode == 0

    typed, replayed = (tmp_path / out / "shop/README.md" for out in ("out", "again"))
    assert typed.read_text("utf-8") == replayed.read_text("utf-8")


def test_each_prompt_explains_its_option():
    prompts = json.loads((TEMPLATE / "cookiecutter.json").read_text())["__prompts__"]

    assert list(prompts) == list(OPTIONS)
    for option, choices in OPTIONS.items():
        if isinstance(choices, list):
            assert set(prompts[option]) == {"__prompt__", *choices}


@pytest.mark.parametrize(
    "name", ["3D Shop", "Größe", "名前", "🚀", "42", "x" * 200, "a_" * 60, "_"]
)
def test_a_slug_is_derived_from_any_name(bake, name):
    slug = bake(project_name=name).name

    assert slug.isidentifier() and slug.isascii() and slug.islower() and len(slug) <= 40


def test_the_slug_names_the_folder_and_the_package(bake):
    """The default of project_slug is derived from the name."""
    project = bake(project_name="Tea Shop")
    about = tomllib.loads(project.read("pyproject.toml"))["project"]

    assert (project.name, about["name"]) == ("tea_shop", "tea-shop-project")


@pytest.mark.parametrize("slug", sum(SLUGS.values(), []))
def test_a_bad_slug_is_refused(refusal, slug):
    assert f"project_slug {slug!r}: use 1-40 of a-z, 0-9 and _" in refusal(project_slug=slug)


def hook(slug):
    """Run the hook for this slug, in this process. Return its variables and its faults."""
    source = (TEMPLATE / "hooks/pre_gen_project.py").read_text("utf-8")
    definitions = source.split('\nif "__prompts__"')[0]
    template = create_env_with_context({}).from_string(definitions)
    exec(template.render(cookiecutter={**ANSWERS, "project_slug": slug}), found := {})
    return found, list(found["faults"]())


def test_a_slug_with_another_meaning_is_refused(refusal):
    for meaning, slugs in MEANINGS.items():
        for slug in slugs:
            assert hook(slug)[1] == [("project_slug", f"this is {meaning}; try {slug}_project")]
    assert "project_slug 'guest': this is a user of RabbitMQ" in refusal(project_slug="guest")


def test_no_other_slug_is_refused():
    taken = hook("shop")[0]["TAKEN"]
    assert {meaning: set(slugs.split()) for meaning, slugs in taken.items()} == MEANINGS

    name = "[a-z][a-z0-9_]*[a-z0-9]"
    modules = {word for word in sys.stdlib_module_names if re.fullmatch(name, word)}
    assert {"calendar", "email", "queue", "site"} < modules
    words = {word for word in keyword.kwlist if word.islower()}
    for slug in modules | words | {"celery", "click", "config", "jobs", "orders", "test"}:
        assert hook(slug)[1] == [], slug


def test_words_of_yaml_are_refused():
    """YAML 1.1 also has y and n, which PyYAML reads as text."""
    resolvers = sum(yaml.SafeLoader.yaml_implicit_resolvers.values(), [])
    patterns = [regex.pattern for tag, regex in resolvers if tag.endswith((":bool", ":null"))]

    words = {"n", "y", *re.findall(r"\b[a-z]+\b", " ".join(patterns))}

    assert words == MEANINGS["a word of YAML, not text"]


def test_images_of_servers_are_refused():
    """Docker gives the slug to the project's image, and would take it from the server's."""
    files = [*(TEMPLATE / "templates").rglob("*.jinja"), *OUTPUT.rglob("*{% endif %}")]
    text = "".join(path.read_text("utf-8") for path in files)
    images = set(re.findall(r"(?:image: |FROM )([a-z]+):\d", text))

    assert images - {"postgres"} == MEANINGS["an image that the project uses"]


@pytest.mark.parametrize("text", ["", "  ", None, 42, ["a"], {"a": "b"}])
def test_an_answer_that_is_not_a_text_is_refused(replay, tmp_path, text):
    # An empty slug means the output folder itself, which exists: cookiecutter refuses that.
    options = set(OPTIONS) - set(CHOICES) - ({"project_slug"} if text == "" else set())
    result = replay(**dict.fromkeys(options, text))

    assert result.returncode == 1
    for option in options:
        assert f"{option} {text!r}: write a text that is not empty." in result.stderr
    assert has_no_files(tmp_path / "out")


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_reaches_the_output_unchanged(bake, address):
    about = tomllib.loads((bake(author_email=address) / "pyproject.toml").read_text())

    assert about["project"]["authors"][0]["email"] == address
    Address(addr_spec=address)  # build tools do the same


@pytest.mark.parametrize("address", NO_ADDRESSES)
def test_an_invalid_address_is_refused(refusal, address):
    assert "such as you@example.com" in refusal(author_email=address)


@pytest.mark.parametrize("character", INVISIBLE, ids=ascii)
def test_an_invisible_character_is_refused(replay, tmp_path, character):
    options, text = ("project_name", "description", "author_name"), f"Sh{character}op"
    result = replay(**dict.fromkeys(options, text))

    assert result.returncode == 1
    for option in options:
        assert f"{option} {text!r}: leave out line breaks" in result.stderr
    assert has_no_files(tmp_path / "out")


@pytest.mark.parametrize("option", CHOICES)
@pytest.mark.parametrize("choice", ["maybe", "", "True", True, None, ["redis"]])
def test_a_replayed_choice_that_does_not_exist_is_refused(replay, tmp_path, option, choice):
    result = replay(**{option: choice})

    assert result.returncode == 1
    assert (
        f"{option} {choice!r}: choose one of {json.dumps(CHOICES[option])[1:-1]}" in result.stderr
    )
    assert has_no_files(tmp_path / "out")


@pytest.mark.parametrize(
    ("option", "choice"), [(option, choice) for option in CHOICES for choice in CHOICES[option]]
)
def test_every_choice_can_be_replayed(replay, option, choice):
    result = replay(**{option: choice})

    assert result.returncode == 0, result.stderr


def test_all_faults_are_listed_at_once(replay, tmp_path):
    result = replay(
        project_name=" ",
        project_slug="guest",
        description="two\nlines",
        author_name="\u202eeman",
        author_email="nobody",
        include_example="maybe",
    )

    faults = [line.split()[0] for line in result.stderr.splitlines() if line.startswith("  ")]
    assert result.returncode == 1
    assert set(faults) >= set(OPTIONS) - set(CHOICES) | {"include_example"}
    assert has_no_files(tmp_path / "out")


def run_in_a_terminal(folder, *arguments, typed=""):
    """Run Python in its own terminal. Return its exit status and what it printed."""
    child, terminal = pty.fork()
    if child == 0:
        os.environ |= {"HOME": str(folder), "TMPDIR": str(folder)}
        os.execv(sys.executable, [sys.executable, *map(str, arguments)])
    os.write(terminal, typed.encode())
    printed = b""
    with suppress(OSError):  # the child has ended
        while part := os.read(terminal, 4096):
            printed += part
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), printed.decode()


def test_answers_typed_at_a_terminal_are_refused_all_at_once(tmp_path):
    typed = {"project_name": "Shop", "project_slug": "../shop", "author_email": "nobody"}
    status, printed = run_in_a_terminal(
        tmp_path,
        *("-m", "cookiecutter", TEMPLATE, "--output-dir", tmp_path / "out"),
        typed="".join(typed.get(option, "") + "\n" for option in OPTIONS),
    )

    faults = [line.split(": ")[0] for line in printed.splitlines() if re.match("  [a-z]", line)]
    assert status == 1
    assert faults == ["  project_slug '../shop'", "  author_email 'nobody'"]
    assert list((tmp_path / "out").iterdir()) == []
    assert not (tmp_path / "shop").exists()


def test_a_refusal_does_not_end_the_program_that_bakes(tmp_path):
    """A program that bakes through Cookiecutter's API gets an exception and continues."""
    program = """if True:
        import sys
        from cookiecutter.exceptions import FailedHookException
        from cookiecutter.main import cookiecutter

        template, folder = sys.argv[1:]
        for answers in ({"author_email": "nobody"}, {"project_slug": "../shop"}):
            try:
                cookiecutter(template, no_input=True, output_dir=folder, extra_context=answers)
            except FailedHookException:
                print("refused", answers)
    """
    status, printed = run_in_a_terminal(tmp_path, "-c", program, TEMPLATE, tmp_path / "out")

    assert status == 0, printed
    assert "refused {'author_email': 'nobody'}" in printed
    assert "refused {'project_slug': '../shop'}" in printed
    assert list((tmp_path / "out").iterdir()) == []


def test_a_refusal_leaves_an_existing_project_alone(run, bake):
    project = bake(project_slug="shop")
    before = {path: path.read_bytes() for path in project.files()}
    result = run(
        *("--no-input", "--overwrite-if-exists", "author_email=nobody", "project_slug=shop"),
        out=project.parent,
    )

    assert result.returncode == 1
    assert {path: path.read_bytes() for path in project.files()} == before


def test_env_has_fresh_secrets(bake):
    one, other = (
        dict(line.split("=", 1) for line in (bake() / ".env").read_text().splitlines())
        for _ in range(2)
    )
    secrets = {name for name in one if re.search("SECRET|PASSWORD|AUTH", name)}

    assert {"SECRET_KEY", "FLOWER_BASIC_AUTH", "POSTGRES_PASSWORD", "REDIS_PASSWORD"} <= secrets
    assert secrets == {name for name in one if one[name] != other[name]}
    assert all(re.search("[0-9a-f]{24}$", one[name]) for name in secrets)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_only_its_owner_can_read_env(bake, umask):
    before = os.umask(umask)
    try:
        project = bake()
    finally:
        os.umask(before)

    assert stat.S_IMODE((project / ".env").stat().st_mode) == 0o600


def test_env_is_never_overwritten(run, tmp_path):
    env = tmp_path / "out/my_project/.env"
    run("--no-input")
    env.write_text("SECRET_KEY=in-use\n")
    result = run("--no-input", "--overwrite-if-exists")

    assert result.returncode == 0
    assert env.read_text() == "SECRET_KEY=in-use\n"


@pytest.mark.parametrize("include_example", CHOICES["include_example"])
def test_the_example_is_written_only_if_it_is_wanted(bake, include_example):
    project = bake(include_example=include_example)

    wanted = include_example == "yes"
    assert (project / "orders").exists() == wanted
    assert (project / "tests/test_orders.py").exists() == wanted


def test_the_output_has_no_empty_folders(bake):
    project = bake(include_example="no")

    assert [path for path in project.rglob("*") if path.is_dir() and not any(path.iterdir())] == []


def test_empty_folders_of_git_and_virtualenvs_are_kept(tmp_path):
    kept = [tmp_path / folder for folder in (".git/refs/tags", ".venv/include")]
    gone = [tmp_path / folder for folder in ("orders/migrations", ".github/workflows")]
    for folder in kept + gone:
        folder.mkdir(parents=True)
    (tmp_path / ".env.example").write_text("# For development\nDEBUG=True\n\n# For production\n")
    subprocess.run(
        [sys.executable, TEMPLATE / "hooks/post_gen_project.py"], cwd=tmp_path, check=True
    )

    assert all(folder.exists() for folder in kept)
    assert not any(folder.parent.exists() for folder in gone)


def test_empty_folders_behind_a_link_are_kept(run, tmp_path):
    """The link leads out of the project, so the folders behind it are not the project's."""
    (tmp_path / "others/kubernetes").mkdir(parents=True)
    (tmp_path / "out/my_project").mkdir(parents=True)
    (tmp_path / "out/my_project/deploy").symlink_to(tmp_path / "others")
    result = run("--no-input", "--overwrite-if-exists", "deployment=none")

    assert result.returncode == 0, result.stderr
    assert (tmp_path / "others/kubernetes").is_dir()


def test_the_next_steps_are_printed(run):
    assert "    cd my_project\n    make run\n" in run("--no-input").stdout


@pytest.mark.parametrize("hook", ["pre_gen_project", "post_gen_project"])
def test_hooks_run_on_a_bare_python(tmp_path, hook):
    source = (TEMPLATE / f"hooks/{hook}.py").read_text("utf-8")
    (tmp_path / ".env.example").write_text("# For development\nDEBUG=True\n\n# For production\n")
    script = tmp_path / "hook.py"
    script.write_text(create_env_with_context({}).from_string(source).render(cookiecutter=ANSWERS))
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-X", "importtime", script], cwd=tmp_path, capture_output=True
    )

    assert result.returncode == 0
    # Each import takes time in every bake: these few take 5 ms.
    imported = {
        node.names[0].name for node in ast.parse(source).body if isinstance(node, ast.Import)
    }
    assert imported <= {"json", "keyword", "os", "re", "sys", "unicodedata"}


@pytest.mark.parametrize("out", ["with space", "ünï/名前/🚀", 'o\'clock "now"', "$HOME; #1 & [x]"])
def test_the_output_path_may_have_unusual_characters(run, tmp_path, out):
    result = run("--no-input", out=out)

    assert result.returncode == 0, result.stderr
    project = Project(tmp_path / out / "my_project")
    project.run("ruff", "check", "--no-cache")
    assert (project / ".env").exists()


# Refused slugs: a folder of that name may exist and belong to somebody else.

OCCUPIED = ["guest", "my-shop", "Shop"]
PATHS = [
    *("..", ".", "", "shop/", "a/b", "x/..", "../victim", "../empty", "../new"),
    *("x/../../victim", "{neighbours}/victim", "{neighbours}/new/deep"),
]


@pytest.fixture
def neighbours(tmp_path):
    """The folder that contains the output folder. Both have files before the bake."""
    folder = tmp_path / "neighbours"
    for file in ("victim/file", "victim/deep/file", "file", *(f"there/{s}/file" for s in OCCUPIED)):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("mine")
    (folder / "empty").mkdir()
    return folder


def everything(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("slug", [*OCCUPIED, *PATHS])
@pytest.mark.parametrize("out", ["there", "new_out/deeper"])
def test_a_refused_slug_changes_no_existing_file(run, neighbours, slug, out):
    slug = slug.format(neighbours=neighbours)
    before = everything(neighbours)
    ways = [
        {"arguments": ["--no-input", f"project_slug={slug}"]},
        {"arguments": ["--no-input", "--overwrite-if-exists", f"project_slug={slug}"]},
        {"arguments": ["--overwrite-if-exists"], "typed": f"Shop\n{slug}\n" + "\n" * len(OPTIONS)},
    ]
    for way in ways if slug else ways[:2]:  # an empty line that is typed takes the default
        result = run(*way["arguments"], typed=way.get("typed"), out=neighbours / out)

        assert result.returncode == 1, way
        after = everything(neighbours)
        made = {neighbours / out, *(neighbours / out).parents} & after.keys() - before.keys()
        for folder in sorted(made, reverse=True):  # --output-dir made these: they are empty
            del after[folder]
            folder.rmdir()
        assert after == before, way
        if "already exists" not in result.stdout:  # Cookiecutter's own refusal
            assert f"project_slug {slug!r}: " in result.stderr, way


@pytest.mark.parametrize("slug", ["s" * 300, "a\0b", "a\0/../b"], ids=len)
def test_a_typed_slug_that_cannot_name_a_folder_is_refused(run, tmp_path, slug):
    result = run(typed=f"Shop\n{slug}\n" + "\n" * len(OPTIONS))

    assert result.returncode == 1
    assert f"project_slug {slug!r}: use 1-40 of a-z, 0-9 and _" in result.stderr
    assert list((tmp_path / "out").iterdir()) == []


def test_a_refused_slug_can_be_corrected_in_the_replay_file(run, tmp_path):
    assert run("--no-input", "project_slug=../shop").returncode == 1
    [file] = (tmp_path / "replay").iterdir()
    assert "project_slug '../shop': use" in run("--replay-file", file).stderr

    answers = json.loads(file.read_text())
    answers["cookiecutter"]["project_slug"] = "shop"
    file.write_text(json.dumps(answers))
    assert run("--replay-file", file).returncode == 0
    assert (tmp_path / "out/shop/manage.py").exists()


def test_all_secrets_of_env_differ(bake):
    secrets = re.findall("[0-9a-f]{24}", (bake() / ".env").read_text())

    assert len(secrets) >= 6
    assert len(set(secrets)) == len(secrets)


def test_overwriting_keeps_files_that_the_owner_added(run, tmp_path):
    project = tmp_path / "out/my_project"
    assert run("--no-input").returncode == 0
    (project / "media/uploads").mkdir(parents=True)  # still empty
    (project / "jobs/templates/jobs/mine.html").write_text("mine")
    (project / "jobs/static/jobs/mine.css").write_text("mine")
    result = run("--no-input", "--overwrite-if-exists")

    assert result.returncode == 0, result.stderr
    assert (project / "media/uploads").is_dir()
    assert (project / "jobs/templates/jobs/mine.html").read_text() == "mine"
    assert (project / "jobs/static/jobs/mine.css").read_text() == "mine"


@pytest.mark.parametrize("folder", ["with space", "Jürgens Läden", "$HOME; #1 & 'x'"])
def test_make_finds_its_tools_in_any_folder(bake, tmp_path, folder):
    """Fake tools print which honcho `make run` would start."""
    project = Project(bake().rename(tmp_path / folder))
    tools = {
        "python": "command -v honcho",
        "honcho": "true",
        "uv": "true",
        "pip": "true",
    }
    (project / ".venv/bin").mkdir(parents=True)
    for name, command in tools.items():
        tool = project / ".venv/bin" / name
        tool.write_text(f"#!/bin/sh\n{command}\n")
        tool.chmod(0o755)
    printed = project.call("make", "--silent", "run").strip()

    assert printed == str(project.resolve() / ".venv/bin/honcho")


def test_a_project_says_which_version_of_the_template_wrote_it(bake):
    """It is the newest in CHANGELOG.md, or while that is Unreleased, a .dev version."""
    [version] = re.findall('__version__ = "(.+)"', bake().read("jobs/__init__.py"))
    newest = re.search(r"^## (\S+)", (TEMPLATE / "CHANGELOG.md").read_text("utf-8"), re.M)[1]

    assert version == newest or (newest == "Unreleased" and version.endswith(".dev"))


def test_the_dockerfile_pins_its_images(bake):
    dockerfile = bake().read("Dockerfile")
    assert re.search(r"uv:\d+\.\d+\.\d+ ", dockerfile)
    assert "latest" not in dockerfile
