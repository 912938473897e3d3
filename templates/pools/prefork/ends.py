        except SystemExit as error:
            if terminate_handler_fired():  # the worker shuts down: another one goes on
                insist(run.row.requeue)
                raise
            fail(run, f"The task called sys.exit({error.code!r})")
            raise RuntimeError("sys.exit() in a task") from error  # which keeps its slot
