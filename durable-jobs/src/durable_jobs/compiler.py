"""Statements that run for each job. Building their SQL each time took half of a child process's CPU time, so it is
built once.
"""

import json
from datetime import timedelta
from functools import cache, wraps
from inspect import signature
from operator import itemgetter

from django.db import connection, connections, models
from django.db.models.constants import OnConflict
from django.db.models.sql import InsertQuery, UpdateQuery

from durable_jobs.database import Clock, Now, cursor_that_prepares
from durable_jobs.models import Job


class Argument(models.Value):
    """An argument of a statement that is built once."""

    def as_sql(self, compiler, connection):
        return "%s", [self]

    def prepare(self, values, connection):
        return self.output_field.get_db_prep_save(values[self.value], connection)


def prepared(**types):
    """Decorate a function that returns a queryset of jobs, and a dictionary of changes or None.

    The decorated function runs queryset.update(**changes), and returns how many rows were changed. With
    None, it returns the queryset's rows as tuples. An argument with the name of a field of Job is converted by
    that field; for each other one, `types` has a field.
    """

    def decorate(function):
        names = signature(function).parameters.keys()

        @cache
        def build():
            fields = {name: Job._meta.get_field(name) for name in names - types.keys()} | types
            rows, changes = function(**{name: Argument(name, fields[name]) for name in names})
            query = rows.query
            if changes:
                query = query.chain(UpdateQuery)
                query.add_update_values(changes)
            compiler = query.get_compiler(rows.db)
            statement = compiler.as_sql()
            columns = [] if changes else [column for column, *_ in compiler.select]
            return *statement, compiler, compiler.get_converters(columns)

        @wraps(function)
        def run(**values):
            *statement, compiler, converters = build()
            answer = execute(*statement, values)
            if isinstance(answer, int):
                return answer
            return list(compiler.apply_converters(answer, converters))

        return run

    return decorate


def execute(sql, params, values):
    """Run this SQL with `values` for its Arguments. Returns its rows, or how many it changed."""
    # Do not prepare a SELECT: keys and batches with few rows and with many would share one plan.
    with connection.cursor() if sql.startswith("SELECT") else cursor_that_prepares() as cursor:
        database = cursor.db  # `connection` would look it up for each attribute
        values = [p.prepare(values, database) if isinstance(p, Argument) else p for p in params]
        cursor.execute(sql, values)
        return cursor.fetchall() if cursor.description else cursor.rowcount


RETURNED_FIELDS = ["created_at", "due_at", "send_at"]  # what the INSERT of a job returns


def insert(job):
    """INSERT this new job. `due_at` and `send_at` are datetimes, timedeltas from now (see DATABASE_NOW), or None.

    Sets them, and `created_at`, to the database's times. Returns whether it is stored: not if another job has its id,
    its `idempotency_key` or, being active, its `unique_key`. That is no error, which would end the caller's transaction.
    As with bulk_create(), Django sends no signal.
    """
    compiler, converters, *statement = compiled_insert(isinstance(job.due_at, timedelta))
    rows = execute(*statement, vars(job))
    for row in compiler.apply_converters(map(list, rows), converters):
        vars(job).update(zip(RETURNED_FIELDS, row, strict=True))
        job._state.adding, job._state.db = False, Job.objects.db
    return bool(rows)


@cache
def compiled_insert(adds_now):
    """Return the compiler of the INSERT, the converters of what it returns, its SQL and its parameters."""
    fields = Job._meta.concrete_fields
    values = {field.attname: Argument(field.attname, field) for field in fields}
    for name in ("due_at", "send_at") if adds_now else ():
        values[name] = Now() + Argument(name, models.DurationField())
    query = InsertQuery(Job, on_conflict=OnConflict.IGNORE)
    query.insert_values(fields, [Job(**values | {"created_at": Clock()})])
    compiler = query.get_compiler(Job.objects.db)
    compiler.returning_fields = [Job._meta.get_field(name) for name in RETURNED_FIELDS]
    columns = [field.get_col(Job._meta.db_table) for field in compiler.returning_fields]
    [[sql, params]] = compiler.as_sql()
    return compiler, compiler.get_converters(columns), sql, params


CHUNK = 500  # jobs per statement
MANY = 20  # with fewer jobs, an INSERT is faster, which waits for one answer less


def insert_many(jobs):
    """Store these new jobs, all of them or none. With PostgreSQL, many are a COPY, which needs half of the CPU time.

    As with bulk_create(), Django sends no signal.
    """
    database = connections[Job.objects.db]
    if database.vendor != "postgresql" or len(jobs) < MANY:
        Job.objects.bulk_create(jobs, batch_size=CHUNK)
        return
    fields = Job._meta.concrete_fields
    columns = ", ".join(database.ops.quote_name(field.column) for field in fields)
    read = itemgetter(*(field.attname for field in fields))
    is_json = [isinstance(field, models.JSONField) for field in fields]
    database.validate_no_broken_transaction()
    with database.wrap_database_errors, database.cursor() as cursor:
        with cursor.copy(f"COPY {Job._meta.db_table} ({columns}) FROM STDIN") as copy:
            for job in jobs:
                copy.write_row(
                    [
                        json.dumps(value) if json_ and value is not None else value
                        for value, json_ in zip(read(vars(job)), is_json, strict=True)
                    ]
                )
    for job in jobs:
        job._state.adding, job._state.db = False, database.alias
