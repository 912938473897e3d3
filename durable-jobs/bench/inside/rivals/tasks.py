from django_tasks import task
from procrastinate.contrib.django import app
from work import work

procrastinate_task = app.task(name="work")(work)


@task
def django_task(*arguments):
    work(*arguments)
