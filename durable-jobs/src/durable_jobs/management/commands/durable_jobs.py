"""manage.py durable_jobs status, pause NAME… --reason TEXT, resume NAME…, paused, or drill.

A name is that of a queue or a task.
"""

import os

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError
from django.db import transaction

from durable_jobs import pauses
from durable_jobs.diagnosis import overview
from durable_jobs.drill import drill
from durable_jobs.models import Pause


class Command(BaseCommand):
    help = "Says what is wrong, pauses queues or tasks, resumes them, or practices a crash."

    def add_arguments(self, parser):
        commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
        commands.add_parser("status", help="say what is wrong, as the admin does")
        pause = commands.add_parser("pause", help="start no job of these queues or tasks")
        resume = commands.add_parser("resume", help="start them again")
        commands.add_parser("paused", help="list what is paused")
        drill = commands.add_parser("drill", help="kill a worker of its own that runs a job")
        drill.add_argument("--yes", action="store_true", help="also without DEBUG")
        package = os.environ.get("DJANGO_SETTINGS_MODULE", "").partition(".")[0]
        drill.add_argument("--app", default=package, help="as of celery -A")
        for command in pause, resume:
            command.add_argument(
                "names", nargs="+", metavar="NAME", help="a queue, or a task's full name"
            )
        pause.add_argument("--reason", default="", help="for the people who wait")

    def handle(self, command, **options):
        if command == "drill":
            self.drill(**options)
        elif command == "status":
            _, problems = overview()
            self.stdout.write("\n".join(problems) or "nothing is wrong")
        else:
            self.pause(command, **options)

    def drill(self, app, yes, **options):
        if not (settings.DEBUG or yes):
            raise CommandError("DEBUG is off: for a drill in production, add --yes")
        self.stdout.write("Starting two workers, and killing the one that runs a job…")
        try:
            seconds = drill(app)
        except RuntimeError as error:
            raise CommandError(error) from None
        self.stdout.write(f"The other one continued the job after {seconds:.0f} s")

    @transaction.atomic  # if one of the names is wrong, change nothing
    def pause(self, command, names=(), reason="", **options):
        for name in names:
            try:
                if command == "pause":
                    pauses.pause(name, reason)
                elif not pauses.resume(name):
                    raise ValueError(f"{name} is not paused")
            except ValueError as error:
                raise CommandError(error) from None
        lines = [f"{pause.name}: {pause}" for pause in Pause.objects.all()]
        self.stdout.write("\n".join(lines) or "nothing is paused")
