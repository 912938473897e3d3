"""manage.py durable_jobs pause NAME… --reason TEXT, resume NAME…, or paused. A name is that of a queue or a task."""

from django.core.management.base import BaseCommand, CommandError
from django.db import transaction

from durable_jobs import pauses
from durable_jobs.models import Pause


class Command(BaseCommand):
    help = "Pauses queues or tasks, resumes them, or lists what is paused."

    def add_arguments(self, parser):
        commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
        pause = commands.add_parser("pause", help="start no job of these queues or tasks")
        resume = commands.add_parser("resume", help="start them again")
        commands.add_parser("paused", help="list what is paused")
        for command in pause, resume:
            command.add_argument(
                "names", nargs="+", metavar="NAME", help="a queue, or a task's full name"
            )
        pause.add_argument("--reason", default="", help="for the people who wait")

    @transaction.atomic  # if one of the names is wrong, change nothing
    def handle(self, command, names=(), reason="", **options):
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
