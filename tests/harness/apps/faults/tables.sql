-- All final states that were ever written, the rows of the tasks `write` and `write_chunks`, and jobs
-- that cannot be deleted.
CREATE TABLE finals (job uuid, state text);
CREATE TABLE written (number integer PRIMARY KEY);
CREATE TABLE chunks (job uuid, chunk integer);
CREATE TABLE keeps (job uuid REFERENCES durable_jobs_job);
CREATE FUNCTION note_final() RETURNS trigger AS $$
BEGIN INSERT INTO finals VALUES (NEW.id, NEW.state); RETURN NEW; END $$ LANGUAGE plpgsql;
CREATE TRIGGER note_final AFTER UPDATE ON durable_jobs_job FOR EACH ROW
WHEN (NEW.state IN ('succeeded', 'failed', 'cancelled') AND NEW.finished_at IS DISTINCT FROM OLD.finished_at)
EXECUTE FUNCTION note_final();
