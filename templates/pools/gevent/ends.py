        except gevent.Timeout:  # the hard time limit
            fail(run, OVER_TIME_LIMIT)
            raise
        except gevent.GreenletExit:  # the worker shuts down: another one goes on
            insist(run.row.requeue)
            raise
        except SystemExit as error:
            fail(run, f"The task called sys.exit({error.code!r})")
            raise RuntimeError("sys.exit() in a task") from error  # which keeps its slot
