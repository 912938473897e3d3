"""What docs/options.md says of each value of each option is proven by a test.

A new value fails until this page and README.md name it, and a new sentence about it until a row
here names its test. Which change to an output makes the test fail was tried for each row.
"""

import ast
import re
from collections import defaultdict

import yaml

from harness.bake import CHOICES, OPTIONS, TEMPLATE
from harness.checks import CHECKERS
from harness.project import Project
from test_bake import template_paths
from test_workflow import FORM, WORKFLOW

# {(option, value): {test: sentences, or parts of sentences, that are untrue if it fails}}
# Without a value, the sentences are about the option. The test runs with the value.
PROMISES = {
    ("project_name", None): {
        "test_a_hostile_name_reaches_the_output_unchanged": [
            "is any text of one line, in any script",
            "People see it in the README",
        ],
        "test_the_pages_show_the_name_of_the_project": [
            "on the jobs page, in the admin and in the API docs",
        ],
    },
    ("project_slug", None): {
        "test_the_slug_names_the_folder_and_the_package": [
            "the folder, the name in `pyproject.toml`",
            "(`tea-shop-project`)",
            "The default is derived from the name: `Tea Shop` becomes `tea_shop`",
            "from the name",
        ],
        "test_two_projects_on_one_server_keep_apart": [
            "the prefix of keys in Redis and of queues and tables at Amazon",
            "so that two projects do not take each other's messages",
        ],
    },
    ("description", None): {
        "test_a_hostile_name_reaches_the_output_unchanged": [
            "is one sentence for the README and `pyproject.toml`",
            "README and `pyproject.toml`",
        ],
    },
    ("author_name", None): {
        "test_a_hostile_name_reaches_the_output_unchanged": [
            "go into `pyproject.toml`",
            "`pyproject.toml`",
        ],
    },
    ("author_email", None): {
        "test_an_address_reaches_the_output_unchanged": [
            "go into `pyproject.toml`",
            "`pyproject.toml`",
        ],
    },
    ("broker", None): {
        "test_it_runs": ["carries tasks to the workers"],
        "test_a_killed_worker_loses_nothing": ["jobs are equally safe with each broker"],
    },
    ("broker", "redis"): {
        "test_a_killed_worker_loses_nothing": ["a killed worker's plain task is delivered again"],
        "test_a_plain_task_is_delivered_again_after_its_time_limit_and_a_minute": [
            "after `TASK_TIME_LIMIT` and a minute"
        ],
    },
    ("broker", "rabbitmq"): {
        "test_the_queues_are_replicated": [
            "queues are replicated",
        ],
        "test_a_killed_worker_loses_nothing": [
            "and a killed worker's plain task is delivered again within seconds"
        ],
        "test_make_run_starts_no_rabbitmq": ["`make run` starts no server"],
    },
    ("broker", "sqs"): {
        "test_there_is_neither_flower_nor_remote_control": [
            "no Flower",
            "no remote control",
        ],
        "test_a_queue_must_be_created_before_it_is_used": ["create a queue before you use it"],
        "test_it_passes_its_own_tests": [
            "Development and tests use moto, a local imitation of Amazon's services"
        ],
    },
    ("result_backend", None): {
        "test_it_runs": [
            "keeps what plain tasks return",
            "Jobs need none: their result is in their row",
            "Every broker works with every result backend",
        ],
    },
    ("result_backend", "redis"): {
        "test_the_server_deletes_a_result_after_a_day": [
            "for a day",
            "Redis deletes old results itself",
        ],
    },
    ("result_backend", "database"): {
        "test_the_admin_shows_a_result_for_a_day": [
            "for a day",
            "each result is a write to the database",
            "Beat has old results deleted each night",
        ],
    },
    ("result_backend", "dynamodb"): {
        "test_the_server_deletes_a_result_after_a_day": [
            "for a day",
            "DynamoDB deletes old results itself",
        ],
        "test_it_runs": [
            "development uses moto",
        ],
    },
    ("result_backend", "none"): {
        "test_it_runs": [
            "for plain tasks, `AsyncResult(…).get()` and chords raise `NotImplementedError`",
        ],
    },
    ("worker_pool", None): {
        "test_a_worker_typed_by_hand_uses_the_projects_settings": [
            "is how a worker runs several tasks at once"
        ],
    },
    ("worker_pool", "prefork"): {
        "test_a_worker_typed_by_hand_uses_the_projects_settings": [
            "child processes, as many as CPUs"
        ],
        "test_a_time_limit_ends_a_plain_task_that_computes": [
            "Time limits end any task",
        ],
        "test_a_killed_child_loses_nothing": ["a crash ends one child"],
        "test_a_child_that_uses_too_much_memory_is_replaced_after_its_task": [
            "and a child that uses too much memory is replaced after its task"
        ],
    },
    ("worker_pool", "threads"): {
        "test_a_worker_typed_by_hand_uses_the_projects_settings": ["20 threads"],
        "test_a_thread_over_its_time_limit_continues": [
            "No time limit can stop a task",
            "and its task ends when it next reports its progress",
            "a plain task continues",
        ],
        "test_a_job_over_its_time_limit_fails": ["A job over its limit is `failed`"],
    },
    ("worker_pool", "gevent"): {
        "test_a_worker_typed_by_hand_uses_the_projects_settings": ["100 greenlets"],
        "test_a_greenlet_that_blocks_makes_all_others_wait": [
            "Work on the CPU, or a C library that blocks, makes all others wait"
        ],
        "test_a_job_over_its_time_limit_fails": ["The hard time limit works"],
        "test_a_greenlet_has_no_soft_time_limit": ["the soft one does not"],
    },
    ("periodic_tasks", None): {
        "test_each_task_of_the_schedule_starts_once": ["is where Beat finds its schedule"],
        "test_it_passes_its_own_tests": ["Beat recovers jobs with either choice"],
    },
    ("periodic_tasks", "code"): {
        "test_each_task_of_the_schedule_starts_once": [
            "`CELERY_BEAT_SCHEDULE` in `config/settings.py`",
        ],
    },
    ("periodic_tasks", "admin"): {
        "test_each_task_of_the_schedule_starts_once": [
            "a table in the database and pages in the admin, by django-celery-beat",
        ],
        "test_beat_starts_the_daily_report": [
            "To ship a schedule with the code, write a data migration"
        ],
    },
    ("deployment", None): {
        "test_each_service_is_healthy_and_has_few_rights": ["adds the files of a deployment"],
        "test_it_runs": ["`make run` needs none of them"],
    },
    ("deployment", "docker"): {
        "test_each_service_is_healthy_and_has_few_rights": [
            "an image, and `compose.yaml` with PostgreSQL, the broker and all processes"
        ],
        "test_an_order_becomes_a_succeeded_job": ["`make up` starts everything"],
        "test_two_lines_of_env_decide_about_a_stand_in_for_amazon": [
            "Amazon's services are moto until you remove two lines from `.env`"
        ],
    },
    ("deployment", "kubernetes"): {
        "test_an_output_has_the_files_of_docker_and_manifests": [
            "the files of `docker`",
            "database and broker are servers of your own",
        ],
        "test_the_manifests_are_valid": [
            "`deploy/kubernetes/` for kustomize",
            "The cluster needs KEDA",
        ],
        "test_the_pods_of_the_manifests_run_jobs": [
            "web, Beat, a Deployment for each queue, migrations"
        ],
        "test_the_queries_that_scale_workers_count_waiting_and_running_jobs": [
            "The number of workers follows the number of jobs"
        ],
    },
    ("deployment", "none"): {
        "test_the_commands_of_the_page_run_a_project": [
            "the project's docs/production.md has the commands of a deploy and of each process"
        ],
    },
    ("ci", None): {
        "test_the_job_runs_all_checks_and_all_tests_on_its_services": [
            "writes a job that runs `make check` and `make test` with PostgreSQL, the broker and"
            " the result backend",
            "Amazon's services are moto there",
        ],
    },
    ("ci", "github"): {
        "test_the_job_runs_all_checks_and_all_tests_on_its_services": [
            "for pull requests and for pushes to `main`",
        ],
        "test_ci_adds_its_own_files_and_changes_only_the_readme": ["`.github/workflows/ci.yml`"],
        "test_dependabot_updates_every_file_with_versions": [
            "and `.github/dependabot.yml`, with which Dependabot proposes newer versions of"
            " packages, actions and images each week"
        ],
    },
    ("ci", "gitlab"): {
        "test_the_job_runs_all_checks_and_all_tests_on_its_services": [
            "for each push",
        ],
        "test_ci_adds_its_own_files_and_changes_only_the_readme": ["`.gitlab-ci.yml`"],
        "test_renovate_updates_every_file_with_versions": [
            "and `renovate.json`, with which Renovate proposes newer versions, once it is installed"
        ],
    },
    ("ci", "none"): {
        "test_ci_adds_its_own_files_and_changes_only_the_readme": [
            "no file",
        ],
    },
    ("include_example", None): {
        "test_the_example_is_written_only_if_it_is_wanted": [
            "adds the app `orders` with its tests"
        ],
        "test_it_passes_its_checks_and_its_own_tests": [
            "It shows these patterns",
            "a job that is retried",
            "a job in thousands of steps",
            "an import of a file with a next step",
            "a batch of jobs and one after them",
            "a job that computes and one that waits for another server (each on its own queue)",
            "a plain task",
        ],
    },
    ("include_example", "yes"): {
        "test_the_pages_start_show_cancel_and_repeat_a_job": ["a report to watch and cancel"],
        "test_beat_starts_the_daily_report": ["a task that Beat starts"],
        "test_the_example_is_written_only_if_it_is_wanted": [
            "`orders/` and `tests/test_orders.py`"
        ],
    },
    ("include_example", "no"): {
        "test_the_example_is_written_only_if_it_is_wanted": [
            "neither",
        ],
        "test_it_passes_its_own_tests": ["The project is complete without the example"],
    },
}
# Sentences that define a word or give advice, so no test can fail.
ADVICE = [
    "is for machines",
    "(On RabbitMQ, use a virtual host for each project.)",
    "Do not change it once data is stored under it",
    "A public project publishes the address",
    "one sentence",
    "A *job* is a task with a row in the database, so",
    "The choice matters for *plain tasks*, ordinary Celery tasks without a row",
    "([what happens to them](reliability.md#plain-tasks)), and for which servers you want to run",
    "Production needs three nodes",
    "each costs memory",
    "With this pool, use SQLite for a first look only, and PostgreSQL otherwise",
    "a change is a deploy",
    "The project's docs/tasks.md says how to remove them",
]


def cells(line):
    """Return the cells of a table's row."""
    return [cell.strip() for cell in line.strip("|").split("|")]


def names(text):
    return re.findall(r"`(\w+)`", text)


def named_in_readme():
    """Return the table of options, {option: values}."""
    page, found = (TEMPLATE / "README.md").read_text("utf-8"), {}
    table = page.split("| option | choices, the default first |\n|---|---|\n")[1].split("\n\n")[0]
    for line in table.splitlines():
        first, second = cells(line)
        found |= dict.fromkeys(names(first), names(second))
    return found


def said_in_options():
    """Yield (option, value, text) of docs/options.md, without "choose it when", which is advice."""
    page, options = (TEMPLATE / "docs/options.md").read_text("utf-8"), []
    for line in page.split("## What is refused")[0].splitlines():
        if line.startswith("**`"):
            options, text = re.match(r"((?:.*?`\*\*)+)(.*)", line).groups()
            options = names(options)
            yield from ((option, None, text) for option in options)
        elif line.startswith("| `"):
            value, *_, text = cells(line)
            yield from ((option, *names(value), text) for option in options)


def said():
    """Return what docs/options.md says, {(option, value): texts}."""
    texts = defaultdict(list)
    for option, value, text in said_in_options():
        texts[option, value].append(text)
    return texts


def test_both_pages_name_each_value_in_order():
    """The default is the first."""
    named = {option: [] for option, _, _ in said_in_options()}
    for option, value, _ in said_in_options():
        named[option] += [value] if value else []
    expected = [(option, CHOICES.get(option, [])) for option in OPTIONS]
    assert list(named.items()) == list(named_in_readme().items()) == expected


def test_each_sentence_about_a_value_has_a_row():
    texts = said()
    proven = {key: sum(rows.values(), []) for key, rows in PROMISES.items()}
    for (option, value), found in texts.items():
        assert proven.get((option, value)), f"no promise of {option}={value}"
        rows = [*proven[option, value], *ADVICE]
        if value is None:  # a sentence about the option may be proven for each of its values
            rows += [row for key in proven if key[0] == option for row in proven[key]]
        for text in found:
            for row in sorted(rows, key=len, reverse=True):
                text = text.replace(row, "")
            assert set(re.findall(r"\w+", text)) <= {"and"}, f"{option}={value}: {text}"


def test_each_row_is_a_sentence_of_a_page():
    texts = said()
    for (option, value), rows in PROMISES.items():
        found = texts[option, value] + texts[option, None]
        for row in sum(rows.values(), []):
            assert any(row in text for text in found), f"{option}={value}: {row}"
    everything = str(texts)
    assert not [advice for advice in ADVICE if advice not in everything]


def test_each_proof_runs_with_its_value():
    """The value is in the id of a run, in the name of the file, or in the test's code."""
    printed = Project(TEMPLATE).run("pytest", "tests", "--collect-only", "--quiet")
    runs = defaultdict(set)  # {test: words of its file's name and of its parameters}
    for file, test, params in re.findall(r"^tests/(\S+)::(\w+)(.*)", printed, re.MULTILINE):
        runs[test] |= set(re.findall("[a-z0-9]+", f"{file} {params}".lower()))
    code = functions()
    for (option, value), rows in PROMISES.items():
        for test in rows:
            assert test in runs, f"{option}={value}: no test {test}"
            words = runs[test] | set(re.findall(r"\w+", code[test]))
            about = {value} if value else {option, *CHOICES.get(option, [])}
            assert about & words, f"{test} has no run with {option}={value}"


def functions():
    """Return the code of each test, {name: code}."""
    found = {}
    for file in (TEMPLATE / "tests").rglob("test_*.py"):
        code = file.read_text("utf-8")
        for node in ast.parse(code).body:
            if isinstance(node, ast.FunctionDef):
                found[node.name] = ast.get_source_segment(code, node)
    return found


def test_each_yaml_file_has_a_linter():
    """Of the outputs, and of the template itself."""
    for file in template_paths():
        if file.suffix in (".yml", ".yaml"):
            assert any(file.match(pattern) for pattern in CHECKERS), f"{file}: see CHECKERS"
    listed = Project(TEMPLATE).call("git", "ls-files", ":!*cookiecutter*", "*.yml", "*.yaml")
    # promtool reads the last: see integration/test_operation.py.
    assert sorted(listed.split()) == [FORM, WORKFLOW, "tests/alerts.yml"]


def test_kustomize_renders_each_manifest(bake):
    """integration/test_kubernetes.py checks what it renders."""
    folder = bake(deployment="kubernetes") / "deploy/kubernetes"
    for page in folder.rglob("kustomization.yaml"):
        found = {file.name for file in page.parent.glob("*.yaml")} - {page.name}
        listed = yaml.safe_load(page.read_text())["resources"]
        assert found == {name for name in listed if name.endswith(".yaml")}, page
