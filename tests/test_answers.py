"""Answers: hostile texts reach the output unchanged, wrong answers are refused."""

import ast
import json
import keyword
import os
import pty
import re
import sys
import tomllib
from contextlib import suppress
from email.headerregistry import Address

import pytest
import yaml
from cookiecutter.exceptions import FailedHookException
from cookiecutter.utils import create_env_with_context
from markdown_it import MarkdownIt

from harness.bake import CHOICES, DEFAULTS, OPTIONS, PINNED, TEMPLATE
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

    settings = ast.parse((project / "config/rest.py").read_text("utf-8"))
    dicts = [node for node in ast.walk(settings) if isinstance(node, ast.Dict)]
    pairs = [pair for node in dicts for pair in zip(node.keys, node.values, strict=True)]
    [title] = [value.value for key, value in pairs if key and ast.unparse(key) == "'TITLE'"]
    assert title == text

    readme = list(literal_texts((project / "README.md").read_text("utf-8")))
    assert readme[0] == ("h1", text.strip())
    assert ("p", text.strip()) in readme

    for file in project.files():
        if file.suffix == ".whl":
            continue
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
    settings = (project / "config/rest.py").read_text("utf-8")
    default = macros().python(ANSWERS["project_name"])
    assert default in settings

    for length in range(1, 201):
        literal = macros().python((character * length)[:length])
        file = project / f"config/settings_{length}.py"
        file.write_text(settings.replace(default, literal), "utf-8")

    project.run("ruff", "format", "--check", "--no-cache")


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
    assert f"project_slug {slug!r}: use 1-40 characters: a-z, 0-9, _" in refusal(project_slug=slug)


def hook(slug):
    """Run the hook for this slug, in this process. Return its variables and its faults."""
    source = (TEMPLATE / "hooks/pre_gen_project.py").read_text("utf-8")
    definitions = source.split('\nif "__prompts__"')[0]
    template = create_env_with_context({}).from_string(definitions)
    exec(template.render(cookiecutter={**ANSWERS, "project_slug": slug}), found := {})
    return found, list(found["faults"]())


def taken(meaning):
    return set(hook("shop")[0]["TAKEN"][meaning].split())


@pytest.mark.parametrize(
    ("slug", "meaning"),
    [
        ("off", "a YAML keyword, not text"),
        ("template1", "a PostgreSQL database or role"),
        ("guest", "a RabbitMQ user"),  # may log in from the server's own machine only
        ("kube_system", "a Kubernetes namespace"),
        ("redis", "an image that the project uses"),
        ("lpt9", "a device on Windows"),
    ],
)
def test_a_slug_with_another_meaning_is_refused(refusal, slug, meaning):
    expected = f"project_slug {slug!r}: this is {meaning}; try {slug}_project"
    assert expected in refusal(project_slug=slug)


def test_names_of_modules_are_no_bad_slugs():
    name = "[a-z][a-z0-9_]*[a-z0-9]"
    modules = {word for word in sys.stdlib_module_names if re.fullmatch(name, word)}
    assert {"calendar", "email", "queue", "site"} < modules
    words = {word for word in keyword.kwlist if word.islower()}
    for slug in modules | words | {"celery", "click", "config", "durable_jobs", "orders", "test"}:
        assert hook(slug)[1] == [], slug


def test_words_of_yaml_are_refused():
    """YAML 1.1 also has y and n, which PyYAML reads as text."""
    resolvers = sum(yaml.SafeLoader.yaml_implicit_resolvers.values(), [])
    patterns = [regex.pattern for tag, regex in resolvers if tag.endswith((":bool", ":null"))]

    words = {"n", "y", *re.findall(r"\b[a-z]+\b", " ".join(patterns))}

    assert words == taken("a YAML keyword, not text")


def test_images_of_servers_are_refused():
    """Docker gives the slug to the project's image, and would take it from the server's."""
    values = "\n".join(map(str, vars(PINNED).values()))
    images = {"python", *re.findall(r"^([a-z]+):v?\d", values, re.MULTILINE)}

    assert images - {"postgres"} == taken("an image that the project uses")


@pytest.mark.parametrize("text", ["", "  ", None, 42, ["a"], {"a": "b"}])
def test_an_answer_that_is_not_a_text_is_refused(replay, tmp_path, text):
    # An empty slug means the output folder itself, which exists: cookiecutter refuses that.
    options = set(OPTIONS) - set(CHOICES) - ({"project_slug"} if text == "" else set())
    result = replay(**dict.fromkeys(options, text))

    assert result.returncode == 1
    for option in options:
        assert f"{option} {text!r}: enter text that is not empty." in result.stderr
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
        assert f"{option} {text!r}: remove line breaks" in result.stderr
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
