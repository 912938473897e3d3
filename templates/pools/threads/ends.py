        except SystemExit as error:
            fail(run, f"The task called sys.exit({error.code!r})")
            raise RuntimeError("sys.exit() in a task") from error  # which keeps its slot
