"""The migrations, and the SQL that Django does not write itself."""

# How many jobs of each queue run, or are due and blocked by no limit and no pause: what its workers have
# to do. An autoscaler reads it, so its columns are part of the public interface. A queue without such
# jobs has no row. Before a migration changes the table of the jobs, it must drop the view.
CREATE_LOAD = """
CREATE VIEW durable_jobs_load AS
SELECT queue, COUNT(*) AS jobs
FROM (
  SELECT queue FROM durable_jobs_job WHERE lease_ends_at IS NOT NULL AND state = 'running'
  UNION ALL
  SELECT queue FROM durable_jobs_job
  WHERE send_at IS NOT NULL
    AND (times_sent > 0 OR send_at < CURRENT_TIMESTAMP)
    AND NOT EXISTS (
      SELECT 1 FROM durable_jobs_pause WHERE name IN (durable_jobs_job.queue, durable_jobs_job.task)
    )
) AS active
GROUP BY queue
"""
DROP_LOAD = "DROP VIEW durable_jobs_load"


def clean_up_sooner(apps, schema_editor):
    """Have PostgreSQL clean up after some thousand jobs, not after a fifth of the table has changed.

    Each job is updated a few times, and queries read what is left of its old versions.
    """
    if schema_editor.connection.vendor == "postgresql":
        schema_editor.execute(
            "ALTER TABLE durable_jobs_job SET"
            " (autovacuum_vacuum_scale_factor = 0.02, autovacuum_analyze_scale_factor = 0.02)"
        )
